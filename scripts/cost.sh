#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What this tree costs beside an earlier commit where nothing goes wrong: instructions of a dispatch
# and a combine, counted by callgrind, and medians of alternating runs. docs/faults.md has the
# figures for the commit before there was recovery, traces and waits by rank.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

base=719badf pairs=0 functions=0
usage() {
    cat <<'TEXT'
usage: scripts/cost.sh [--base COMMIT] [--pairs N] [--functions N]

  --base COMMIT   what to compare with (719badf, the last before ranks could be lost)
  --pairs N       also time N alternating pairs of runs and print the ratio of medians (0)
  --functions N   also print the N functions whose instructions differ most (0)

Instructions: one rank, 8 tokens, callgrind, difference of 150 and 50 iterations, so that set-up
does not count. Times: 4 ranks x 128 tokens on one node, which is all that callgrind leaves out.
TEXT
}
while [ $# -gt 0 ]; do
    case $1 in
    --base) base=${2:?--base needs a commit}; shift ;;
    --pairs) pairs=${2:?--pairs needs a number}; shift ;;
    --functions) functions=${2:?--functions needs a number}; shift ;;
    --help | -h) usage; exit 0 ;;
    *) echo "cost.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
nep_need valgrind

dir=build/cost
mkdir -p "$dir/base"
git archive "$base" | tar -x -C "$dir/base"
build() { # TREE NAME
    cmake -S "$1" -B "$dir/build.$2" -DCMAKE_BUILD_TYPE=RelWithDebInfo > /dev/null
    cmake --build "$dir/build.$2" --target nep-perf -j "$(nproc)" > /dev/null
}
build "$dir/base" base
build . now
mkdir -p "$dir/out"

profile() { # PROGRAM FILE ITERATIONS: of the rank, a child of the program
    rm -f "$2".*
    NEP_LOG=error valgrind --tool=callgrind --trace-children=yes --callgrind-out-file="$2.%p" "$1" \
        ep --ranks 1 --tokens 8 --iters "$3" --warmup 5 > /dev/null 2>&1
    mv "$(grep -H '^totals: ' "$2".* | sort -t ' ' -k 2 -n | tail -n 1 | cut -d : -f 1)" "$2"
    rm -f "$2".*
}
instructions() { # NAME PROGRAM: of one dispatch and one combine
    profile "$2" "$dir/out/$1-50" 50
    profile "$2" "$dir/out/$1-150" 150
    local less more
    less=$(sed -n 's/^totals: //p' "$dir/out/$1-50")
    more=$(sed -n 's/^totals: //p' "$dir/out/$1-150")
    echo $(((more - less) / 100))
}
old=$dir/build.base/bin/nep-perf new=$dir/build.now/bin/nep-perf
before=$(instructions base "$old") after=$(instructions now "$new")
printf 'instructions of a dispatch and a combine: %d at %s, %d here: %s %%\n' "$before" "$base" \
    "$after" "$(awk -v a="$after" -v b="$before" 'BEGIN { printf "%+.2f", (a / b - 1) * 100 }')"
if [ "$functions" -gt 0 ]; then
    python3 scripts/lib/cost_functions.py "$functions" "$dir/out/base" "$dir/out/now"
fi
[ "$pairs" -gt 0 ] || exit 0

time_one() { # PROGRAM: median of dispatch and combine, us
    NEP_LOG=error "$1" ep --ranks 4 --ranks-per-node 4 --tokens 128 --iters 200 --warmup 20 \
        --json "$dir/out/time.json" > /dev/null
    python3 scripts/lib/cost_functions.py --median "$dir/out/time.json"
}
for i in $(seq "$pairs"); do
    if [ $((i % 2)) -eq 0 ]; then
        a=$(time_one "$old") b=$(time_one "$new")
    else
        b=$(time_one "$new") a=$(time_one "$old")
    fi
    echo "$a $b"
done > "$dir/out/pairs"
python3 scripts/lib/cost_functions.py --pairs "$dir/out/pairs"
