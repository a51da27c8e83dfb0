#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# What the recorder adds to a dispatch and a combine, in instructions of their calls, counted by
# callgrind: the same on a busy machine, so it may be held to a limit. One rank, small rows and
# one layer, so that what it is compared with is little and every call picks its tokens anew.
# usage: scripts/recorder-cost.sh NEP_PERF [HIDDEN [PER_MILLE]]
set -u
program=$1
hidden=${2:-512}
limit=${3:-10}
if ! command -v callgrind_annotate >/dev/null; then
    echo "recorder cost: not counted, valgrind is not installed (apt-get install valgrind)"
    exit 0
fi
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
wrong=0

row() { # row TOKENS PPM IS_HELD
    NEP_LOG=error valgrind --tool=callgrind --trace-children=yes \
        --callgrind-out-file="$dir/out.%p" "$program" ep --ranks 1 --tokens "$1" --hidden "$hidden" \
        --iters 40 --warmup 0 --record "$dir/trace" --record-ppm "$2" >"$dir/text" 2>"$dir/log" ||
        { cat "$dir/log" "$dir/text" >&2; exit 1; }
    # The rank is a child: of the profiles, the one that has the recorder in it.
    for out in "$dir"/out.*; do
        callgrind_annotate --inclusive=yes --threshold=100 --tree=none "$out"
    done | sed -n 's/^ *\([0-9,]*\) (.*:\(nep_[a-z_]*\).*/\1 \2/p' | tr -d , | awk -v row="$*" \
        -v limit="$limit" '
        $1 > most[$2] { most[$2] = $1 }
        END {
            split("send counts recv", names)
            split(row, arg)
            for (i in names) {
                calls += most["nep_dispatch_" names[i]] + most["nep_combine_" names[i]]
            }
            take = most["nep_recorder_take"]
            share = calls > 0 ? 1000 * take / (calls - take) : 0
            printf "%4d tokens, %7d requests in a million: %7.0f instructions of %9.0f, %.2f %%\n",
                arg[1], arg[2], take / 40, calls / 40, share / 10
            if (take == 0 || calls < 100 * take / 90) {
                print "WRONG: nothing was counted"
                exit 1
            }
            if (arg[3] && share > limit) {
                print "WRONG: more than " limit / 10 " %"
                exit 1
            }
        }' || wrong=1
    rm -f "$dir"/out.*
}

row 8 10000 1
row 128 10000 1
row 128 1000000 0
exit $wrong
