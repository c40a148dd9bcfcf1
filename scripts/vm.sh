#!/usr/bin/env bash
# Runs tests in a virtual machine with a stock Debian kernel and cgroup v2, emulated, so that it needs
# neither KVM nor anything of this machine's kernel:
#
#   vm.sh [--kernel 6.12|6.1] [CARGO TEST ARGUMENTS] [-- TEST ARGUMENTS]
#
# 6.12 is Debian 13's kernel, 6.1 is Debian 12's: soft-dirty tracking, but no PAGEMAP_SCAN.
# Tests are built here. The executables, the sources' other files and the private CRIU go in by a
# disk that is a tar archive, under the same paths; what is written inside is lost at the end.
# GODWIT_VM_TIMEOUT_S (default 900) ends it, GODWIT_VM_MEMORY_MIB (3072) is what it has,
# GODWIT_VM_RUN is a shell command that runs inside instead of all tests, with `godwit` in its PATH, and
# `run NAME [TEST ARGUMENTS]` for the tests of one executable.
set -euo pipefail
cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/.."
# shellcheck source=scripts/common.sh
. scripts/common.sh

timeout_s=${GODWIT_VM_TIMEOUT_S:-900}
memory_mib=${GODWIT_VM_MEMORY_MIB:-3072}
kernel=6.12
if [ "${1:-}" = --kernel ]; then
    kernel=${2:-}
    shift $(($# > 1 ? 2 : 1))
fi
case $kernel in
    6.12) suite=trixie vm=$PWD/.images/vm ;;
    6.1) suite=bookworm vm=$PWD/.images/vm-6.1 ;;
    *) die "no virtual machine has kernel '$kernel'; there are 6.12 (Debian 13) and 6.1 (Debian 12)" ;;
esac
criu=/opt/godwit/criu
[ "$(id -u)" = 0 ] || die "not root: the virtual machine's disk is made of root's files; run: sudo ./dev vm $*"
[ -x $criu/criu ] || scripts/criu.sh $criu trixie

mkdir -p .images
exec 9>.images/vm.lock
flock 9
scripts/vm-image.sh "$vm" $suite 9>&-
exec 9>&-

