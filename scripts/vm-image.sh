#!/usr/bin/env bash
# What ./dev vm boots, from the packages of one Debian release alone: vm-image.sh DIRECTORY SUITE
#
#   DIRECTORY/qemu     starts the emulator, unpacked with its libraries: the machine gets no package for it
#   DIRECTORY/vmlinuz  the stock cloud kernel; NVMe and ext4 are built in, so it needs no initial memory disk
#   DIRECTORY/root.img root file system (ext4, sparse) with the kernel's modules
#   DIRECTORY/recipe   what they were made from; same recipe, nothing to do
#
# apt does the downloading, so the archive's signature and every package's hash are verified
# against this machine's own keyring. The directory appears whole or not at all.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/common.sh
. "$here/common.sh"
dir=$1 suite=$2

# busybox-static is what test containers run; the others are what Godwit and its tests start.
packages=iproute2,nftables,busybox-static,kmod,procps,curl,redis-server,redis-tools
disk_sectors=16777216 # 8 GiB, sparse
first_sector=2048

recipe="$suite $(sha256sum <"$here/vm-image.sh" | cut -d' ' -f1)"
if [ "$(cat "$dir/recipe" 2>/dev/null || true)" = "$recipe" ]; then
    exit 0
fi
[ "$(dpkg --print-architecture)" = amd64 ] || die "the virtual machine is made for amd64 only, this is $(dpkg --print-architecture)"
for tool in mmdebstrap mke2fs; do
    command -v $tool >/dev/null 2>&1 || die "$tool is missing: the virtual machine's disk is made with it; run ./dev setup, or: apt-get install mmdebstrap e2fsprogs"
done
mirror=$(debian_mirror)

say "making a virtual machine of Debian $suite in $dir (once; half a minute)"
mkdir -p "$(dirname "$dir")"
rm -rf "$dir".new.* # of a run that was killed
new=$(mktemp -d "$dir.new.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new"
apt=$new/apt
mkdir -p "$apt"/{sources,lists/partial,cache/archives/partial}
cat >"$apt/sources/newer.sources" <<TEXT
Types: deb
URIs: $mirror
Suites: $suite
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
TEXT
# An empty package status makes apt fetch every library, whatever the machine already has.
apt_options=(
    -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt/sources"
    -o Dir::State::Lists="$apt/lists" -o Dir::State::Status=/dev/null
    -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1
    -o Acquire::Languages=none -o Acquire::Retries=3
)
apt-get -qq -y "${apt_options[@]}" update </dev/null >&2 || die "apt cannot read Debian $suite at $mirror; check the network and the apt sources"
apt-get -qq -y "${apt_options[@]}" install --no-install-recommends --download-only qemu-system-x86 </dev/null >&2 \
    || die "apt cannot fetch the emulator from $mirror; check the network and try again"
# The package linux-image-cloud-amd64 is empty: it depends on the current kernel.
kernel=$(apt-cache "${apt_options[@]}" show --no-all-versions linux-image-cloud-amd64 | sed -n 's/^Depends: \([^ ]*\).*/\1/p')
(cd "$apt" && apt-get -qq "${apt_options[@]}" download "$kernel" </dev/null >&2) \
    || die "apt cannot fetch the kernel from $mirror; check the network and try again"

mkdir "$new/prefix" "$new/kernel"
for package in "$apt"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$new/prefix"
done
dpkg-deb --extract "$apt/$kernel"_*.deb "$new/kernel"
# Debian 12's kernels have their modules beneath /lib, which is the same directory in the root file system.
[ ! -d "$new/kernel/lib/modules" ] || { mkdir -p "$new/kernel/usr/lib" && mv "$new/kernel/lib/modules" "$new/kernel/usr/lib/"; }
rm -rf "$new"/prefix/usr/share/{doc,man,locale}
# Debian's merged /usr: packages ship usr/lib, links at the top come from the base system, absent here.
for name in lib lib64; do
    [ -e "$new/prefix/$name" ] || ln -s "usr/$name" "$new/prefix/$name"
done
cat >"$new/qemu" <<'TEXT'
#!/bin/sh
# exec, so the process the caller started is the emulator itself.
prefix=$(dirname "$(readlink -f "$0")")/prefix
export QEMU_MODULE_DIR=$prefix/usr/lib/x86_64-linux-gnu/qemu # where accelerators are modules
exec "$prefix/lib64/ld-linux-x86-64.so.2" --library-path "$prefix/usr/lib/x86_64-linux-gnu" \
    "$prefix/usr/bin/qemu-system-x86_64" -L "$prefix/usr/share/qemu" -L "$prefix/usr/share/seabios" "$@"
TEXT
chmod 755 "$new/qemu"

# The second disk, the one without partitions, is a tar archive of files under the paths they have on the host.
cat >"$new/first" <<'TEXT'
#!/bin/sh
export PATH=/usr/sbin:/usr/bin
mount -t devtmpfs -o nosuid devtmpfs /dev
for _ in 1 2 3 4 5 6 7 8 9 10; do
    for disk in /dev/nvme?n1; do
        [ -b "$disk" ] && ! [ -b "${disk}p1" ] && break 2
    done
    sleep 0.5
done
tar -x -f "$disk" -C / --keep-directory-symlink
exec /godwit-vm/guest.sh
TEXT
mmdebstrap --quiet --variant=minbase --include="$packages" --aptopt='APT::Install-Recommends "false"' \
    --dpkgopt='path-exclude=/usr/share/doc/*' --dpkgopt='path-exclude=/usr/share/man/*' \
    --dpkgopt='path-exclude=/usr/share/locale/*' \
    --customize-hook="cp -a '$new/kernel/usr/lib/modules' \"\$1/usr/lib/\"" \
    --customize-hook="chroot \"\$1\" depmod '${kernel#linux-image-}'" \
    --customize-hook="install -m 755 '$new/first' \"\$1/usr/sbin/godwit-vm\"" \
    "$suite" "$new/rootfs" "$mirror" </dev/null >"$new/log" 2>&1 \
    || { tail -n 30 "$new/log" >&2; die "mmdebstrap failed (its last lines are above)"; }
# Disks are named in the order in which they happen to answer; a partition of an MBR can be named
# by the disk's signature (here "godw") and its number instead.
truncate -s $((disk_sectors * 512)) "$new/root.img"
{
    printf 'wdog\0\0\0\xff\xff\xff\x83\xff\xff\xff'
    for number in $first_sector $((disk_sectors - first_sector)); do
        for shift in 0 8 16 24; do printf "\\x$(printf %02x $((number >> shift & 255)))"; done
    done
} | dd of="$new/root.img" bs=1 seek=440 conv=notrunc status=none
printf '\x55\xaa' | dd of="$new/root.img" bs=1 seek=510 conv=notrunc status=none
mke2fs -q -t ext4 -F -E "offset=$((first_sector * 512)),lazy_itable_init=1,lazy_journal_init=1" -d "$new/rootfs" \
    "$new/root.img" $(((disk_sectors - first_sector) / 2))k
cp "$new/kernel/boot/vmlinuz-${kernel#linux-image-}" "$new/vmlinuz"
rm -rf "$apt" "$new/kernel" "$new/rootfs" "$new/first" "$new/log"
printf '%s\n' "$recipe" >"$new/recipe"
rm -rf "$dir"
mv "$new" "$dir"
trap - EXIT
say "the virtual machine is in $dir, kernel ${kernel#linux-image-}"
