#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: refusal.sh NEP_PERF: asked for tokens in GPU memory where that cannot be, nep-perf says so in
# one line and exits with 2, before it starts a rank.
set -euo pipefail
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
status=0
"$1" ep --executor cuda --ranks 2 --tokens 2 --hidden 64 > "$temporary/out" 2> "$temporary/err" ||
    status=$?
echo "no GPU executor here: $(cat "$temporary/err")"
[ "$status" = 2 ] || { echo "exit status $status, not 2"; exit 1; }
[ ! -s "$temporary/out" ] || { echo "it printed results:"; cat "$temporary/out"; exit 1; }
[ "$(wc -l < "$temporary/err")" = 1 ] || { echo "more than one line"; exit 1; }
grep -q cuda "$temporary/err"
