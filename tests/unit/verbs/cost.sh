#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Instructions that a tile costs in the verbs transport, counted by callgrind around the calls of
# libibverbs, which are not counted. Instructions are no times: the same everywhere, so a test may
# hold them to a limit: 2000 for a tile, also for one that is split over four queue pairs.
# usage: cost.sh COST_VERBS [LIMIT]
set -u
program=$1
limit=${2:-2000}
if ! command -v valgrind >/dev/null; then
    echo "verbs cost: not counted, valgrind is not installed (apt-get install valgrind)"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
wrong=0

count() { # count FUNCTION DEVICE_FUNCTIONS ARGUMENTS...: instructions in it, without the device's
    toggles="--toggle-collect=$1*" # compilers add suffixes
    for function in $2; do
        toggles="$toggles --toggle-collect=$function*"
    done
    shift 2
    # shellcheck disable=SC2086
    valgrind --tool=callgrind --callgrind-out-file="$dir/out" $toggles "$program" "$@" \
        >"$dir/text" 2>"$dir/log" || { cat "$dir/log" "$dir/text" >&2; exit 1; }
    sed -n 's/^totals: //p' "$dir/out"
}

row() { # row NAME PATHS QPS SPLIT
    name=$1
    shift
    post=$(count cost_post device_post_send "$@")
    poll=$(count cost_poll "device_poll_cq device_post_srq_recv" "$@")
    read -r _ tiles _ requests <"$dir/text"
    each=$(((post + poll) / tiles))
    printf '%-30s %5d posting + %5d completing = %5d instructions a tile, %d.%d requests\n' \
        "$name" $((post / tiles)) $((poll / tiles)) "$each" $((requests / tiles)) \
        $((requests * 10 / tiles % 10))
    if [ "$each" -le 100 ] || [ "$post" -eq 0 ] || [ "$poll" -eq 0 ]; then
        echo "WRONG: nothing was counted"
        wrong=1
    elif [ "$each" -gt "$limit" ]; then
        echo "WRONG: more than $limit"
        wrong=1
    fi
}

row "whole, 1 path" 1 1 0
row "whole, 2 paths of 2 QPs" 2 2 0
row "split over 2 paths" 2 1 1
row "split over 2 paths of 2 QPs" 2 2 1
exit $wrong
