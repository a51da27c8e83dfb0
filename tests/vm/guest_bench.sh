#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Inside the guest: nep-perf put beside perftest, plain writes, same size, depth and signalling, in
# alternating runs; the results as one line of JSON, read by scripts/bench.sh. Figures of an
# emulated processor: good for the ratio alone. Each side, of either program, has a CPU of its own:
# where the scheduler puts both on one, a message costs a tick of 4 ms.
# Latency is measured over ten times as many messages: a median of 300 round trips, 7 ms in all, is
# that of one stretch of the scheduler.
# usage: guest_bench.sh BUILD_BIN [RUNS] [MESSAGES]
set -u
bin=$1
runs=${2:-9} messages=${3:-500}
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=6

sides() { # sides HOST COMMAND...: as the server, then as the client, which prints
    host=$1
    shift
    timeout 40 taskset -c 0 "$@" >/dev/null 2>&1 &
    sleep 0.7
    # shellcheck disable=SC2086
    timeout 30 taskset -c 1 "$@" $client $host 2>/dev/null | grep -E '^ *[0-9]+ +[0-9]+ '
    wait
}

perftest() { # perftest TOOL OPTIONS...: one measurement of perftest
    tool=$1
    shift
    client="-d rxe1" # the last -d counts
    sides 10.9.0.1 "$tool" -x 1 -u 16 -F "$@" -d rxe0
}

ours() { # ours OPTIONS...
    client=
    sides 127.0.0.1 "$bin/nep-perf" put --transport verbs --iters "$messages" "$@"
}

lists=''
i=0
while [ $i -lt "$runs" ]; do
    i=$((i + 1))
    echo "run $i, $(cut -d' ' -f1 /proc/uptime) s" >&2
    perftest ib_write_bw -s 65536 -n "$messages" -t 16 -Q 1 | awk '{ print $4 }' >>/run/bw.theirs
    ours --size 65536 --depth 16 | awk '{ print $4 }' >>/run/bw.ours
    perftest ib_write_lat -s 2 -n $((10 * messages)) | awk '{ print $5 }' >>/run/lat.theirs
    ours --lat --size 2 --iters $((10 * messages)) | awk '{ print $5 }' >>/run/lat.ours
done
for what in bw lat; do
    for who in ours theirs; do
        values=$(tr '\n' ',' <"/run/$what.$who")
        lists="$lists, \"${what}_$who\": [${values%,}]"
    done
done
echo "{\"runs\": $runs, \"messages\": $messages$lists}"
