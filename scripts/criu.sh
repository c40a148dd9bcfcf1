#!/usr/bin/env bash
# A newer Debian release's CRIU with all its libraries in a private prefix: criu.sh PREFIX SUITE
#
#   PREFIX/root     the packages, unpacked, nothing of them run
#   PREFIX/criu     starts the program through the prefix's own dynamic linker, so that the
#                   machine's libc neither matters nor changes
#   PREFIX/recipe   what this prefix was made from; same recipe, nothing to do
#
# apt does the downloading, so the archive's signature and every package's hash are verified
# against this machine's own keyring. The prefix appears whole or not at all.
set -euo pipefail
here=$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")
# shellcheck source=scripts/common.sh
. "$here/common.sh"
prefix=$1 suite=$2

recipe="$suite $(sha256sum <"$here/criu.sh" | cut -d' ' -f1)"
if [ -x "$prefix/criu" ] && [ "$(cat "$prefix/recipe" 2>/dev/null || true)" = "$recipe" ]; then
    exit 0
fi

case $(dpkg --print-architecture) in
    amd64) triple=x86_64-linux-gnu loader=lib64/ld-linux-x86-64.so.2 ;;
    arm64) triple=aarch64-linux-gnu loader=lib/ld-linux-aarch64.so.1 ;;
    *) die "no CRIU recipe for $(dpkg --print-architecture); install CRIU >= 4.1 yourself and name it in GODWIT_CRIU" ;;
esac
mirror=$(debian_mirror)
[ -n "$mirror" ] || die "no main archive of Debian among this machine's apt sources; add it to /etc/apt/sources.list.d"

say "unpacking CRIU of Debian $suite into $prefix"
mkdir -p "$(dirname "$prefix")"
rm -rf "$prefix".new.* "$prefix".old.* # of a run that was killed; set-ups run one at a time
new=$(mktemp -d "$prefix.new.XXXXXX")
trap 'rm -rf "$new"' EXIT
chmod 755 "$new" # restored processes of user namespaces pass through here
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
apt_private=(
    apt-get -qq -y
    -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$apt/sources"
    -o Dir::State::Lists="$apt/lists" -o Dir::State::Status=/dev/null
    -o Dir::Cache="$apt/cache" -o APT::Sandbox::User=root -o Debug::NoLocking=1
    -o Acquire::Languages=none -o Acquire::Retries=3
)
"${apt_private[@]}" update </dev/null >&2 || die "apt cannot read Debian $suite at $mirror; check the network and the apt sources"
"${apt_private[@]}" install --no-install-recommends --download-only criu </dev/null >&2 \
    || die "apt cannot fetch CRIU of Debian $suite from $mirror; check the network and try again"

mkdir "$new/root"
for package in "$apt"/cache/archives/*.deb; do
    dpkg-deb --extract "$package" "$new/root"
done
rm -rf "$apt" "$new"/root/usr/share
# Debian's merged /usr: packages ship usr/lib, links at the top come from the base system, absent here.
for dir in lib lib64; do
    [ -e "$new/root/$dir" ] || ! [ -d "$new/root/usr/$dir" ] || ln -s "usr/$dir" "$new/root/$dir"
done

# Prints the start script for a prefix at $1. exec, so the process the caller started is CRIU itself.
start_script() {
    cat <<TEXT
#!/bin/sh
exec $1/root/$loader --library-path $1/root/usr/lib/$triple --argv0 criu $1/root/usr/sbin/criu "\$@"
TEXT
}
start_script "$new" >"$new/criu"
chmod 755 "$new/criu"
version=$("$new/criu" --version | sed -n 's/^Version: //p')
at_least "${version:-0}" 4.1 || die "the CRIU of Debian $suite says version '${version}', at least 4.1 is needed"
start_script "$prefix" >"$new/criu"
printf '%s\n' "$recipe" >"$new/recipe"

# A running CRIU keeps the files it has open; whoever starts next finds the new prefix.
old=
if [ -e "$prefix" ]; then
    old=$(mktemp -d "$prefix.old.XXXXXX")
    mv "$prefix" "$old/"
fi
mv "$new" "$prefix"
trap - EXIT
[ -z "$old" ] || rm -rf "$old"
say "CRIU $version is at $prefix/criu"
