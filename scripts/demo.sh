#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds the tools, and runs the main job on the shipped sample trace:
# 8 ranks on 2 emulated nodes dispatch to experts and combine, every element checked. Then says what
# went over the wire, and why not less.
set -euo pipefail
cd "$(dirname "$0")/.."
# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh

trace=data/demo256.nept ranks=8 per_node=4
mapfile -t packages < <(nep_list scripts/packages.txt | awk '{ print $1 }')
nep_need "${packages[@]}"

echo "building the tools in build/ (a minute or two the first time)"
# The demo needs no tests; a tree that has them keeps them.
[ -f build/CMakeCache.txt ] || first=-DNEP_BUILD_TESTS=OFF
cmake --preset release ${first:+"$first"} > build-demo.log 2>&1 &&
    cmake --build build -j "$(nproc)" --target tools/all perftest/all >> build-demo.log 2>&1 || {
    cat build-demo.log >&2
    exit 1
}
rm -f build-demo.log
mkdir -p build/demo

perf() { # NAME TITLE ARGUMENT...: one verified run, its results in build/demo/NAME.json
    local name=$1
    printf '\n== %s\n' "$2"
    shift 2
    echo "nep-perf ep --ranks $ranks --ranks-per-node $per_node $* --verify"
    build/bin/nep-perf ep --ranks $ranks --ranks-per-node $per_node "$@" --verify \
        --json "build/demo/$name.json"
}

perf contiguous "$ranks ranks on 2 emulated nodes, experts in order" --routing "trace:$trace"

# A map solved on two thirds of the requests; everything below is scored on the rest, which it has not
# seen.
place() {
    echo "nep-place $*"
    build/bin/nep-place "$@"
}
train=build/demo/train.nept test=build/demo/test.nept map=build/demo/solved.nepmap
printf '\n== Where experts live: solved on two thirds of the requests, scored on the rest\n'
place slice --trace $trace --part train -o $train
place slice --trace $trace --part test -o $test
place solve --trace $train --nodes 2 --gpus-per-node $per_node --replicas 12.5 -o $map
place compare --train $train --test $test --nodes 2 --gpus-per-node $per_node --replicas 12.5

perf before "the rest, experts in order, requests anywhere" --routing trace:$test
perf after "the rest, with the map, requests at their predicted homes" --routing trace:$test --map $map
printf '\n== What the map changed, as run'
python3 scripts/lib/demo_report.py build/demo/before.json build/demo/after.json
place report --trace $test --map $map -o build/demo/report.html
printf '\nReport: %s\n' "$PWD/build/demo/report.html"
