#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Installs what is missing, builds, runs the tests, ends with ctest's summary.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() {
    cat <<'TEXT'
usage: scripts/test.sh [--quick] [-L LABEL] [--preset PRESET] [-- CTEST_ARGUMENTS]

  --quick          small sizes (NEP_TEST_SCALE=10), without the layers vm, hosts and fuzz
  -L LABEL         only one layer: unit, model, multi, place, hosts, vm, adversary, fuzz, gpu,
                  python, chaos
  --preset PRESET  release (default, in build/), dev, clang, asan, tsan (in build-PRESET/)
  --list           names the layers and the packages that each of them needs

Tests of a layer are in tests/LABEL/; the packages it needs are named in tests/LABEL/packages.txt.
TEXT
}

preset=release label='' quick='' list=''
while [ $# -gt 0 ]; do
    case $1 in
    --quick) quick=1 ;;
    -L | --preset)
        [ $# -ge 2 ] || { echo "test.sh: $1 needs a value" >&2; exit 2; }
        if [ "$1" = -L ]; then label=$2; else preset=$2; fi
        shift
        ;;
    --list) list=1 ;;
    --help | -h) usage; exit 0 ;;
    --) shift; break ;;
    *) echo "test.sh: unknown option $1" >&2; usage >&2; exit 2 ;;
    esac
    shift
done

# shellcheck source=scripts/lib/packages.sh
. scripts/lib/packages.sh
layers=(unit ref lint install model multi hosts vm adversary fuzz chaos gpu python)
if [ -n "$label" ]; then
    case " ${layers[*]} " in
    *" $label "*) ;;
    *) echo "test.sh: no layer '$label'; there are: ${layers[*]}" >&2; exit 2 ;;
    esac
    layers=(unit ref lint install "$label")
elif [ -n "$quick" ]; then
    layers=(unit ref lint install model multi adversary gpu python)
fi
lists=(scripts/packages.txt)
for layer in "${layers[@]}"; do
    if [ -f "tests/$layer/packages.txt" ]; then
        lists+=("tests/$layer/packages.txt")
    fi
done
if [ -n "$list" ]; then
    for file in "${lists[@]}"; do
        echo "$file: $(nep_list "$file" | xargs)"
    done
    exit 0
fi
mapfile -t packages < <(nep_list "${lists[@]}" | awk '!seen[$1]++ { print $1 }')
nep_need "${packages[@]}"
case " ${layers[*]} " in
*" vm "*) nep_need_lists linux-image-amd64 linux-image-generic ;; # the guest's kernel
esac

tree=build
[ "$preset" = release ] || tree=build-$preset
jobs=$(nproc)
cmake --preset "$preset" -DNEP_BUILD_TESTS=ON > "/tmp/nearep-configure.$$" 2>&1 || {
    cat "/tmp/nearep-configure.$$" >&2
    rm -f "/tmp/nearep-configure.$$"
    exit 1
}
grep '^-- nearep:' "/tmp/nearep-configure.$$" || true
rm -f "/tmp/nearep-configure.$$"
cmake --build "$tree" -j "$jobs"

arguments=(--test-dir "$tree" --output-on-failure --no-tests=error)
if [ -n "$quick" ]; then
    export NEP_TEST_SCALE=10
    [ -n "$label" ] || arguments+=(-LE '^(vm|hosts|fuzz|chaos)$')
fi
if [ -n "$label" ]; then
    arguments+=(-L "^$label\$")
fi
# One at a time: most tests start several ranks of their own.
exec ctest "${arguments[@]}" "$@"
