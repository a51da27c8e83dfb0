#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""nep-perf ep as scripts outside the repository call it: exit statuses, one line on bad arguments,
the JSON keys, equal digests whatever carries the bytes, a lost rank named, nobody left behind.

usage: nep_perf.py NEP_PERF TRACE
"""
import json
import os
import signal
import struct
import subprocess
import sys
import tempfile
import time
import unittest

PERF, TRACE = sys.argv[1], sys.argv[2]
SMALL = ["--tokens", "24", "--hidden", "128", "--experts", "32", "--top-k", "4", "--iters", "4"]
# Steps that outlast two deaths, and end: fewer where a sanitizer makes each slow.
LONG = max(3000, 12000 * int(os.environ.get("NEP_TEST_SCALE", "100")) // 100)
TIMES = {"p50", "p99", "max"}
KEYS = {
    "dispatch_us", "combine_us", "total_us", "wire_bytes_per_rank", "wire_floor_bytes_per_rank",
    "intra_bytes_per_rank", "remote_nodes_per_token", "local_token_share", "imbalance_rank",
    "imbalance_node", "wrong_elements", "output_digest", "wire_bytes_max_node", "config"}


def run(*args, **env):
    return subprocess.run([PERF, "ep", *args], capture_output=True, text=True, timeout=120,
                          check=False, env={**os.environ, **env})


def result(*args):
    done = run(*SMALL, "--json", "-", *args)
    if done.returncode != 0:
        raise AssertionError(f"{args}: {done.returncode}: {done.stderr}")
    return json.loads(done.stdout)


def children(pid):
    with open(f"/proc/{pid}/task/{pid}/children", encoding="ascii") as file:
        return [int(child) for child in file.read().split()]


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii") as file:
            return file.read().rsplit(")", 1)[1].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


def start_long(*more, seconds=1.0):
    """Ranks that run until something happens to them, and have had so long to make their group."""
    job = subprocess.Popen([PERF, "ep", *SMALL, "--ranks", "4", "--ranks-per-node", "2", "--iters",
                            "10000000", *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                           env={**os.environ, "NEP_TIMEOUT": "10s"})
    deadline = time.monotonic() + 30
    while len(children(job.pid)) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(seconds)
    return job, children(job.pid)


class Arguments(unittest.TestCase):
    def test_bad_arguments_exit_2_one_line(self):
        for args in (["--foo"], ["--tokens", "x"], ["--ranks", "0"], ["--hidden", "17"],
                     ["--top-k", "33"], ["--executor", "tpu"], ["--layout", "foo"],
                     ["--ranks", "3", "--ranks-per-node", "2,2"], ["--routing", "trace:/no/file"],
                     ["--map", "/no/file"], ["--tokens"], ["--threads=1"], ["--outstanding", "9"],
                     ["--intra", "nothing"], ["--inter", "nothing"],
                     ["--record", "x", "--baseline", "mpi"], ["--record-ppm", "1000001"]):
            with self.subTest(args=args):
                done = run(*args)
                self.assertEqual(done.returncode, 2, done.stderr)
                self.assertEqual(len(done.stderr.strip().split("\n")), 1, done.stderr)
                self.assertEqual(done.stdout, "")

    def test_help_names_every_option_of_the_fixed_interface(self):
        text = run("--help").stdout
        for option in ("ranks", "ranks-per-node", "threads", "tokens", "hidden", "experts", "top-k",
                       "layout", "dtype", "wire", "packed", "padded", "memory", "executor", "intra",
                       "inter", "routing", "layer", "map", "homes", "outstanding", "iters",
                       "warmup", "seed", "verify", "baseline", "on-fault", "json", "version"):
            self.assertIn(f"--{option}", text)


class Results(unittest.TestCase):
    def test_keys_and_consistency(self):
        got = result("--verify")
        self.assertLessEqual(KEYS, set(got))
        for key in ("dispatch_us", "combine_us", "total_us"):
            self.assertEqual(set(got[key]), TIMES)
            self.assertLessEqual(got[key]["p50"], got[key]["max"])
        self.assertEqual(got["wrong_elements"], 0)
        self.assertEqual(got["remote_rows"], got["remote_rows_back"])
        # floor: rows, both ways, of hidden bf16 each, a rank and iteration
        rows = got["remote_rows"]
        self.assertAlmostEqual(got["wire_floor_bytes_per_rank"], rows * 2 * 128 * 2 / 4 / 8, 2)
        self.assertGreaterEqual(got["wire_bytes_per_rank"], got["wire_floor_bytes_per_rank"])
        self.assertIsNone(result()["wrong_elements"])

    def test_wire_bytes_are_rows_and_headers(self):
        # What is not rows must not depend on the size of a row: the same headers, byte for byte.
        def headers(*args):
            got = result(*args)
            return got["wire_bytes_per_rank"] - got["wire_floor_bytes_per_rank"]
        for layout in ("expert", "rank"):
            want = headers("--layout", layout)
            self.assertGreater(want, 0)
            for hidden in ("16", "1024", "7168"):
                self.assertAlmostEqual(headers("--layout", layout, "--hidden", hidden), want, 2)

    def test_digest_same_whatever_carries(self):
        want = result()["output_digest"]
        for args in (["--threads"], ["--layout", "rank"], ["--padded"], ["--memory", "private"],
                     ["--inter", "adversary:shm"]):
            with self.subTest(args=args):
                self.assertEqual(result("--verify", *args)["output_digest"], want)
        self.assertNotEqual(result("--seed", "2")["output_digest"], want)

    def test_one_node_sends_nothing(self):
        got = result("--ranks", "3", "--ranks-per-node", "3", "--verify")
        self.assertEqual((got["wire_bytes_per_rank"], got["local_token_share"]), (0, 1))

    def test_trace_runs_and_is_checked(self):
        got = result("--routing", f"trace:{TRACE}", "--verify")
        self.assertEqual(got["wrong_elements"], 0)
        self.assertGreater(got["remote_rows"], 0)
        self.assertEqual(got["remote_rows"], got["predicted_remote_rows"])

    def test_record_writes_what_was_routed(self):
        with tempfile.TemporaryDirectory() as folder:
            got = result("--record", os.path.join(folder, "%r.nept"), "--record-ppm", "1000000")
            names = [f"{r}.nept" for r in range(8)]
            self.assertEqual(sorted(os.listdir(folder)), names)
            for name in names:
                with open(os.path.join(folder, name), "rb") as file:
                    data = file.read()
                layers, experts, top_k, requests = struct.unpack_from("<4I", data, 12)
                tokens = struct.unpack_from("<Q", data, 40 - 8)[0]
                self.assertEqual((layers, experts, top_k, requests, tokens),
                                 (1, 32, 4, 24, 24 * (4 + 5)))  # --warmup 5
        self.assertEqual(got["output_digest"], result()["output_digest"])

    def test_launcher_environment_decides(self):
        env = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
               "MASTER_PORT": str(20000 + os.getpid() % 20000)}
        jobs = [subprocess.Popen([PERF, "ep", *SMALL, "--verify", "--json", "-"], text=True,
                                 stdout=subprocess.PIPE, env={**os.environ, **env, "RANK": rank})
                for rank in "01"]
        out = [job.communicate(timeout=60)[0] for job in jobs]
        self.assertEqual([job.returncode for job in jobs], [0, 0])
        self.assertEqual(json.loads(out[0])["config"]["ranks"], 2)
        self.assertEqual(out[1], "")


class Faults(unittest.TestCase):
    def test_killed_rank_named_in_time(self):
        job, pids = start_long()
        os.kill(pids[2], signal.SIGKILL)
        _, errors = job.communicate(timeout=20)  # 2 x NEP_TIMEOUT
        self.assertEqual(job.returncode, 1)
        self.assertIn("rank 2", errors)
        self.assertFalse([pid for pid in pids if is_running(pid)])

    def test_continue_goes_on_without_two_ranks_and_checks_every_element(self):
        for inter in ("shm", "ucx"):
            with self.subTest(inter=inter):
                for seconds in (1, 5, 25):
                    job, pids = start_long("--on-fault", "continue", "--iters", str(LONG),
                                           "--verify", "--json", "-", "--inter", inter,
                                           seconds=seconds)
                    os.kill(pids[2], signal.SIGKILL)
                    time.sleep(0.7)
                    if is_running(pids[0]):
                        os.kill(pids[0], signal.SIGKILL)
                    output, errors = job.communicate(timeout=300)
                    if "_create: " not in errors:  # else there was no group yet that could go on
                        break
                self.assertEqual(job.returncode, 0, errors)
                found = json.loads(output)
                self.assertEqual(found["lost_ranks"], [0, 2], errors)
                self.assertEqual(found["wrong_elements"], 0)
                self.assertIn("rank 2 lost", errors)

    def test_continue_needs_ranks_of_its_own(self):
        self.assertEqual(run("--on-fault", "continue", "--threads").returncode, 2)

    def test_slow_rank_is_the_column_that_others_wait_for(self):
        found = result("--ranks", "4", "--ranks-per-node", "2")
        self.assertEqual([len(row) for row in found["wait_ms"]], [4] * 4)
        self.assertIn("counts", found["wait_ms_by_phase"])

    def test_children_end_with_the_parent(self):
        job, pids = start_long()
        job.kill()
        job.communicate(timeout=20)
        deadline = time.monotonic() + 10
        while any(map(is_running, pids)) and time.monotonic() < deadline:
            time.sleep(0.02)
        self.assertFalse([pid for pid in pids if is_running(pid)])

    def test_stopped_rank_is_waited_for(self):
        job, pids = start_long()
        os.kill(pids[1], signal.SIGSTOP)
        time.sleep(3)
        os.kill(pids[1], signal.SIGCONT)
        time.sleep(1)
        self.assertIsNone(job.poll())
        self.assertEqual([pid for pid in pids if is_running(pid)], pids)
        job.kill()
        job.communicate(timeout=20)


del sys.argv[1:]
unittest.main()
