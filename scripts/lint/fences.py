#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Where threads and ranks hand memory to one another: every file with a release, an acquire or a
fence is named in docs/memory-model.md, which says what pairs with what. Prints the table."""
import collections
import os
import re
import subprocess
import sys

ORDER = re.compile(r"memory_order_(release|acquire|acq_rel|seq_cst)|"
                   r"__ATOMIC_(RELEASE|ACQUIRE|ACQ_REL|SEQ_CST)|"
                   r"(?<!\w)(atomic_thread_fence|_mm_sfence|__threadfence\w*)\s*\(")


def main():
    os.chdir(subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True,
                            capture_output=True, text=True).stdout.strip())
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True,
                            capture_output=True, text=True).stdout.split("\n")
    with open("docs/memory-model.md", encoding="utf-8") as file:
        document = file.read()
    missing, total = [], 0
    for path in listed:
        if not re.match(r"(base|transport|placement|dispatch)/.*\.(c|h|cu|cuh)$", path):
            continue
        with open(path, encoding="utf-8") as file:
            found = collections.Counter(
                next(group for group in match if group).lower()
                for match in ORDER.findall(file.read()))
        if not found:
            continue
        total += 1
        print(f"{path:<36} " + ", ".join(f"{count} {kind}" for kind, count in sorted(found.items())))
        if path not in document:
            missing.append(path)
    for path in missing:
        print(f"{path}: docs/memory-model.md does not name it")
    print(f"fences: {total} files hand memory over, {len(missing)} of them undocumented")
    return 1 if missing else 0


sys.exit(main())
