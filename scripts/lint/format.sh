#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Layout of the sources by clang-format 14 (another version lays out differently), and first lines.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
tool=$(command -v clang-format-14 || command -v clang-format)
"$tool" --version | grep -q 'version 14\.' || {
    echo "format: needs clang-format 14, found: $("$tool" --version)" >&2
    exit 1
}
failed=0
mapfile -t files < <(git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' '*.cuh' '*.cc')
if ! "$tool" --dry-run -Werror "${files[@]}" > /dev/null 2>&1; then
    "$tool" --dry-run -Werror "${files[@]}" 2>&1 | grep 'error:' | sort -u -t: -k1,1
    echo "format: run clang-format -i on the files above"
    failed=1
fi
for file in $(git ls-files -co --exclude-standard '*.c' '*.h' '*.cu' '*.cuh' '*.cc' '*.py' '*.sh'); do
    head -n 2 "$file" | grep -q 'SPDX-License-Identifier: Apache-2.0' || {
        echo "$file: the first line must be SPDX-License-Identifier: Apache-2.0"
        failed=1
    }
done
if git grep -nIE '[[:space:]]+$' -- ':!LICENSE' ':!*.map' ':!data' ':!*.md' ':!tests/*/corpus' | head -n 20 | grep .; then
    echo "format: blanks at the ends of the lines above"
    failed=1
fi
echo "format: ${#files[@]} C and CUDA files looked at"
exit "$failed"
