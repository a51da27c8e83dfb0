#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: install.sh SOURCE: what a user does. An sdist is made from the sources and installed with pip
# into a new environment, deep_ep beside it; both are used from another folder. Needs a package index
# for the build's own packages; without one it says so.
set -euo pipefail
source=$1
temporary=$(mktemp -d)
trap 'rm -rf "$temporary"' EXIT
python=/usr/bin/python3
[ -x "$python" ] || python=python3
"$python" -m venv --system-site-packages "$temporary/venv" || exit 1
pip=("$temporary/venv/bin/pip" --disable-pip-version-check -q)
if ! "${pip[@]}" install 'scikit-build-core>=0.10' 'setuptools>=61' wheel 2> "$temporary/log"; then
    tail -n 3 "$temporary/log"
    echo "install: no package index here: nothing was installed"
    exit 0
fi
(cd "$source" && "$temporary/venv/bin/python" -c "
from scikit_build_core.build import build_sdist
print(build_sdist('$temporary'))")
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
NEP_CUDA=OFF "${pip[@]}" install --no-build-isolation "$temporary"/nearep-*.tar.gz
cp -r "$source/python/deep_ep" "$temporary/deep_ep" # setuptools writes beside its sources
"${pip[@]}" install --no-build-isolation --no-deps "$temporary/deep_ep"
cd /
env -u PYTHONPATH "$temporary/venv/bin/python" -c "
import os, nearep
assert os.path.dirname(nearep.__file__).startswith('$temporary'), nearep.__file__
assert os.path.exists(os.path.join(os.path.dirname(nearep.__file__), 'py.typed'))
try:
    nearep.Comm(0, 1, allgather=lambda value: [value]).ep(num_experts=2, top_k=1, hidden=16, max_tokens=4,
                                                          executor='cuda')
except nearep.Error as error:
    print('without a GPU:', error)
print('nearep', nearep.__version__, 'installed and used')
try:
    import torch
except ImportError:
    print('deep_ep: no torch here')
else:
    import deep_ep, deep_ep.utils, deep_ep_cpp
    print('deep_ep', deep_ep.__version__, deep_ep.Buffer.get_dispatch_config(48).num_sms)"
