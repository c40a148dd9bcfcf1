#!/usr/bin/env bash
# Builds OCI image layouts from Debian packages: .images/{redis,postgresql,nginx,busybox}, tag "latest".
# redis, postgresql and nginx are one common base layer (Debian's essential packages) plus one
# layer each. Nothing is built again until this script or scripts/images/ changes.
#
# Maintainer scripts run chrooted, without any mount and with no service started, so clearing a
# build directory can never reach beyond it.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

[ "$(id -u)" = 0 ] || die "not root: images are built by running package scripts in a chroot; run: sudo ./dev images"
suite=$(os_field VERSION_CODENAME)
mkdir -p .images
exec 9>.images/lock
flock 9
stamp="$suite $(cat scripts/images.sh scripts/images/* | sha256sum | cut -d' ' -f1)"
if [ "$(cat .images/stamp 2>/dev/null || true)" = "$stamp" ]; then
    exit 0
fi
for tool in mmdebstrap umoci busybox; do
    command -v $tool >/dev/null 2>&1 || die "$tool is missing: images are built from Debian packages with it; run ./dev setup on Debian 12 or 13"
done

say "building images of Debian $suite in .images/"
rm -rf .images/.build.* # of a run that was killed
build=$PWD/$(mktemp -d .images/.build.XXXXXX)
trap 'rm -rf "$build"' EXIT
chmod 755 "$build"
mkdir -p "$build"/{apt/lists/partial,apt/cache/archives/partial,sources}
debian_archives | while read -r uri name; do
    printf 'deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] %s %s main\n' "$uri" "$name"
done >"$build/sources/debian.list"

# What no container needs: documentation, translations, the LLVM behind PostgreSQL's optional JIT.
left_out=(
    '/usr/share/doc/*' '/usr/share/man/*' '/usr/share/info/*' '/usr/share/locale/*' '/usr/share/lintian/*'
    '/usr/lib/*/libLLVM*' '/usr/lib/llvm-*' '/usr/lib/*/libz3.so*'
    '/usr/lib/postgresql/*/lib/bitcode/*' '/usr/lib/postgresql/*/lib/llvmjit*'
)

# Builds the base layer: layout $build/base.
build_base() {
    local opts=() path
    for path in "${left_out[@]}"; do opts+=(--dpkgopt="path-exclude=$path"); done
    mmdebstrap --quiet --variant=essential --format=tar --skip=output/dev \
        --aptopt='APT::Install-Recommends "false"' "${opts[@]}" \
        --customize-hook='rm -rf "$1"/var/cache/debconf/*-old "$1"/var/lib/dpkg/*-old "$1"/etc/hostname "$1"/etc/resolv.conf "$1"/etc/machine-id' \
        "$suite" "$build/base.tar" "$build/sources/debian.list"
    umoci init --layout "$build/base"
    umoci new --image "$build/base:latest"
    umoci raw add-layer --image "$build/base:latest" --history.created_by "mmdebstrap $suite" "$build/base.tar"
    rm "$build/base.tar"
    umoci gc --layout "$build/base"
}

# This machine's way to the archive (proxies), but none of its hooks; lists and downloads of our own.
{
    apt-config dump | grep '^Acquire::' || true
    cat <<TEXT
Acquire::Languages "none";
Acquire::Retries "3";
APT::Install-Recommends "false";
APT::Sandbox::User "root";
Debug::NoLocking "1";
Dir::Etc::Main "/dev/null";
Dir::Etc::Parts "/dev/null";
Dir::Etc::SourceList "/dev/null";
Dir::Etc::SourceParts "$build/sources";
Dir::Log "$build/apt";
Dir::State::Lists "$build/apt/lists";
Dpkg::Use-Pty "0";
TEXT
} >"$build/apt.conf"

# Reads the package lists, once for all images.
read_lists() { APT_CONFIG=$build/apt.conf apt-get -qq -o Dir::State::Status=/dev/null -o Dir::Cache="$build/apt/cache" update </dev/null; }

# apt and dpkg of this machine working on the root file system at $1; package scripts run chrooted in it.
apt_in() {
    local root=$1 path opts=() cache=${1%/rootfs}.apt # images are built at the same time: no common cache
    mkdir -p "$cache/archives/partial"
    shift
    for path in "${left_out[@]}"; do opts+=(-o "DPkg::Options::=--path-exclude=$path"); done
    APT_CONFIG=$build/apt.conf DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8 apt-get -qq -y \
        -o Dir::Cache="$cache" -o Dir::State="$root/var/lib/apt" -o Dir::State::Lists="$build/apt/lists" \
        -o Dir::State::Status="$root/var/lib/dpkg/status" "${opts[@]}" \
        -o DPkg::Options::="--root=$root" -o DPkg::Options::=--log=/dev/null \
        -o DPkg::Options::=--force-confold "$@" </dev/null
}

# Starts image $1 as a copy of the base and unpacks it: root file system $build/$1.bundle/rootfs.
# Blobs never change, so the layouts share them; the index does.
unpack_base() {
    mkdir "$build/$1"
    cp -a "$build/base/index.json" "$build/base/oci-layout" "$build/$1/"
    cp -al "$build/base/blobs" "$build/$1/"
    umoci unpack --image "$build/$1:latest" "$build/$1.bundle"
}

# Installs packages into image $1.
install_in() {
    local root=$build/$1.bundle/rootfs
    shift
    mkdir -p "$root/dev" "$root/var/lib/apt"
    mknod -m 666 "$root/dev/null" c 1 3
    mknod -m 666 "$root/dev/zero" c 1 5
    mknod -m 666 "$root/dev/urandom" c 1 9
    printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
    chmod 755 "$root/usr/sbin/policy-rc.d"
    apt_in "$root" install "$@"
    rm -rf "$root"/dev/{null,zero,urandom} "$root/usr/sbin/policy-rc.d" "$root/var/lib/apt" \
        "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/log/* "$root"/etc/ssl/private/*
}

