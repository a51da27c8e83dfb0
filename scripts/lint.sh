#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/lint.sh [BUILD_TREE]: all checks of scripts/lint/ that need no running of code.
# With a build tree (build/ if it is there), the symbols of the built library as well.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh
mapfile -t packages < <(nep_list scripts/packages.txt scripts/lint/packages.txt |
    awk '{ print $1 }')
nep_need "${packages[@]}" || exit 1
tree=${1:-build} failed=0
for check in format.sh includes.py sizes.py headers.sh docs.py fences.py shell.sh python.sh; do
    printf -- '-- %s\n' "$check"
    scripts/lint/$check || failed=1
done
if [ -e "$tree/libnearep.so" ]; then
    printf -- '-- symbols.sh\n'
    scripts/lint/symbols.sh "$tree" || failed=1
fi
exit "$failed"
