#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# usage: run.sh BUILD_TREE TEST.py: runs it with the package in the build tree and a python3 that has
# torch (NEP_PYTHON, else the system's, else the first in PATH).
set -euo pipefail
tree=$1 test=$2
here=$(cd "$(dirname "$0")" && pwd)
export PYTHONPATH=$tree/python:$here/../../python/deep_ep:$here PYTHONDONTWRITEBYTECODE=1
for python in ${NEP_PYTHON:-} /usr/bin/python3 python3; do
    if "$python" -c 'import torch' 2> /dev/null; then
        exec "$python" "$here/$test"
    fi
done
echo "python: no python3 with torch here (Debian: python3-torch); looked at the refusal alone"
exec python3 -c 'import nearep
try:
    nearep.Comm.from_torch()
    raise SystemExit("a communicator from torch without torch")
except ImportError as error:
    print(error)'
