#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Sums up what gcov knows of base, transport and dispatch. coverage.py BUILD_FOLDER MINIMUM
A line counts once, run if any object that holds it ran it (headers are in many)."""
import collections
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile

FOLDERS = ("base", "transport", "dispatch")


def notes(build):
    for folder, _, files in os.walk(build):
        for name in files:
            if name.endswith(".gcno") and re.search(r"nep_(base|transport|dispatch|verbs)", folder + name):
                yield os.path.abspath(os.path.join(folder, name))


def collect(build, root):
    lines = collections.defaultdict(dict)  # file -> line -> run
    with tempfile.TemporaryDirectory() as folder:
        for note in notes(build):
            subprocess.run(["gcov", "--json-format", "--hash-filenames", "-o", os.path.dirname(note), note],
                           cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                           check=False)
        for name in os.listdir(folder):
            with gzip.open(os.path.join(folder, name), "rt", encoding="utf-8") as file:
                data = json.load(file)
            here = data["current_working_directory"]
            for source in data["files"]:
                path = os.path.relpath(os.path.normpath(os.path.join(here, source["file"])), root)
                if path.split("/")[0] in FOLDERS:
                    for line in source["lines"]:
                        number = line["line_number"]
                        lines[path][number] = lines[path].get(number, False) or line["count"] > 0
    return lines


def ranges(numbers):
    text, first, last = [], None, None
    for number in sorted(numbers) + [None]:
        if first is not None and number is not None and number <= last + 2:
            last = number
            continue
        if first is not None:
            text.append(str(first) if first == last else f"{first}-{last}")
        first = last = number
    return ", ".join(text)


def main():
    build, minimum = sys.argv[1], float(sys.argv[2])
    lines = collect(build, os.getcwd())
    totals = collections.defaultdict(lambda: [0, 0])
    print("| file | lines | run | % | not run |\n|---|---|---|---|---|")
    for path in sorted(lines):
        missed = [number for number, run in lines[path].items() if not run]
        num, run = len(lines[path]), len(lines[path]) - len(missed)
        for key in (path.split("/")[0], "all"):
            totals[key][0] += num
            totals[key][1] += run
        if missed:
            print(f"| `{path}` | {num} | {run} | {100 * run / num:.1f} | {ranges(missed)} |")
    print("\n| folder | lines | run | % |\n|---|---|---|---|")
    for key in (*FOLDERS, "all"):
        num, run = totals[key]
        print(f"| {key} | {num} | {run} | {100 * run / max(num, 1):.1f} |")
    share = 100 * totals["all"][1] / max(totals["all"][0], 1)
    if share < minimum:
        print(f"coverage: {share:.1f} % of lines, less than {minimum} %", file=sys.stderr)
        return 1
    return 0


sys.exit(main())
