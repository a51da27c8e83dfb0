#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Python: flake8 on all of it; types (mypy) and docstrings of what the packages offer. torch need not
# be here. A few seconds.
set -uo pipefail
cd "$(dirname "$0")/../.." || exit 1
failed=0
mapfile -t files < <(git ls-files '*.py')
flake8 --isolated --max-line-length 120 "${files[@]}" || failed=1
cache=$(mktemp -d)
trap 'rm -rf "$cache"' EXIT
mypy --config-file python/mypy.ini --cache-dir "$cache" \
    python/nearep python/deep_ep/deep_ep python/deep_ep/deep_ep_cpp.py || failed=1
scripts/lint/docstrings.py python/nearep python/deep_ep || failed=1
exit "$failed"
