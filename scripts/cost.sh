#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# What this tree costs beside an earlier commit where nothing goes wrong: instructions of a dispatch
# and a combine, counted by callgrind, and medians of alternating runs. docs/faults.md has the
# figures for the commit before there was recovery, traces and waits by rank.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

base=719badf pairs=0 functions=0 counts=1 recorder=0
usage() {
    cat <<'TEXT'
usage: scripts/cost.sh [--base COMMIT] [--pairs N] [--pairs-only] [--functions N]
       scripts/cost.sh --recorder N

  --base COMMIT   what to compare with (719badf, the last before ranks could be lost)
  --pairs N       also time N alternating pairs of runs and print the ratio of medians (0)
  --pairs-only    count no instructions
  --functions N   also print the N functions whose instructions differ most (0)
  --recorder N    no commits: N alternating pairs of runs of build/bin/nep-perf without --record
                  ("before") and with it ("now"), 2 ranks of one node, 128 tokens; its instructions
                  are counted by scripts/recorder-cost.sh

Instructions: in the calls of dispatch and combine, one rank, 8 tokens; the difference of 150 and 50
iterations, so that set-up does not count. Times: the same rank and tokens,
hidden 7168; ranks that wait for each other measure how busy the machine is.
TEXT
}
while [ $# -gt 0 ]; do
    case $1 in
    --base) base=${2:?--base needs a commit}; shift ;;
    --pairs) pairs=${2:?--pairs needs a number}; shift ;;
    --functions) functions=${2:?--functions needs a number}; shift ;;
    --pairs-only) counts=0 ;;
    --recorder) recorder=${2:?--recorder needs a number}; shift ;;
    --help | -h) usage; exit 0 ;;
    *) echo "cost.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done
dir=build/cost
if [ "$recorder" -gt 0 ]; then
    mkdir -p "$dir/out"
    run_one() { # [--record FILE]: us
        NEP_LOG=error build/bin/nep-perf ep --ranks 2 --ranks-per-node 2 --tokens 128 --iters 60 \
            "$@" --json - | sed -n 's/^ *"total_us": {"p50": \([0-9.]*\).*/\1/p'
    }
    for i in $(seq "$recorder"); do
        if [ $((i % 2)) -eq 0 ]; then
            a=$(run_one) b=$(run_one --record "$dir/out/trace.%r")
        else
            b=$(run_one --record "$dir/out/trace.%r") a=$(run_one)
        fi
        echo "$a $b"
    done > "$dir/out/pairs"
    python3 scripts/lib/cost_functions.py --pairs "$dir/out/pairs"
    exit 0
fi
nep_need valgrind

# By commit: files of another one that are older than its objects would not be compiled again.
before=$(git rev-parse --short "$base")
mkdir -p "$dir/$before"
git archive "$base" | tar -x -C "$dir/$before"
build() { # TREE NAME
    cmake -S "$1" -B "$dir/build.$2" -DCMAKE_BUILD_TYPE=RelWithDebInfo > /dev/null
    cmake --build "$dir/build.$2" --target nep-perf -j "$(nproc)" > /dev/null
}
build "$dir/$before" "$before"
build . now
mkdir -p "$dir/out"

profile() { # PROGRAM FILE HIDDEN ITERATIONS: of the rank, a child of the program
    rm -f "$2".*
    NEP_LOG=error valgrind --tool=callgrind --trace-children=yes --callgrind-out-file="$2.%p" "$1" \
        ep --ranks 1 --tokens 8 --hidden "$3" --iters "$4" --warmup 5 > /dev/null 2>&1
    mv "$(grep -H '^totals: ' "$2".* | sort -t ' ' -k 2 -n | tail -n 1 | cut -d : -f 1)" "$2"
    rm -f "$2".*
}
old=$dir/build.$before/bin/nep-perf new=$dir/build.now/bin/nep-perf
for hidden in 512 7168; do
    [ "$counts" = 1 ] || break
    for iterations in 50 150; do
        profile "$old" "$dir/out/base-$iterations" "$hidden" "$iterations"
        profile "$new" "$dir/out/now-$iterations" "$hidden" "$iterations"
    done
    echo "hidden $hidden, commit $base and this tree:"
    python3 scripts/lib/cost_functions.py "$functions" "$dir/out/base" "$dir/out/now"
done
[ "$pairs" -gt 0 ] || exit 0

# A run's median, the less disturbed of two: other jobs of the machine make single ones up to four
# times as long.
time_one() { # PROGRAM: us
    for _ in 1 2; do
        NEP_LOG=error "$1" ep --ranks 1 --tokens 8 --iters 600 --warmup 50 --json - |
            sed -n 's/^ *"total_us": {"p50": \([0-9.]*\).*/\1/p'
    done | sort -n | head -n 1
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
