#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Harm at random moments, and what must hold after it (tests/chaos/chaos.py, docs/faults.md):
# scripts/chaos.sh [MINUTES] [OPTIONS OF chaos.py]   a soak of so many minutes (5)
# scripts/chaos.sh kills [OPTIONS]                   500 random kills, half of them recovered from
set -euo pipefail
cd "$(dirname "$0")/.."
perf=build/bin/nep-perf
if [ "${1:-}" = --help ]; then
    sed -n '3,5s/^# //p' "$0"
    exec tests/chaos/chaos.py --help
fi
if [ ! -x "$perf" ]; then
    cmake --preset release > /dev/null
    cmake --build build -j "$(nproc)" -t nep-perf
fi
if [ "${1:-}" = kills ]; then
    shift
    exec tests/chaos/chaos.py "$perf" --rounds 500 --harms kill,continue --timeout 5 "$@"
fi
minutes=5
case ${1:-} in
    [0-9]*) minutes=$1; shift ;;
esac
exec tests/chaos/chaos.py "$perf" --rounds 1000000 --seconds $((minutes * 60)) "$@"
