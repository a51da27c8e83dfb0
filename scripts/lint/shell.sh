#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Shell scripts by shellcheck.
set -euo pipefail
cd "$(git rev-parse --show-toplevel)"
mapfile -t files < <(git ls-files -co --exclude-standard | xargs grep -lE '^#!.*\b(ba)?sh\b' 2> /dev/null)
shellcheck -x -S warning "${files[@]}"
echo "shell: ${#files[@]} scripts looked at"
