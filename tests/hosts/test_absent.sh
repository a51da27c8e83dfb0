#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A machine without UCX: transport ucx is refused with a sentence by probe, create and nep-perf, and
# everything else works. The library is hidden behind an empty file in a mount namespace.
. "$(dirname "$0")/lib.sh"

library=$(ldconfig -p | awk '/libucp\.so\.0 / && !found++ { print $NF }')
if [ -n "$library" ]; then
    hidden=(unshare -m sh -c 'mount --bind /dev/null "$0" && exec "$@"' "$(readlink -f "$library")")
else
    hidden=(env)
fi
"${hidden[@]}" "$tools/test_transport" > "$work/out" 2>&1 ||
    { cat "$work/out"; fail "the transports' tests fail without UCX"; }
grep -am 1 "ucx is not here: " "$work/out" || fail "nobody said that UCX is missing"

status=0
"${hidden[@]}" "$tools/nep-perf" ep --ranks 2 --ranks-per-node 1 --inter ucx --tokens 8 \
    > "$work/out" 2>&1 || status=$?
[ $status -eq 1 ] || [ $status -eq 2 ] || { cat "$work/out"; fail "nep-perf ended with $status"; }
grep -aq "libucp" "$work/out" || { cat "$work/out"; fail "nep-perf does not say what is missing"; }
