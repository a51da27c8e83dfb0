# SPDX-License-Identifier: Apache-2.0
# Sourced by the tests of this folder: a group of hosts of their own, gone when the test ends,
# however it ends. A machine that does not permit hosts gets one line, and the test has passed: that
# hosts.sh says so is what can be tested there.
# shellcheck shell=bash
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
tools=${NEP_BIN:-$here/../../build/bin}
unset NEP_BIN
export HOSTS_GROUP=nep$$
hosts() { "$here/hosts.sh" "$@"; }

work=$(mktemp -d)
finish() {
    local status=$?
    trap - EXIT
    hosts down
    rm -rf "$work"
    exit "$status"
}
trap finish EXIT
trap 'exit 130' INT TERM HUP

refused() { # the reason
    echo "not run: $1"
    exit 0
}
reason=$(hosts check) || refused "$reason"

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# Waits, at most so many seconds, until the command succeeds.
within() { # SECONDS COMMAND...
    local end=$((SECONDS + $1))
    shift
    until "$@"; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.05
    done
}

number() { # FILE KEY: a number of a JSON object
    python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))[sys.argv[2]])' "$1" "$2"
}
