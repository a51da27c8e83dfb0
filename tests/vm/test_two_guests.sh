#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Two guests, two kernels, one wire: nep-perf put between them. The working directory is the build
# tree.
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
vm_or_refusal
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
put="$PWD/bin/nep-perf put --transport verbs --size 4096 --iters 100 --depth 4 --verify --write-imm"
env="NEP_VERBS_ACK_TIMEOUT=18"

# shellcheck disable=SC2086
"$here/nep-vm" -n 0 -s 1 -m 1G -t 150 -L "$out/wire" -i 1 -e $env -e NEP_TIMEOUT=100s -- \
    $put >"$out/server" 2>&1 &
server=$!
waited=0
while [ ! -S "$out/wire" ] && [ $waited -lt 100 ]; do
    sleep 0.1
    waited=$((waited + 1))
done
# shellcheck disable=SC2086
"$here/nep-vm" -n 0 -s 1 -m 1G -t 150 -L "$out/wire" -i 2 -e $env -e NEP_TIMEOUT=100s -- \
    $put 10.8.0.1 >"$out/client" 2>&1
check "client guest" 0 $?
wait $server
check "server guest" 0 $?
check "all bytes are right" 1 "$(grep -c 'verified: 262144 bytes of 64 messages, 0 wrong' "$out/client")"
[ "$num_failed" -eq 0 ] || cat "$out/server" "$out/client"
finish
