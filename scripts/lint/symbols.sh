#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: scripts/lint/symbols.sh BUILD_TREE [--update]
# Three looks at the built library: it exports exactly symbols.txt, which is what nearep.h declares;
# it calls nothing that ends the process or prints; getenv is called in two files only.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
tree=${1:-build} list=scripts/lint/symbols.txt failed=0
exported=$(nm -D --defined-only "$tree/libnearep.so" | awk '$2 != "A" { sub(/@.*/, "", $3); print $3 }' |
    LC_ALL=C sort)
if [ "${2:-}" = --update ]; then
    printf '%s\n' "$exported" > "$list"
fi
if ! diff -u "$list" <(printf '%s\n' "$exported"); then
    echo "symbols: libnearep.so exports something else than $list (--update writes it anew)"
    failed=1
fi
declared=$(gcc -E -P -x c include/nearep.h | grep -oE '\bnep_[a-z0-9_]+ *\(' | tr -d ' (' |
    LC_ALL=C sort -u)
if ! diff <(printf '%s\n' "$declared") <(printf '%s\n' "$exported"); then
    echo "symbols: < declared in nearep.h and not exported, > exported and not declared"
    failed=1
fi

# Per object: who asks for what. A message goes to the log, an end to the caller.
objects=$(find "$tree/base" "$tree/transport" "$tree/placement" "$tree/dispatch" -name '*.o')
wanted() { # REGEX: "object symbol" of every object that refers to such a symbol
    local object
    for object in $objects; do
        nm -u "$object" | awk -v o="${object#"$tree"/}" -v r="^($1)(@.*)?$" '$2 ~ r { print o, $2 }'
    done | sed 's/CMakeFiles\/[a-z_]*\.dir\///'
}
complain() { # TEXT LINES
    if [ -n "$2" ]; then
        printf '%s\n' "$2" "symbols: $1"
        failed=1
    fi
}
complain "a library must not end its process" \
    "$(wanted 'abort|_?exit|_Exit|quick_exit|__assert_fail|__assert|raise|kill' | grep -v ' kill$' || true)"
complain "a library must not print; use nep_log" \
    "$(wanted 'printf|__printf_chk|puts|putchar|vprintf|__vprintf_chk|perror|stdout' || true)"
complain "standard error belongs to base/log.c" \
    "$(wanted 'stderr' | grep -v '^base/log\.c' || true)"
complain "the environment is read in base/config.c and base/launch_env.c" \
    "$(wanted 'getenv|secure_getenv|environ|__environ' |
        grep -vE '^base/(config|launch_env)\.c' || true)"
complain "sprintf, strcpy and gets know no size" "$(wanted '__sprintf_chk|sprintf|strcpy|strcat|gets' || true)"
echo "symbols: $(printf '%s\n' "$exported" | grep -c .) exported; $(echo "$objects" | wc -w) objects looked at"
exit "$failed"
