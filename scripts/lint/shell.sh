#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Shell scripts by shellcheck.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
mapfile -t bash < <(git grep -lE '^#!.*\bbash\b' -- ':!*.md')
mapfile -t posix < <(git grep -lE '^#!.*[/ ]sh$' -- ':!*.md') # for the guest's busybox
# SC2154: a test gets its folders from the lib.sh that it sources.
shellcheck -x -S warning -e SC2154 "${bash[@]}"
if [ ${#posix[@]} != 0 ]; then
    shellcheck -s dash -S error "${posix[@]}"
fi
echo "shell: $((${#bash[@]} + ${#posix[@]})) scripts looked at"
