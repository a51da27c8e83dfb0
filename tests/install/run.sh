#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: run.sh BUILD_TREE CC CXX VERSION
# Installs the build tree to a folder, moves that folder, and builds and runs four consumers against
# it: C and C++, found by CMake and by pkg-config. Then uninstallable leftovers: every installed file
# is named here.
set -euo pipefail
tree=$1 cc=$2 cxx=$3 version=$4
here=$(cd "$(dirname "$0")" && pwd)
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
flags=
if grep -q '^NEP_SANITIZE:STRING=..*' "$tree/CMakeCache.txt"; then
    # A sanitizer's run time must come first in the process: the consumer is built with it, too.
    flags=-fsanitize=$(sed -n 's/^NEP_SANITIZE:STRING=//p' "$tree/CMakeCache.txt")
fi

cmake --install "$tree" --prefix "$temporary/first" > "$temporary/log"
mv "$temporary/first" "$temporary/prefix"
lib=$(dirname "$(find "$temporary/prefix" -name libnearep.so)")
export LD_LIBRARY_PATH=$lib

expect() { # NAME PROGRAM: it runs, prints the version and uses the library that was installed
    local output
    output=$("$2")
    [ "$output" = "nearep $version" ] || { echo "$1: printed '$output'"; exit 1; }
    # Not through a pipe: grep -q would end before ldd, whose broken pipe counts as a failure.
    output=$(ldd "$2")
    [[ $output == *"$lib/libnearep.so.0"* ]] || { echo "$1: not linked with $lib"; exit 1; }
    echo "$1: nearep $version"
}

cmake -S "$here/cmake" -B "$temporary/cmake" -G Ninja -DCMAKE_PREFIX_PATH="$temporary/prefix" \
    -DCMAKE_C_COMPILER="$cc" -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_C_FLAGS="$flags" \
    -DCMAKE_CXX_FLAGS="$flags" -DWANTED="${version%.*}" > "$temporary/log" 2>&1 &&
    cmake --build "$temporary/cmake" >> "$temporary/log" 2>&1 || { cat "$temporary/log"; exit 1; }
expect "find_package, C" "$temporary/cmake/consumer_c"
expect "find_package, C++" "$temporary/cmake/consumer_cxx"

# An older and a newer minor version are other interfaces before 1.0.
if cmake -S "$here/cmake" -B "$temporary/other" -G Ninja -DCMAKE_PREFIX_PATH="$temporary/prefix" \
    -DWANTED=99.0 > "$temporary/log" 2>&1; then
    echo "find_package(nearep 99.0) was satisfied by $version"
    exit 1
fi

PKG_CONFIG_PATH=$lib/pkgconfig
export PKG_CONFIG_PATH
[ "$(pkg-config --modversion nearep)" = "$version" ]
# shellcheck disable=SC2046,SC2086 # flags are words
"$cc" $flags "$here/cmake/consumer.c" -o "$temporary/consumer_c" $(pkg-config --cflags --libs nearep)
# shellcheck disable=SC2046,SC2086
"$cxx" $flags "$here/cmake/consumer.cc" -o "$temporary/consumer_cxx" \
    $(pkg-config --cflags --libs nearep)
expect "pkg-config, C" "$temporary/consumer_c"
expect "pkg-config, C++" "$temporary/consumer_cxx"

if [ -d "$temporary/prefix/share/man" ]; then
    pages=$(find "$temporary/prefix/share/man" -name 'nep_*.3' | wc -l)
    echo "man pages: $pages"
    [ "$pages" -ge 20 ]
fi
