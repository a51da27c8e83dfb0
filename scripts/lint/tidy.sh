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
        grep -vE '_avx(2|512)\.c$|^base/status\.c$|^transport/bootstrap\.c$' |
        while IFS= read -r file; do # what the tree does not build has no flags to be read with
            if grep -q "/$file\"" "$tree/compile_commands.json"; then
                echo "$file"
            else
                echo "tidy: $file is not part of $tree" >&2
            fi
        done)
    set -- "${files[@]}"
fi
tool=$(command -v clang-tidy-14 || command -v clang-tidy)
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# One file a call: with several, a finding is printed once for each file after it.
printf '%s\0' "$@" | xargs -0 -n 1 -P "$(nproc)" "$tool" -p "$tree" --quiet \
    --extra-arg=-include --extra-arg="$PWD/scripts/lint/analyzer.h" > "$log" 2> /dev/null || true
sed -i "s|$PWD/||" "$log"

known() { # LINE: "file:line:column: error: text [check,...]" stands in the list of known ones
    local file=${1%%:*} check=${1##*\[}
    grep -q "^$file ${check%%[],]*} " scripts/lint/tidy_known.txt
}
failed=0 num_known=0
while IFS= read -r line; do
    if known "$line"; then
        num_known=$((num_known + 1))
    else
        failed=1
        printf '%s\n' "$line"
        # The path that leads there: the notes up to the next finding.
        awk -v line="$line" '$0 == line { on = 1; next } on && / (error|warning): / { exit }
            on && / note: / && n++ < 20' "$log"
    fi
done < <(grep -E '(error|warning): .*\[' "$log" | sort -u)
echo "tidy: $# files analysed, $num_known known findings (scripts/lint/tidy_known.txt)"
exit $failed
