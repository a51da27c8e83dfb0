#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Traces of the wire, read by Python's JSON parser: every post has its arrival, later on the common
clock; calls nest; a killed rank leaves a trace with the fault in it; nep-info joins what ranks wrote
and refuses what they did not. Usage: nep_trace.py NEP_PERF NEP_INFO TEST_MULTI_KILL"""
import collections
import glob
import json
import os
import re
import subprocess
import sys
import tempfile

PERF, INFO, KILL = sys.argv[1:4]
SHAPE = ["--ranks", "4", "--ranks-per-node", "2", "--hidden", "256", "--experts", "16",
         "--top-k", "4", "--warmup", "0"]


def run(command, env=None, status=0):
    done = subprocess.run(command, env={**os.environ, **(env or {})}, capture_output=True,
                          text=True, timeout=120, check=False)
    assert done.returncode == status, (command, done.returncode, done.stdout, done.stderr)
    return done


def load(path):
    with open(path, encoding="utf-8") as file:
        return json.load(file)


def check_nesting(events):
    open_calls = collections.Counter()
    for event in events:
        row = event.get("pid"), event.get("tid")
        if event["ph"] == "B":
            open_calls[row] += 1
        elif event["ph"] == "E":
            open_calls[row] -= 1
            assert open_calls[row] >= 0, event
    assert not any(open_calls.values()), open_calls


def arrows(dumps):
    """Times of posts and arrivals by id; an id may come back after 256 operations, not here."""
    posts, arrivals = collections.defaultdict(list), collections.defaultdict(list)
    for dump in dumps:
        for event in dump["traceEvents"]:
            if event["ph"] in "sf":
                (posts if event["ph"] == "s" else arrivals)[event["id"]].append(event["ts"])
    return posts, arrivals


def test_whole(folder, inter):
    out = os.path.join(folder, "perf.json")
    perf = [PERF, "ep", *SHAPE, "--tokens", "60", "--iters", "4", "--inter", inter, "--json", out]
    run(perf, {"NEP_TRACE": os.path.join(folder, "t.%r.json")})
    dumps = [load(os.path.join(folder, f"t.{rank}.json")) for rank in range(4)]
    for rank, dump in enumerate(dumps):
        assert dump["rank"] == rank and dump["numRanks"] == 4 and dump["node"] == rank // 2
        assert dump["clockErrorNs"] < 100000, "ranks of one machine read one clock"
        assert dump["eventsLost"] == 0
        times = [event["ts"] for event in dump["traceEvents"] if event["ph"] in "BEsf"]
        assert times == sorted(times)
        check_nesting(dump["traceEvents"])
        ops = {event["args"]["op"] for event in dump["traceEvents"] if event["ph"] == "B"}
        assert ops == set(range(8)), ops  # 4 dispatches and 4 combines
    posts, arrivals = arrows(dumps)
    slack = 2e-3 * max(dump["clockErrorNs"] for dump in dumps)  # microseconds
    assert posts and set(posts) == set(arrivals), (len(posts), len(arrivals))
    for number, sent in posts.items():
        assert len(sent) == 1
        assert len(arrivals[number]) >= 1  # the adversary repeats
        assert inter != "shm" or len(arrivals[number]) == 1
        assert arrivals[number][0] > sent[0] - slack, (sent, arrivals[number])
    print(f"whole, {inter}: {len(posts)} posts and their arrivals, clocks within {slack:.3f} us")


def test_ring_is_bounded(folder):
    perf = [PERF, "ep", *SHAPE, "--tokens", "60", "--iters", "40"]
    run(perf, {"NEP_TRACE": os.path.join(folder, "b"), "NEP_TRACE_EVENTS": "64"})
    for rank in range(4):
        dump = load(os.path.join(folder, f"b.{rank}"))
        assert dump["eventsLost"] > 0
        assert len([e for e in dump["traceEvents"] if e["ph"] in "BEX"]) <= 64
        for event in dump["traceEvents"]:  # an end without its beginning is left out
            assert event["ph"] in "BEMXsfi"
    run(perf, {"NEP_TRACE": os.path.join(folder, "none"), "NEP_TRACE_EVENTS": "0"})
    assert not glob.glob(os.path.join(folder, "none*"))
    print("ring: bounded, and off where it is 0")


def test_fault(folder):
    """test_multi_kill's ranks die at chosen points inside of operations, three groups in turn."""
    done = subprocess.run([KILL], capture_output=True, text=True, timeout=250, check=False,
                          env={**os.environ, "NEP_TRACE": os.path.join(folder, "f.%r")})
    assert done.returncode == 0, done.stdout + done.stderr
    num = 0
    for path in glob.glob(os.path.join(folder, "f.*")):
        faults = [e for e in load(path)["traceEvents"] if e.get("name") == "fault"]
        assert len(faults) <= 1
        for fault in faults:
            assert f"rank {fault['args']['rank']}" in fault["args"]["message"], fault
            num += 1
    assert num > 0
    print(f"fault: {num} traces name the rank that died")


