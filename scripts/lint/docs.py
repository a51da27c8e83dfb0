#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Documents: links between files lead somewhere; the README's C example is examples/first.c, which
the tests compile and run; files and identifiers named in backquotes, and documents named
in code, exist."""
import os
import re
import subprocess
import sys

LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(#[^)]*)?\)")
NAMED = re.compile(r"`((?:base|transport|placement|dispatch|perftest|tools|tests|scripts|examples|"
                   r"docs|include|cmake|data)/[A-Za-z0-9_./-]+\.[a-z]+)`")
IDENTIFIER = re.compile(r"`([A-Za-z][A-Za-z0-9]*_[A-Za-z0-9_]+)`")


def check(path, faults, words):
    with open(path, encoding="utf-8") as file:
        text = file.read()
    for match in IDENTIFIER.finditer(text):
        if match.group(1) not in words:
            faults.append(f"{path}: names {match.group(1)}, which is nowhere in the sources")
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
    faults, words = [], set()
    for path in subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True,
                               capture_output=True, text=True).stdout.split("\n"):
        words.add(os.path.basename(path).split(".")[0])
        if re.search(r"\.(c|h|cu|cuh|cc|sh|py|txt|cmake)$|^\.ci/run$", path):
            with open(path, encoding="utf-8", errors="replace") as file:
                words.update(re.findall(r"[A-Za-z_][A-Za-z0-9_]*", file.read()))
    texts = {path: check(path, faults, words) for path in listed if os.path.exists(path)}
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
