# Tests of an installed Slipway in the guest "systemd", one command each. Sourced; $suite is the name that they
# are told under.
# shellcheck shell=bash
passed=0 failed=0

# expect WHAT COMMAND...: one test; what the command says is shown when it fails.
expect() {
    local what=$1 output
    shift
    if output=$("$@" 2>&1); then
        passed=$((passed + 1))
        printf 'ok      %s::%s\n' "$suite" "$what"
    else
        failed=$((failed + 1))
        printf 'failed  %s::%s\n%s\n' "$suite" "$what" "$output"
        journalctl --no-pager -n 20 -u slipway
        printf 'FAILED  %s::%s\n' "$suite" "$what"
    fi
}

# totals: the last line, and whether all is well.
totals() {
    printf '%d passed, %d failed, 0 skipped\n' $passed $failed
    [ $failed = 0 ]
}

# has WORD COMMAND...: the command's output has the word in it.
has() {
    local word=$1 output
    shift
    output=$("$@" 2>&1)
    [[ $output == *"$word"* ]] || { printf '%s: no %s in: %s\n' "$*" "$word" "$output"; return 1; }
}

# Process ids of the keepers that there are.
keepers() {
    local pid
    for pid in $(cat /sys/fs/cgroup/system.slice/slipway-keepers.scope/cgroup.procs 2>/dev/null); do
        [[ $(cat "/proc/$pid/comm" 2>/dev/null) != slipway:* ]] || printf '%s\n' "$pid"
    done
}

# Exactly this keeper is there, in the scope of keepers, and nobody but the daemon is in the service's cgroup.
keeper_is() {
    [ -n "$1" ] && [ "$(keepers)" = "$1" ] || { printf 'keeper %s, found %s\n' "$1" "$(keepers)"; return 1; }
    local pid
    for pid in $(cat /sys/fs/cgroup/system.slice/slipway.service/cgroup.procs 2>/dev/null); do
        [ "$pid" = "$(main_pid)" ] || { printf '%s is in the service: %s\n' "$pid" "$(cat "/proc/$pid/comm")"; return 1; }
    done
}

pods() { slipway pods 2>&1 | grep -c Ready || true; }
main_pid() { systemctl show -P MainPID slipway; }
pod_runs() { [ "$(pods)" = 1 ] || { slipway pods; return 1; }; }