def test_merge(folder):
    paths = [os.path.join(folder, f"t.{rank}.json") for rank in range(4)]
    joined = os.path.join(folder, "all.json")
    done = run([INFO, "--merge-traces", joined, *paths])
    assert "4 of 4 ranks" in done.stderr, done.stderr
    merged = load(joined)
    single = [event for path in paths for event in load(path)["traceEvents"]]
    assert merged["traceEvents"] == single
    assert {event["pid"] for event in single} == {0, 1, 2, 3}
    assert json.loads(run([INFO, "--merge-traces", "-", paths[1]]).stdout)["numDumps"] == 1
    bad = os.path.join(folder, "bad")
    with open(paths[0], encoding="utf-8") as file:
        text = file.read()
    for content in ("", "{", text[:-3], "[1, 2]", text.replace('"rank":0', '"rank":9', 1), text + "x",
                    text.replace('"rank":0,', "", 1), text.replace("traceEvents", "events", 1)):
        with open(bad, "w", encoding="utf-8") as file:
            file.write(content)
        done = run([INFO, "--merge-traces", joined, bad], status=2)
        assert done.stderr.startswith("nep-info: " + bad) and done.stderr.count("\n") == 1
    run([INFO, "--merge-traces", joined, paths[0], paths[0]], status=2)
    run([INFO, "--merge-traces", joined, os.path.join(folder, "absent")], status=2)
    run([INFO, "--merge-traces", joined], status=2)
    run([INFO, "--merge-traces", os.path.join(folder, "no/such/folder"), paths[0]], status=1)
    print("merge: joined, and bad files refused")


def test_metrics(folder):
    """By the grammar of the text format: families stand together under one HELP and TYPE."""
    out, json_out = os.path.join(folder, "m.%r"), os.path.join(folder, "m.json")
    run([PERF, "ep", *SHAPE, "--tokens", "60", "--iters", "7", "--metrics", out, "--json", json_out])
    sample = re.compile(r'^([a-z][a-z0-9_]*)\{((?:[a-z_]+="[^"\\]*",?)*)\} ([0-9]+(?:\.[0-9]+)?)$')
    for rank in range(4):
        with open(os.path.join(folder, f"m.{rank}"), encoding="utf-8") as file:
            lines = file.read().split("\n")
        assert lines.pop() == ""
        family, seen, values = None, set(), {}
        for line in lines:
            if line.startswith("# HELP "):
                family = line.split()[2]
                assert family not in seen, f"{family} twice"
                seen.add(family)
            elif line.startswith("# TYPE "):
                _, _, name, kind = line.split()
                assert name == family and kind in ("counter", "gauge")
                assert (kind == "counter") == name.endswith("_total"), line
            else:
                name, labels, value = sample.match(line).groups()
                assert name == family and f'rank="{rank}",node="{rank // 2}"' in labels, line
                assert (name, labels) not in values, line
                values[name, labels] = float(value)
        one = {name: value for (name, labels), value in values.items() if "phase" not in labels}
        assert one["nearep_dispatches_total"] == one["nearep_combines_total"] == 7
        assert one["nearep_tokens_total"] == 7 * 60 and one["nearep_broken"] == 0
        assert one["nearep_live_ranks"] == one["nearep_seats"] == 4
        assert one["nearep_wire_bytes_total"] > 0
        waits = sum(v for (name, _), v in values.items() if name == "nearep_wait_seconds_total")
        assert abs(waits - one["nearep_idle_seconds_total"]) < 1e-3, (waits, one)
    print(f"metrics: {len(seen)} families, {len(values)} samples")


def main():
    with tempfile.TemporaryDirectory() as folder:
        test_whole(folder, "adversary")
        test_whole(folder, "shm")
        test_ring_is_bounded(folder)
        test_fault(folder)
        test_merge(folder)
        test_metrics(folder)


main()
