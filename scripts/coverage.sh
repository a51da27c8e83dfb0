#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Which lines of base, transport and dispatch the tests run: builds with gcc --coverage in
# build-coverage/, runs the layers that need neither namespaces nor a virtual machine, and prints a
# table by folder and the lines that nothing ran. scripts/coverage.sh [--min PERCENT] [-L LABELS]
set -euo pipefail
cd "$(dirname "$0")/.."
minimum=0 labels='^(unit|multi|adversary|fuzz)$'
while [ $# -gt 0 ]; do
    case $1 in
        --min) minimum=$2; shift 2 ;;
        -L) labels=$2; shift 2 ;;
        --help) sed -n '3,5s/^# //p' "$0"; exit 0 ;;
        *) echo "coverage.sh: $1 is no option (--min PERCENT, -L LABELS)" >&2; exit 2 ;;
    esac
done
mkdir -p build-coverage
cc -O1 -fPIC -c scripts/lib/coverage_exit.c -o build-coverage/coverage_exit.o
cmake --preset dev -B build-coverage -DNEP_WERROR=OFF -DCMAKE_C_FLAGS='--coverage -fprofile-update=atomic' \
    -DCMAKE_EXE_LINKER_FLAGS="--coverage -Wl,--wrap=_exit $PWD/build-coverage/coverage_exit.o" \
    -DCMAKE_SHARED_LINKER_FLAGS=--coverage > /dev/null
cmake --build build-coverage -j "$(nproc)"
find build-coverage -name '*.gcda' -delete
NEP_TEST_SCALE=10 ctest --test-dir build-coverage -L "$labels" -LE '^slow$' -j "$(nproc)" | tail -n 12 || true
python3 scripts/lib/coverage.py build-coverage "$minimum"
