#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Every header compiles alone: the public one as strict C99, C11, C17, C++11 and C++20, the inner ones
# as the C11 of this project.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
failed=0 count=0
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT

try() { # COMPILER... HEADER: a file with nothing but two inclusions, which also tests the guard
    local header=${!#} suffix=c
    case $1 in *++*) suffix=cc ;; esac
    printf '#include "%s"\n#include "%s"\nextern int unused;\n' "$header" "$header" \
        > "$temporary/one.$suffix"
    count=$((count + 1))
    "${@:1:$#-1}" -I. -Iinclude -Wall -Wextra -Werror -fsyntax-only "$temporary/one.$suffix" \
        2> "$temporary/log" || {
        head -n 8 "$temporary/log"
        echo "headers: $header does not compile alone with: ${*:1:$#-1}"
        failed=1
    }
}
for compiler in gcc clang; do
    command -v $compiler > /dev/null || continue
    for standard in c99 c11 c17; do
        try $compiler -std=$standard -pedantic include/nearep.h
    done
done
for compiler in g++ clang++; do
    command -v $compiler > /dev/null || continue
    for standard in c++11 c++20; do
        try $compiler -std=$standard -pedantic -Wno-pragma-once-outside-header include/nearep.h
    done
done
for header in $(git ls-files -co --exclude-standard 'base/*.h' 'transport/*.h' 'placement/*.h' \
    'dispatch/*.h' 'perftest/*.h' 'tools/*.h'); do
    case $header in
    dispatch/cuda/device/*) continue ;; # device code: the CUDA stage compiles it
    esac
    # A template says so at its top; the files that include it are its test.
    ! head -n 12 "$header" | grep -q 'The including file defines' || continue
    try gcc -std=c11 -D_GNU_SOURCE -DNEP_HAVE_UCX=1 -DNEP_HAVE_VERBS=1 -DNEP_HAVE_CUDA=0 \
        -DNEP_HAVE_X86=1 "$header"
done
echo "headers: $count compilations of one header alone"
exit "$failed"
