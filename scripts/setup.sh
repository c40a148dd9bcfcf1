#!/usr/bin/env bash
# Makes a Debian 12 or 13 machine ready for godwit. Idempotent; with everything in place it
# only looks (well under two seconds) and asks no server. The arguments are those of ./dev, for
# messages that say what to run.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

packages=(
    iproute2 nftables                                   # links, firewall
    busybox-static mmdebstrap umoci skopeo xz-utils     # building images
    docker-registry apache2-utils                       # a real registry, with authentication, to pull from
    redis-server redis-tools nginx-light postgresql     # workloads and their clients (pgbench is in postgresql)
    gcc libc6-dev pkg-config                            # building the bundled SQLite and crypto
    curl ca-certificates debian-archive-keyring
)
# What godwit is compared with, and how fast the link is: for ./dev bench only.
[ "${1:-}" != bench ] || packages+=(runc iperf3 python3 util-linux)
case "${1:-}" in compat | soak) packages+=(python3) ;; esac
# Packages that would start a service, and the service.
services=(redis-server:redis-server nginx-light:nginx postgresql:postgresql docker-registry:docker-registry)

[ "$(id -u)" = 0 ] || die "not root: namespaces, mounts and network links need it; run: sudo ./dev ${*:-setup}"

kernel=$(uname -r)
at_least "${kernel%%-*}" 5.19 \
    || die "Linux $kernel is older than 5.19: image layers cannot be shown to containers with their own ids; install the distribution's newer kernel (on Debian 11: from bullseye-backports), reboot, run ./dev ${*:-setup}"

# One set-up at a time; a second one waits and then finds everything done.
exec 9>/run/lock/godwit-setup.lock
flock 9

check_rust() {
    local need have
    need=$(sed -n 's/^rust-version *= *"\(.*\)"/\1/p' Cargo.toml)
    command -v cargo >/dev/null 2>&1 \
        || die "no Rust toolchain: godwit is built from source; get one with: curl -sSf https://sh.rustup.rs | sh -s -- -y --default-toolchain stable"
    have=$(cargo --version | awk '{ print $2 }')
    at_least "${have%%-*}" "$need" \
        || die "Rust $have is older than $need, which Cargo.toml asks for; get it with: rustup update stable && rustup default stable"
}

install_packages() {
    local missing=() fresh=() name entry log rc=0
    for name in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null || true) in
            installed) ;;
            *) missing+=("$name") ;;
        esac
    done
    [ ${#missing[@]} -gt 0 ] || return 0
    say "installing ${missing[*]}"
    apt-get update -qq </dev/null >&2
    log=$(mktemp)

    # No service may start by being installed. A policy that is already there is the machine's own and stays.
    local policy=/usr/sbin/policy-rc.d made=
    if [ ! -e $policy ]; then
        made=$policy
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
    fi
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >"$log" 2>&1 || rc=$?
    [ -z "$made" ] || rm -f "$made"
    [ $rc = 0 ] || tail -n 30 "$log" >&2
    rm -f "$log"
    [ $rc = 0 ] || die "apt-get could not install ${missing[*]} (its message is above); put that right and run ./dev setup again"

    # Nor at the next boot, if it was we who brought it.
    for entry in "${services[@]}"; do
        for name in "${missing[@]}"; do
            [ "$name" != "${entry%%:*}" ] || fresh+=("${entry##*:}")
        done
    done
    if [ ${#fresh[@]} -gt 0 ] && command -v systemctl >/dev/null 2>&1; then
        systemctl disable --quiet "${fresh[@]}" >/dev/null 2>&1 \
            || say "could not disable ${fresh[*]}; they may start at the next boot"
    fi
}

set_sysctl() { # NAME VALUE WHY
    local path=/proc/sys/${1//./\/}
    [ -e "$path" ] || return 0 # this kernel has no such limit
    [ "$(cat "$path")" != "$2" ] || return 0
    printf '%s' "$2" 2>/dev/null >"$path" \
        || die "cannot set $1=$2 ($3); set it where this machine's kernel can be configured: sysctl -w $1=$2"
    say "set $1=$2"
}

check_rust
# On kernels from 6.16 a TCP socket refuses an option that CRIU before 4.2 asks of every socket: no server could move.
criu_suite=trixie
! at_least "$(uname -r | cut -d- -f1)" 6.16 || criu_suite=forky
case $(os_field ID)-$(os_field VERSION_ID) in
    debian-12)
        install_packages "${packages[@]}"
        scripts/criu.sh /opt/godwit/criu $criu_suite # Debian 12's own CRIU is too old
        ;;
    debian-13)
        if [ $criu_suite = trixie ]; then
            install_packages "${packages[@]}" criu
        else
            install_packages "${packages[@]}"
            scripts/criu.sh /opt/godwit/criu $criu_suite # so is Debian 13's for this kernel
        fi
        ;;
    *)
        say "$(os_field PRETTY_NAME) is neither Debian 12 nor 13: nothing is installed here; 'godwit doctor' tells what is missing"
        ;;
esac
set_sysctl fs.pipe-user-pages-soft 0 "CRIU holds many large pipes during a dump"
set_sysctl vm.unprivileged_userfaultfd 1 "memory is filled in behind a restored container's user namespace"
