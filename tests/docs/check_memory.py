#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""usage: check_memory.py NEP_INFO: the formula in docs/memory.md, run as it stands there, gives what
nep-info --region prints, part by part."""
import json
import os
import re
import subprocess
import sys

SHAPES = [
    dict(R=8, G=4, M=128, H=7168, E=256, K=8),
    dict(R=64, G=8, M=128, H=7168, E=256, K=8),
    dict(R=4, G=4, M=1024, H=7168, E=256, K=8),
    dict(R=6, G=1, M=7, H=16, E=5, K=3, S=2),
    dict(R=12, G=3, M=4096, H=2048, E=60, K=6, S=3),
    dict(R=16, G=2, M=1, H=4096, E=129, K=1, L=12),
    dict(R=16, G=8, M=256, H=5120, E=160, K=32, S=8),
]


def main():
    path = os.path.join(os.path.dirname(__file__), "..", "..", "docs", "memory.md")
    with open(path, encoding="utf-8") as file:
        code = re.search(r"```python\n(.*?)```", file.read(), re.S).group(1)
    scope = {}
    exec(code, scope)  # pylint: disable=exec-used
    failed = 0
    for shape in SHAPES:
        command = [sys.argv[1], "--region", "--json", "-", "--ranks", str(shape["R"]),
                   "--ranks-per-node", str(shape["G"]), "--tokens", str(shape["M"]),
                   "--hidden", str(shape["H"]), "--experts", str(shape["E"]),
                   "--top-k", str(shape["K"]), "--outstanding", str(shape.get("S", 1))]
        if "L" in shape:
            command += ["--slots", str(shape["L"])]
        printed = json.loads(subprocess.run(command, check=True, capture_output=True,
                                            text=True).stdout)["region"]
        parts = scope["region"](**shape)
        for name, value in parts.items():
            if printed[name + "_bytes"] != value:
                print(f"{shape}: {name} is {printed[name + '_bytes']}, docs/memory.md says {value}")
                failed = 1
        if printed["region_bytes"] != sum(parts.values()):
            print(f"{shape}: region is {printed['region_bytes']}, not {sum(parts.values())}")
            failed = 1
    print(f"memory: {len(SHAPES)} shapes compared with the formula of docs/memory.md")
    return failed


sys.exit(main())
