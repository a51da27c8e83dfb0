#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/lint/tidy.sh [BUILD_TREE] [FILE...]: the static analysis of .clang-tidy over the
# library and the tools, with the compile commands of a tree (build-clang).
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
tree=${1:-build-clang}
[ $# = 0 ] || shift
if [ $# = 0 ]; then
    # SIMD files are one text of intrinsics; status.c and bootstrap.c define what analyzer.h models.
    mapfile -t files < <(git ls-files 'base/*.c' 'transport/*.c' 'placement/*.c' 'dispatch/*.c' \
        'perftest/*.c' 'tools/*.c' |
        grep -vE '_avx(2|512)\.c$|^base/status\.c$|^transport/bootstrap\.c$')
    set -- "${files[@]}"
fi
tool=$(command -v clang-tidy-14 || command -v clang-tidy)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
failed=0
printf '%s\0' "$@" | xargs -0 -n 4 -P "$(nproc)" "$tool" -p "$tree" --quiet \
    --extra-arg=-include --extra-arg="$PWD/scripts/lint/analyzer.h" > "$log" 2> /dev/null || failed=1
sed "s|$PWD/||" "$log"
echo "tidy: $# files analysed"
exit $failed
