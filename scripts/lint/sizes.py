#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sizes of files and functions by folder (ctags). Fails on a function over 100 lines, a file over
1000, or one over 600 whose head comment does not say why ("long because")."""
import collections
import os
import subprocess
import sys

SUFFIXES = (".c", ".h", ".cu", ".cuh")


def percentile(values, share):
    values = sorted(values)
    return values[min(len(values) - 1, int(len(values) * share))] if values else 0


def functions(paths):
    out = subprocess.run(
        ["ctags", "-f", "-", "--languages=C,C++", "--langmap=C++:+.cu.cuh", "--kinds-C=f",
         "--kinds-C++=f", "--fields=+ne", *paths], check=True, capture_output=True, text=True).stdout
    for line in out.split("\n"):
        fields = line.split("\t")
        if len(fields) < 4 or line.startswith("!"):
            continue
        extra = dict(f.split(":", 1) for f in fields[3:] if ":" in f)
        if "line" in extra and "end" in extra:
            yield fields[1], fields[0], int(extra["line"]), int(extra["end"])


def main():
    os.chdir(subprocess.run(["git", "rev-parse", "--show-toplevel"], check=True,
                            capture_output=True, text=True).stdout.strip())
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], check=True,
                            capture_output=True, text=True).stdout.split("\n")
    paths = [p for p in listed if p.endswith(SUFFIXES) and os.path.exists(p)]
    lines, comments, heads = {}, collections.Counter(), {}
    for path in paths:
        with open(path, encoding="utf-8", errors="replace") as text:
            content = text.read().split("\n")
        lines[path] = len(content) - 1
        heads[path] = "\n".join(content[:40])
        comments[path] = sum(1 for c in content if c.lstrip().startswith(("/*", "*", "//")))
    spans = collections.defaultdict(list)
    faults, notes = [], []
    for path, name, first, last in functions(paths):
        size = last - first + 1
        spans[path.split("/")[0]].append(size)
        if size > 100:
            faults.append(f"{path}:{first}: {name} has {size} lines, more than 100")
        elif size > 60:
            notes.append(f"{path}:{first}: {name} has {size} lines")
    for path, count in lines.items():
        if count > 1000 or (count > 600 and "long because" not in heads[path]):
            faults.append(f"{path}: {count} lines; over 600 the head says 'long because ...'")
        elif count > 300:
            notes.append(f"{path}: {count} lines")
    print(f"{'folder':<10} {'files':>5} {'lines':>6} {'lines/file med/p95/max':>23} "
          f"{'functions':>9} {'lines/function med/p95/max':>26} {'comment':>7}")
    for folder in sorted({p.split("/")[0] for p in paths}):
        here = [p for p in paths if p.split("/")[0] == folder]
        sizes = [lines[p] for p in here]
        total, span = sum(sizes), spans[folder]
        medians = "{} / {} / {}".format(percentile(sizes, .5), percentile(sizes, .95), max(sizes))
        inner = "{} / {} / {}".format(percentile(span, .5), percentile(span, .95),
                                      max(span, default=0))
        share = 100 * sum(comments[p] for p in here) // max(total, 1)
        print(f"{folder:<10} {len(here):>5} {total:>6} {medians:>23} {len(span):>9} {inner:>26} "
              f"{share:>6}%")
    for note in sorted(notes):
        print("note:", note)
    for fault in sorted(faults):
        print("TOO LONG:", fault)
    return 1 if faults else 0


sys.exit(main())
