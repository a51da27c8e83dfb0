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

[ -x build/bin/nep-place ] || exit 0
# A map solved on two thirds of the requests; both runs below on the rest, which it has not seen.
printf '\n== Where experts live: solved on two thirds of the requests, run and scored on the rest\n'
python3 scripts/lib/split_trace.py $trace build/demo/train.nept build/demo/test.nept
place() {
    echo "nep-place $*"
    build/bin/nep-place "$@"
}
place solve --trace build/demo/train.nept --nodes 2 --gpus-per-node $per_node --replicas 12.5 \
    -o build/demo/solved.nepmap
perf before "the rest, experts in order, requests anywhere" --routing trace:build/demo/test.nept
perf after "the rest, with the map, requests at their predicted homes" \
    --routing trace:build/demo/test.nept --map build/demo/solved.nepmap
python3 scripts/lib/demo_report.py build/demo/before.json build/demo/after.json
place report --trace build/demo/test.nept --map build/demo/solved.nepmap -o build/demo/report.html
printf '\nReport: %s\n' "$PWD/build/demo/report.html"
