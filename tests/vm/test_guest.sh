#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a script of this folder in a guest with four devices; the working directory is the build
# tree. A script that knows the word "expect" runs on the host first.
# usage: test_guest.sh SCRIPT [ARGUMENTS...]
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
vm_or_refusal
script=$here/$1
shift
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
words=''
if grep -q ' expect DIR' "$script"; then
    sh "$script" "$PWD/bin" expect "$dir" "$@" || exit 1
    words="compare $dir"
fi
# shellcheck disable=SC2086
"$here/nep-vm" -n 4 -t "${NEP_VM_LIMIT:-400}" -- sh "$script" "$PWD/bin" $words "$@"
