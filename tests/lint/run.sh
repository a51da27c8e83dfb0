#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The checks of scripts/lint find what they are for: each is given a small tree with one breach, and
# the same tree without it.
set -euo pipefail
here=$(cd "$(dirname "$0")/../.." && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
cd "$temporary"
git init -q .
mkdir -p base transport placement dispatch include docs
cp -r "$here/scripts" "$here/.clang-format" .
spdx='/* SPDX-License-Identifier: Apache-2.0 */'
printf '%s\n#define NEP_OK 0\nint nep_one(void);\n' "$spdx" > include/nearep.h
printf '%s\n#include "nearep.h"\nint nep_two(void);\n' "$spdx" > base/two.h
printf '%s\n#include "base/two.h"\n\nint nep_two(void)\n{\n    return NEP_OK;\n}\n' "$spdx" > base/two.c
printf '%s\n#include "nearep.h"\n' "$spdx" > transport/transport.h
printf '%s\n#include "nearep.h"\n' "$spdx" > transport/inner.h
printf '# The memory model\n' > docs/memory-model.md
count=0

# breach CHECK FILE TEXT: CHECK passes, fails once TEXT stands at the end of FILE, passes without it.
breach() {
    local check=$1 file=$2 text=$3
    "scripts/lint/$check" > log 2>&1 || { echo "$check fails on the tree without a breach:"; cat log; exit 1; }
    [ ! -e "$file" ] || cp "$file" kept
    mkdir -p "$(dirname "$file")"
    printf '%b' "$text" >> "$file"
    if "scripts/lint/$check" > log 2>&1; then
        echo "$check does not mind, in $file: $text"
        exit 1
    fi
    if ! grep -q "$file" log; then
        echo "$check fails without naming $file:"
        cat log
        exit 1
    fi
    if [ -e kept ]; then mv kept "$file"; else rm "$file"; fi
    count=$((count + 1))
}

breach includes.py base/two.c '#include "transport/transport.h"\n'
breach includes.py transport/new.c '#include "placement/new.h"\n#include "dispatch/../base/two.h"\n#include <ucp/api/ucp.h>\n'
breach includes.py dispatch/new.c '#include "transport/inner.h"\n'
breach includes.py placement/new.c '#include <infiniband/verbs.h>\n'
breach sizes.py base/two.c "int nep_long(void)\n{\n$(printf '    nep_two();\\n%.0s' {1..100})    return 0;\n}\n"
breach sizes.py base/large.h "$(printf 'extern int a;\\n%.0s' {1..601})"
breach headers.sh base/alone.h 'static inline size_t nep_three(void)\n{\n    return 3;\n}\n'
breach docs.py docs/memory-model.md 'See [this](nowhere.md).\n'
breach docs.py docs/memory-model.md 'See `base/nowhere.c`.\n'
breach fences.py base/two.c 'int a = memory_order_acquire;\n'
if command -v clang-format-14 > /dev/null; then
    breach format.sh base/two.c 'int  nep_four( void );\n'
    breach format.sh base/four.c 'int nep_four(void);\n'
else
    echo "no clang-format-14 here: the check of the format refuses to run"
    if scripts/lint/format.sh > log 2>&1; then
        clang-format --version | grep -q 'version 14\.'
    fi
fi

# The symbols are looked up in objects, not in the text.
mkdir -p tree/base tree/transport tree/placement tree/dispatch
printf 'nep_one\n' > scripts/lint/symbols.txt
object() { # TEXT: libnearep.so and base/one.c.o from it
    printf '%s\n#include <assert.h>\n#include <stdio.h>\n#include <stdlib.h>\n%b\n' "$spdx" "$1" > one.c
    gcc -fPIC -c one.c -o tree/base/one.c.o
    gcc -shared tree/base/one.c.o -o tree/libnearep.so
}
symbols() { # right|wrong TEXT
    object "$2"
    if scripts/lint/symbols.sh tree > log 2>&1; then
        [ "$1" = right ] || { echo "symbols.sh does not mind: $2"; exit 1; }
    elif [ "$1" = right ]; then
        cat log
        exit 1
    fi
    count=$((count + 1))
}
symbols right 'int nep_one(void) { return 1; } /* getenv, abort */'
symbols wrong 'int nep_one(void) { return getenv("NEP_X") != NULL; }'
symbols wrong 'int nep_one(void) { abort(); }'
symbols wrong 'int nep_one(void) { exit(1); }'
symbols wrong 'int nep_one(void) { return printf("%d", 1); }'
symbols wrong 'int nep_one(void) { return fprintf(stderr, "%d", 1); }'
symbols wrong 'int nep_one(void); int two; int nep_one(void) { assert(two); return 1; }'
symbols wrong 'int nep_one(void) { return 1; } int nep_two(void) { return 2; }'
symbols wrong 'int one(void) { return 1; }'
echo "lint: $count breaches found"
