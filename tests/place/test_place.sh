#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every command of nep-place on a trace, gains and controls as they must be, and bad input refused
# with status 2 and the numbers that clash.
# usage: test_place.sh NEP_PLACE TRACE
set -euo pipefail
place=$1 trace=$2
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
failed=0

# JSON VALUE CONDITION: VALUE and CONDITION are Python on r, the object.
check() {
    python3 - "$dir/$1.json" "$2" "$3" << 'PY' || failed=1
import json
import sys

r = json.load(open(sys.argv[1], encoding="utf-8"))
value = eval(sys.argv[2])
fine = eval(sys.argv[3], {"x": value, "r": r})
print("ok:    " if fine else "FAILED:", sys.argv[2], "is", value, "; expected", sys.argv[3])
sys.exit(not fine)
PY
}

refused() { # WORDS ARGUMENT...: status 2, no crash, and the words in the message
    local words=$1 status=0
    shift
    "$place" "$@" > "$dir/out" 2> "$dir/err" || status=$?
    if [ "$status" -ne 2 ] || ! grep -qF -- "$words" "$dir/err"; then
        echo "FAILED: nep-place $*: status $status, expected 2 and \"$words\":" >&2
        cat "$dir/err" >&2
        failed=1
    fi
}

"$place" slice --trace "$trace" --part train --seed 3 -o "$dir/train" > /dev/null
"$place" slice --trace "$trace" --part test --seed 3 -o "$dir/test" > /dev/null
"$place" compare --train "$dir/train" --test "$dir/test" --nodes 4 --replicas 12.5 --online \
    --json "$dir/compare.json" > /dev/null
m="r['methods']"
check compare "${m}['nearep']['change_pct']" "x < -20"
check compare "${m}['nearep']['change_pct'] - ${m}['spectral']['change_pct']" "x < 0"
check compare "${m}['nearep']['change_pct'] - ${m}['paper']['change_pct']" "x < 0"
check compare "${m}['nearep_replicas']['change_pct'] - ${m}['nearep']['change_pct']" "x < -3"
check compare "${m}['nearep_replicas']['change_pct'] - ${m}['eplb_replicas']['change_pct']" "x < -10"
check compare "${m}['nearep_online']['imbalance_node']" "x < 1.12"
check compare "r['references']['solved_on_test']['change_pct']" "x < -20"

# Picks exchanged between tokens: what is left is what copies are worth whatever they hold. At a
# low limit on load, because overload alone saves rows.
"$place" compare --train "$dir/train" --test "$dir/test" --nodes 4 --replicas 12.5 --shuffled \
    --max-imbalance 1.03 \
    --methods nearep,nearep_replicas,eplb_replicas --json "$dir/shuffled.json" > /dev/null
check shuffled "${m}['nearep']['change_pct']" "abs(x) < 1"
check shuffled "${m}['nearep_replicas']['change_pct'] - ${m}['eplb_replicas']['change_pct']" \
    "abs(x) < 1.5"

# The same map for any number of threads; the limit on moves of a warm solve.
for threads in 1 2 3; do
    "$place" solve --trace "$dir/train" --nodes 4 --replicas 12.5 --threads $threads \
        -o "$dir/map.$threads" > /dev/null
done
cmp "$dir/map.1" "$dir/map.2" && cmp "$dir/map.1" "$dir/map.3" || failed=1
"$place" solve --trace "$dir/test" --nodes 4 --replicas 12.5 --warm "$dir/map.1" --max-moves 14 \
    -o "$dir/warm" --json "$dir/warm.json" > /dev/null
check warm "r['moved_copies']" "0 < x <= 14"
"$place" report --trace "$dir/test" --map "$dir/map.1" -o "$dir/report.html" > /dev/null
grep -q '</html>' "$dir/report.html" || { echo "FAILED: the report has no end" >&2; failed=1; }
# the sweep over limits on load: five points and the map itself
[ "$(grep -c '<circle' "$dir/report.html")" -eq 6 ] ||
    { echo "FAILED: the report's curve has not six points" >&2; failed=1; }
# A full disk (no file above 1 KiB here) leaves no half page or map, and no file beside it.
mkdir "$dir/full"
for command in "report --map $dir/map.1" "solve --nodes 4"; do
    # shellcheck disable=SC2086
    if (ulimit -f 1 && trap '' XFSZ && exec "$place" $command --trace "$dir/test" \
        -o "$dir/full/out") > "$dir/out" 2> "$dir/err"; then
        echo "FAILED: $command is said to be done on a full disk" >&2
        failed=1
    fi
    grep -q "full/out: cannot write" "$dir/err" || { cat "$dir/err" >&2 && failed=1; }
done
[ -z "$(ls -A "$dir/full")" ] || { echo "FAILED: left: $(ls "$dir/full")" >&2 && failed=1; }
"$place" queue --trace "$dir/test" --map "$dir/map.1" --json "$dir/queue.json" > /dev/null
check queue "r['rules']['nearep']['rows_over_oracle_pct'] - \
r['rules']['fcfs']['rows_over_oracle_pct']" "x < -3"
check queue "r['rules']['nearep']['max_wait'] - r['age_bound']" "x <= 0"
check queue "r['rules']['nearep']['jain']" "x >= 0.95"

# ---- bad input ----
refused "no option" solve --trac x
refused "needs" solve --trace "$trace"
refused "whole" solve --trace "$trace" --nodes 5 --replicas 12.5 -o "$dir/x"
refused "from 1" solve --trace "$trace" --nodes 4 --max-imbalance 0.5 -o "$dir/x"
refused "--nodes 0" solve --trace "$trace" --nodes 0 -o "$dir/x"
refused "not a method" compare --train "$trace" --test "$trace" --nodes 4 --methods magic
refused "poisson" queue --trace "$trace" --map "$dir/map.1" --arrivals often
refused "No such file" solve --trace "$dir/none" --nodes 4 -o "$dir/x"
refused "$dir/nowhere/x" solve --trace "$trace" --nodes 4 -o "$dir/nowhere/x"
head -c 1000 "$trace" > "$dir/short"
refused "bytes" solve --trace "$dir/short" --nodes 4 -o "$dir/x"
: > "$dir/empty"
refused "$dir/empty" solve --trace "$dir/empty" --nodes 4 -o "$dir/x"
cp "$trace" "$dir/flipped"
printf '\377' | dd of="$dir/flipped" bs=1 seek=50000 conv=notrunc status=none
refused "CRC" solve --trace "$dir/flipped" --nodes 4 -o "$dir/x"
head -c 3000 "$dir/map.1" > "$dir/cut"
refused "$dir/cut" eval --trace "$trace" --map "$dir/cut"
refused "$trace" eval --trace "$trace" --map "$trace"
sed 's/^layers 7 experts 256/layers 7 experts 128/' "$dir/map.1" > "$dir/other"
refused "$dir/other" eval --trace "$trace" --map "$dir/other"
"$place" solve --trace "$trace" --nodes 2 -o "$dir/two" > /dev/null
refused "2 nodes" solve --trace "$trace" --nodes 4 --warm "$dir/two" -o "$dir/x"
exit $failed
