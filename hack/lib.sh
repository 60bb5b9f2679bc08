# Shared by the scripts in hack/ and integration/; sourced, never run.
# shellcheck shell=bash

repo=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cache="$repo/hack/.cache"

say() { printf '\033[1m==> %s\033[0m\n' "$*" >&2; }
die() { printf '%s: %s\n' "$(basename "$0")" "$*" >&2; exit 1; }

need_root() {
    [ "$(id -u)" = 0 ] || die "needs root (namespaces, mounts, cgroups): run it with sudo"
}

# Installs Debian packages that are missing, without letting one of them start a daemon.
apt_install() {
    local missing=() package status
    for package in "$@"; do
        status=$(dpkg-query -W -f '${db:Status-Status}' "$package" 2>/dev/null || true)
        [ "$status" = installed ] || missing+=("$package")
    done
    [ ${#missing[@]} = 0 ] && return 0
    command -v apt-get >/dev/null || die "this is no Debian; install these yourself: ${missing[*]}"
    need_root
    say "installing Debian packages: ${missing[*]}"
    # Exit code 101 of policy-rc.d: services must not be started.
    local policy=/usr/sbin/policy-rc.d ours=
    if [ ! -e $policy ]; then
        printf '#!/bin/sh\nexit 101\n' >$policy
        chmod 755 $policy
        ours=1
    fi
    local failed=
    DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2 ||
        { apt-get -qq update >&2 && DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >&2; } ||
        failed=1
    [ -z "$ours" ] || rm -f $policy
    [ -z "$failed" ] || die "apt-get could not install: ${missing[*]}"
}

# True when cargo is there and new enough for the workspace.
cargo_fits() {
    command -v cargo >/dev/null || return 1
    local have want
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml" | head -n1)
    have=$(cd "$repo" && cargo --version 2>/dev/null | cut -d' ' -f2)
    [ -n "$have" ] && [ "$(printf '%s\n%s\n' "$want" "$have" | sort -V | head -n1)" = "$want" ]
}

# Finds a Rust toolchain that fits, gets one through rustup if Debian has that, or says what to do.
need_cargo() {
    [ ! -d "$HOME/.cargo/bin" ] || PATH="$HOME/.cargo/bin:$PATH"
    cargo_fits && return 0
    local want
    want=$(sed -n 's/^rust-version = "\(.*\)"/\1/p' "$repo/Cargo.toml" | head -n1)
    if ! command -v rustup >/dev/null && [ -n "$(apt-cache madison rustup 2>/dev/null)" ]; then
        apt_install rustup
    fi
    if command -v rustup >/dev/null; then
        say "installing the stable Rust toolchain with rustup"
        rustup toolchain install stable --profile minimal -c clippy -c rustfmt >&2 && rustup default stable >&2 || true
        cargo_fits && return 0
    fi
    cat >&2 <<END
Slipway needs Rust $want or newer, and Debian 12's own is older. Install it with

    curl --proto '=https' --tlsv1.2 -sSf https://sh.rustup.rs | sh -s -- -y --profile minimal -c clippy -c rustfmt

(or any other way that puts cargo into the PATH), then run this command again.
END
    exit 1
}

# Ends a process that we started: SIGTERM, then SIGKILL once five seconds have passed.
end_process() {
    local pid=$1 i
    [ -n "$pid" ] && kill "$pid" 2>/dev/null || return 0
    for ((i = 0; i < 50; i++)); do
        kill -0 "$pid" 2>/dev/null || { wait "$pid" 2>/dev/null || true; return 0; }
        sleep 0.1
    done
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
}

