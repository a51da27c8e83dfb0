#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Runs a script of this folder in a guest with four devices; the working directory is the build
# tree. usage: test_guest.sh SCRIPT [ARGUMENTS...]
set -u
here=$(cd "$(dirname "$0")" && pwd)
# shellcheck source=tests/vm/lib.sh
. "$here/lib.sh"
vm_or_refusal
script=$1
shift
exec "$here/nep-vm" -n 4 -t "${NEP_VM_LIMIT:-400}" -- sh "$here/$script" "$PWD/bin" "$@"
