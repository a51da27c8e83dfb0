#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Documents: links between files lead somewhere; the README's C example is examples/first.c, which
the tests compile and run; files named in backquotes, and documents named in code, exist."""
import os
import re
import subprocess
import sys

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
NAMED = re.compile(r"`((?:base|transport|placement|dispatch|perftest|tools|tests|scripts|examples|"
                   r"docs|include|cmake|data)/[A-Za-z0-9_./-]+\.[a-z]+)`")


def check(path, faults):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for match in LINK.finditer(text):
        target = match.group(1)
        if "://" not in target and not target.startswith("mailto:") and not os.path.exists(
                os.path.join(os.path.dirname(path), target)):
            faults.append(f"{path}: link to {target}, which is not there")
    for match in NAMED.finditer(text):
        if not os.path.exists(match.group(1)):
            faults.append(f"{path}: names {match.group(1)}, which is not there")
    return text


def main():
    os.chdir(subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True,
                            capture_output=True, text=True).stdout.strip())
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.md"], check=True,
                            capture_output=True, text=True).stdout.split()
    faults = []
    texts = {path: check(path, faults) for path in listed if os.path.exists(path)}
    readme = texts.get("README.md", "")
    if os.path.exists("examples/first.c"):
        with open("examples/first.c", encoding="utf-8") as file:
            if "```c\n" + file.read() + "```" not in readme:
                faults.append("README.md: its C example is not the text of examples/first.c")
    code = subprocess.run(["git", "grep", "-noE", r"docs/[a-z_-]+\.md", "--", ":!docs", ":!*.md"],
                          capture_output=True, text=True, check=False).stdout.split("\n")
    for line in filter(None, code):
        if not os.path.exists(line.rsplit(":", 1)[1]):
            faults.append(f"{line}, which is not there")
    for fault in faults:
        print(fault)
    print(f"docs: {len(texts)} documents looked at")
    return 1 if faults else 0


sys.exit(main())
