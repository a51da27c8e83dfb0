#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# nep-vm itself: what comes back from a guest that works, fails, hangs or dies.
set -u
here=$(cd "$(dirname "$0")" && pwd)
. "$here/lib.sh"
vm_or_refusal
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

"$here/nep-vm" -n 4 -w "$out" -- sh -c \
    'echo out; echo err >&2; ls /sys/class/infiniband >"$0/devices"; echo x >/tmp/nep-vm-leak; exit 42' \
    "$out" >"$out/stdout" 2>"$out/stderr"
check "exit status of the command" 42 $?
check "standard output" out "$(cat "$out/stdout")"
check "standard error" err "$(cat "$out/stderr")"
check "devices, through the shared folder" "rxe0 rxe1 rxe2 rxe3" "$(tr '\n' ' ' <"$out/devices" | sed 's/ $//')"
check "nothing else is written on the host" absent "$([ -e /tmp/nep-vm-leak ] && echo present || echo absent)"

"$here/nep-vm" -n 0 -t 12 -- sleep 60 2>"$out/stderr"
check "a hang" 124 $?
"$here/nep-vm" -n 0 -- sh -c 'echo c >/proc/sysrq-trigger; sleep 5' 2>"$out/stderr"
check "a dead kernel" 125 $?
check "its console is shown" 1 "$(grep -c 'Kernel panic' "$out/stderr")"
finish