# Turns what was done in image $1's root file system into its layer and sets its configuration.
finish() {
    local name=$1
    shift
    umoci repack --image "$build/$name:latest" --history.created_by "$name of Debian $suite" "$build/$name.bundle"
    rm -rf "$build/$name.bundle"
    umoci config --image "$build/$name:latest" --author "Godwit" --config.workingdir / "$@"
    umoci gc --layout "$build/$name"
}

build_redis() {
    local root=$build/redis.bundle/rootfs
    unpack_base redis
    install_in redis redis-server
    install -m 755 scripts/images/redis-entrypoint "$root/usr/local/bin/redis-entrypoint"
    chroot "$root" install -d -o redis -g redis -m 750 /data
    finish redis --config.user redis --config.volume /data --config.workingdir /data \
        --config.exposedports 6379/tcp --config.env "PATH=$path" \
        --config.entrypoint redis-entrypoint --config.cmd redis-server
}

build_postgresql() {
    local root=$build/postgresql.bundle/rootfs bin data=/var/lib/postgresql/data
    unpack_base postgresql
    # The package would make a cluster of its own, which belongs to no image.
    mkdir -p "$root/etc/postgresql-common"
    printf 'create_main_cluster = false\n' >"$root/etc/postgresql-common/createcluster.conf"
    install_in postgresql postgresql
    install -m 755 scripts/images/postgresql-entrypoint "$root/usr/local/bin/postgresql-entrypoint"
    chroot "$root" install -d -o postgres -g postgres -m 700 $data
    chroot "$root" install -d -o postgres -g postgres -m 2775 /run/postgresql
    bin=$(cd "$root" && echo usr/lib/postgresql/*/bin)
    finish postgresql --config.user postgres --config.volume $data \
        --config.exposedports 5432/tcp --config.stopsignal SIGINT \
        --config.env "PATH=/$bin:$path" --config.env PGDATA=$data --config.env LANG=C.UTF-8 \
        --config.entrypoint postgresql-entrypoint --config.cmd postgres
}

build_nginx() {
    local root=$build/nginx.bundle/rootfs
    unpack_base nginx
    install_in nginx nginx
    install -m 644 scripts/images/nginx.conf "$root/etc/nginx/nginx.conf"
    install -m 644 scripts/images/index.html "$root/usr/share/nginx/html/index.html"
    rm -rf "$root/etc/nginx/sites-enabled" "$root/etc/nginx/sites-available" "$root/var/www/html"
    chroot "$root" install -d -m 755 /var/log/nginx /srv
    # Made here with their owner, so that the server needs no right to change owners.
    chroot "$root" install -d -o www-data -g root -m 700 /var/lib/nginx/{body,proxy,fastcgi,uwsgi,scgi}
    finish nginx --config.exposedports 80/tcp --config.stopsignal SIGQUIT --config.env "PATH=$path" \
        --config.cmd nginx --config.cmd -g --config.cmd 'daemon off;'
}

build_busybox() {
    local root=$build/busybox.root applet
    mkdir -p "$root"/{bin,sbin,usr/bin,usr/sbin,etc,root,home,var/log,var/spool,run,proc,sys,dev,tmp,mnt}
    chmod 700 "$root/root"
    chmod 1777 "$root/tmp"
    install -m 755 "$(command -v busybox)" "$root/bin/busybox"
    "$root/bin/busybox" --list-full | while read -r applet; do
        [ -e "$root/$applet" ] || ln -s /bin/busybox "$root/$applet"
    done
    printf 'root:x:0:0:root:/root:/bin/sh\ndaemon:x:1:1:daemon:/usr/sbin:/bin/false\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n' >"$root/etc/passwd"
    printf 'root:x:0:\ndaemon:x:1:\nnogroup:x:65534:\n' >"$root/etc/group"
    printf 'hosts: files dns\n' >"$root/etc/nsswitch.conf"
    tar --create --numeric-owner --owner=0 --group=0 --sort=name --directory "$root" --file "$build/busybox.tar" .
    umoci init --layout "$build/busybox"
    umoci new --image "$build/busybox:latest"
    umoci raw add-layer --image "$build/busybox:latest" --history.created_by "busybox of Debian $suite" "$build/busybox.tar"
    umoci config --image "$build/busybox:latest" --author "Godwit" --config.workingdir / \
        --config.env "PATH=$path" --config.cmd sh
    umoci gc --layout "$build/busybox"
}

# Runs a step with its talk in a log that is shown only if the step fails. In the background,
# because errexit would be off inside a command whose result is asked for.
step() {
    ( set -e; "$@" ) >"$build/$1.log" 2>&1 &
    if wait $!; then return 0; fi
    tail -n 40 "$build/$1.log" >&2
    die "$1 failed (its last lines are above); a network problem goes away with another ./dev images"
}

path=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
step read_lists &
lists=$!
step build_base
wait $lists
pids=()
for name in redis postgresql nginx busybox; do
    step "build_$name" &
    pids+=($!)
done
failed=
for pid in "${pids[@]}"; do wait "$pid" || failed=1; done
[ -z "$failed" ] || exit 1

rm -f .images/stamp
for name in redis postgresql nginx busybox; do
    rm -rf ".images/$name"
    mv "$build/$name" ".images/$name"
done
printf '%s\n' "$stamp" >.images/stamp
say "images are in .images/: redis postgresql nginx busybox"