cargo_arguments=() test_arguments=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do cargo_arguments+=("$1"); shift; done
[ $# -eq 0 ] || shift
test_arguments=("$@")
[ ${#cargo_arguments[@]} -gt 0 ] || cargo_arguments=(--package godwit-container)

run=$(mktemp -d "${TMPDIR:-/var/tmp}/godwit-vm.XXXXXX")
qemu= timer=
clean_up() {
    [ -z "$qemu" ] || kill -KILL "$qemu" 2>/dev/null || true
    [ -z "$timer" ] || kill "$timer" 2>/dev/null || true
    rm -rf "$run"
}
trap clean_up EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say "building tests: ${cargo_arguments[*]}"
cargo test --locked --no-run --message-format=json-render-diagnostics "${cargo_arguments[@]}" </dev/null >"$run/build.json"
# One object a line: executables with the directory of their package, test or program.
sed -n '/"executable":"/{
    s/.*"manifest_path":"\([^"]*\)\/Cargo.toml".*"profile":{[^}]*"test":\(true\|false\)}.*"executable":"\([^"]*\)".*/\2 \1 \3/p
}' "$run/build.json" >"$run/executables"
grep -q ^true "$run/executables" || die "no tests among: ${cargo_arguments[*]}"

stage=$run/stage
guest=$stage/godwit-vm
mkdir -p "$guest"
install -m 755 scripts/vm-guest.sh "$guest/guest.sh"
cp "$run/executables" "$guest/executables"
while read -r _ _ executable; do
    mkdir -p "$stage$(dirname "$executable")"
    strip --strip-debug -o "$stage$executable" "$executable"
done <"$run/executables"
target=$(sed -n 's/^.* \(.*\)\/debug\/.*$/\1/p' "$run/executables" | head -n 1)
mkdir -p "$stage${target:-$PWD/target}/tmp"

{
    printf 'cd %q\nexport INSTA_WORKSPACE_ROOT=%q INSTA_UPDATE=no RUST_BACKTRACE=1 RUST_TEST_THREADS=1\n' "$PWD" "$PWD"
    printf 'export GODWIT_CRIU_LOG_LEVEL=%q PATH=$PATH:%q\n' "${GODWIT_CRIU_LOG_LEVEL:-}" "${target:-$PWD/target}/debug"
    # The shell of the virtual machine expands these.
    # shellcheck disable=SC2016
    printf '%s\n' 'failed=' 'run() {
        local name=$1 test package executable; shift
        while read -r test package executable <&3; do
            case $test-${executable##*/} in true-$name-*) ;; *) continue ;; esac
            echo "vm: ${executable##*/}"
            (cd "$package" && "$executable" "$@") || failed="$failed ${executable##*/}"
        done 3</godwit-vm/executables
    }'
    if [ -n "${GODWIT_VM_RUN:-}" ]; then
        printf '%s\n' "$GODWIT_VM_RUN"
    else
        printf "run '*'"
        [ ${#test_arguments[@]} -eq 0 ] || printf ' %q' "${test_arguments[@]}"
        echo
    fi
    # shellcheck disable=SC2016
    echo '[ -z "$failed" ] || { echo "vm: failed:$failed"; exit 1; }'
} >"$guest/run.sh"

parts=(Cargo.toml Cargo.lock crates examples docs)
for name in busybox redis nginx stamp; do [ ! -e ".images/$name" ] || parts+=(".images/$name"); done
existing=()
for part in "${parts[@]}"; do [ ! -e "$part" ] || existing+=("${PWD#/}/$part"); done
tar --create --file "$run/disk.tar" --directory "$stage" . --directory / "${criu#/}" "${existing[@]}"
rm -rf "$stage"

say "booting $(basename "$(readlink -f "$vm")") with Debian's kernel, at most $timeout_s s"
mkfifo "$run/console"
: >"$run/result"
# snapshot=on: what the machine writes goes to a file that is deleted already.
TMPDIR=$run "$vm/qemu" -machine q35 -accel tcg,thread=multi -cpu max -smp 2 -m "$memory_mib" \
    -nodefaults -no-user-config -display none -no-reboot \
    -kernel "$vm/vmlinuz" \
    -append "root=PARTUUID=676f6477-01 rootwait rw console=ttyS0 console=hvc0 quiet loglevel=1 mitigations=off panic=-1 init=/usr/sbin/godwit-vm" \
    -drive "file=$vm/root.img,format=raw,if=none,id=root,snapshot=on,cache=unsafe" -device nvme,drive=root,serial=root \
    -drive "file=$run/disk.tar,format=raw,if=none,id=disk,read-only=on" -device nvme,drive=disk,serial=disk \
    -chardev "file,id=kernel,path=$run/kernel.log" -serial chardev:kernel \
    -device virtio-serial-pci \
    -chardev stdio,id=console,signal=off -device virtconsole,chardev=console \
    -chardev "file,id=result,path=$run/result" -device virtserialport,chardev=result,name=result \
    </dev/null >"$run/console" 2>"$run/qemu.log" &
qemu=$!
sed -u 's/\r$//' <"$run/console" &
output=$!
# The emulator's own end, or the time's; whichever is first.
waited=0
( exec sleep "$timeout_s" ) &
timer=$!
wait -n "$qemu" "$timer" || true
kill "$timer" 2>/dev/null || waited=1
timer=
kill -KILL "$qemu" 2>/dev/null || true
wait "$qemu" 2>/dev/null || true
qemu=
wait "$output" || true

code=$(tr -dc 0-9 <"$run/result")
if [ -z "$code" ]; then
    tail -n 20 "$run/kernel.log" "$run/qemu.log" >&2 || true
    [ "$waited" = 0 ] || die "the virtual machine was not done after $timeout_s s; more: GODWIT_VM_TIMEOUT_S"
    die "the virtual machine ended without a result (the last words of kernel and emulator are above)"
fi
exit "$code"
