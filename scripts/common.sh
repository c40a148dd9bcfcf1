# Shared by ./dev and its parts. To be sourced, not run.

# Messages go to stderr: stdout belongs to data.
say() { printf 'dev: %s\n' "$*" >&2; }
die() { printf 'dev: error: %s\n' "$*" >&2; exit 1; }

# rustup's own directory is not in the PATH of non-login shells.
command -v cargo >/dev/null 2>&1 || PATH=$PATH:${CARGO_HOME:-$HOME/.cargo}/bin
# Under sudo the toolchain is the one of the person who called it.
caller_home=$(getent passwd "${SUDO_USER:-root}" | cut -d: -f6)
if ! command -v cargo >/dev/null 2>&1 && [ -x "$caller_home/.cargo/bin/cargo" ]; then
    PATH=$PATH:$caller_home/.cargo/bin
    export RUSTUP_HOME=${RUSTUP_HOME:-$caller_home/.rustup}
fi
# Daemons and network tools live in sbin, which is not in every root shell's PATH.
PATH=$PATH:/usr/sbin:/sbin
export PATH

# Reads a field of /etc/os-release: os_field VERSION_ID → 12. Empty where absent.
os_field() { (
    # shellcheck disable=SC1091
    . /etc/os-release 2>/dev/null || true
    eval "printf '%s' \"\${$1:-}\""
); }

# True if version $1 is at least version $2.
at_least() { [ "$(printf '%s\n%s\n' "$2" "$1" | sort -V | head -n1)" = "$2" ]; }

# Lists "URI SUITE" of the Debian archives this machine itself uses: main, updates, security.
debian_archives() {
    local found
    found=$(archives_in_index)
    if [ -z "$found" ]; then
        apt-get update -qq </dev/null >&2
        found=$(archives_in_index)
    fi
    [ -n "$found" ] || die "no Debian archive among this machine's apt sources; add Debian's 'main' to /etc/apt/sources.list.d"
    printf '%s\n' "$found"
}
archives_in_index() {
    # shellcheck disable=SC2016  # apt expands these, not the shell
    apt-get indextargets --format '$(REPO_URI) $(RELEASE) $(COMPONENT) $(ORIGIN)' 'Identifier: Packages' \
        | awk '$3 == "main" && $4 == "Debian" { print $1, $2 }' | sort -u
}
# The main archive's address: of its suites the one with neither -security nor -updates in its name.
debian_mirror() { debian_archives | awk '$2 !~ /[-\/]/ { print $1; exit }'; }
