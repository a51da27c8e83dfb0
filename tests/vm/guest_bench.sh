#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Inside the guest: nep-perf put beside perftest, plain writes, same size, depth and signalling, in
# alternating runs; medians and ratios. Figures of an emulated processor: good for the ratio alone.
# usage: guest_bench.sh BUILD_BIN [RUNS] [MESSAGES]
set -u
bin=$1
runs=${2:-9} messages=${3:-500}
export NEP_VERBS_ACK_TIMEOUT=16 NEP_VERBS_RETRY=6

perftest() { # perftest TOOL OPTIONS...: the line with the figures
    tool=$1
    shift
    timeout 40 "$tool" -d rxe0 -x 1 -u 16 -F "$@" >/dev/null 2>&1 &
    sleep 1
    timeout 30 "$tool" -d rxe1 -x 1 -u 16 -F "$@" 10.9.0.1 2>/dev/null | grep -E '^ *[0-9]+ +[0-9]+ '
    wait
}

median() {
    sort -n | awk '{ value[NR] = $1 } END { print NR ? value[int((NR + 1) / 2)] : "none" }'
}

ours_bw='' theirs_bw='' ours_lat='' theirs_lat=''
i=0
while [ $i -lt "$runs" ]; do
    i=$((i + 1))
    echo "run $i, $(cut -d' ' -f1 /proc/uptime) s"
    theirs_bw="$theirs_bw $(perftest ib_write_bw -s 65536 -n "$messages" -t 16 -Q 1 |
        awk '{ print $4 }')"
    ours_bw="$ours_bw $(timeout 40 "$bin/nep-perf" put --ranks 2 --transport verbs --size 65536 \
        --iters "$messages" --depth 16 | awk '/^ 65536/ { print $4 }')"
    theirs_lat="$theirs_lat $(perftest ib_write_lat -s 2 -n "$messages" | awk '{ print $5 }')"
    ours_lat="$ours_lat $(timeout 40 "$bin/nep-perf" put --ranks 2 --transport verbs --lat \
        --size 2 --iters "$messages" | awk '/^ 2 / { print $5 }')"
done
for what in bw lat; do
    for who in ours theirs; do
        eval "values=\$${who}_$what"
        # shellcheck disable=SC2154,SC2086
        echo "$what $who:$values; median $(printf '%s\n' $values | median)"
        # shellcheck disable=SC2086
        eval "$who=$(printf '%s\n' $values | median)"
    done
    # shellcheck disable=SC2154
    awk -v ours="$ours" -v theirs="$theirs" -v what="$what" \
        'BEGIN { printf "%s: ours %s, perftest %s, ratio %.2f\n", what, ours, theirs, ours / theirs }'
done
