#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# nep-perf put without any device: every transport of this machine, both tests, server and client
# apart, columns, JSON, and what it refuses. usage: test_put.sh NEP_PERF
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
perf=$1
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT

for transport in shm ucx; do
    for test in --bw --lat; do
        for mode in "" --write-imm; do
            # shellcheck disable=SC2086
            "$perf" put --ranks 2 --transport $transport $test $mode --iters 200 --verify \
                --json "$out/json" >"$out/text" 2>"$out/error"
            check "$transport $test $mode" 0 $?
            [ ! -s "$out/error" ] || cat "$out/error"
            check "  all bytes are right" 1 "$(grep -c '"wrong": 0}' "$out/json")"
        done
    done
done
check "columns of ib_write_lat" 1 "$(grep -c 't_typical\[usec\].*99.9% percentile\[usec\]' "$out/text")"
"$perf" put --ranks 2 --transport shm --all --iters 20 >"$out/text"
check "all sizes" 23 "$(grep -cE '^ [0-9]+ +20 ' "$out/text")"
check "columns of ib_write_bw" 1 "$(grep -c 'BW peak.*BW average.*MsgRate\[Mpps\]' "$out/text")"

"$perf" put --port 0 --transport shm --size 4096 --iters 50 >"$out/server" 2>&1 &
server=$!
port=''
tries=0
while [ -z "$port" ] && [ $tries -lt 600 ]; do
    sleep 0.1
    tries=$((tries + 1))
    port=$(sed -n 's/.*(port \([0-9]*\)).*/\1/p' "$out/server")
done
"$perf" put --port "$port" --transport shm --size 4096 --iters 50 --json - localhost >"$out/json"
check "client" 0 $?
wait $server
check "server" 0 $?
check "one JSON object" 1 "$(grep -c '^{"test": "bw".*}$' "$out/json")"

for bad in "--size 0" "--size 8388609" "--iters x" "--ranks 3" "--nothing" "a b" "--json"; do
    # shellcheck disable=SC2086
    "$perf" put $bad >/dev/null 2>"$out/error"
    check "refused: $bad" 2 $?
    check "  one line" 1 "$(wc -l <"$out/error")"
done
if ! ls /sys/class/infiniband/* >/dev/null 2>&1; then
    timeout 60 "$perf" put --ranks 2 --transport verbs 2>&1 | head -n 1
    timeout 60 "$perf" put --ranks 2 --transport verbs >/dev/null 2>&1
    check "verbs without a device is refused" 1 $?
fi
finish
