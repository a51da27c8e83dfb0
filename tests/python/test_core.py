# SPDX-License-Identifier: Apache-2.0
"""The nearep package by itself: declarations, arrays, errors, halves, maps, queue, traces, EPLB."""
import array
import ctypes
import json
import mmap
import os
import re
import subprocess
import tempfile
import threading
import time
import unittest

import nearep
import numpy
import torch
from nearep import _abi, eplb, tensors
from ranks import equal, must, run, world

HEADER = os.path.join(os.path.dirname(os.path.abspath(__file__)), "../../include/nearep.h")


def alone(**options):
    return nearep.Comm(0, 1, allgather=lambda value: [value], **options)


class DeclarationsTest(unittest.TestCase):
    def test_structures_are_the_compilers(self):
        kinds = [kind for kind in vars(_abi).values() if isinstance(kind, type) and kind.__module__ == _abi.__name__]
        self.assertGreater(len(kinds), 20)
        lines = ['#include <stdio.h>', '#include <stddef.h>', '#include "nearep.h"', "int main(void) {"]
        for kind in kinds:
            name = kind.__name__
            lines.append(f'printf("{name} %zu\\n", sizeof(struct {name}));')
            lines += [f'printf("{name}.{field[0]} %zu\\n", offsetof(struct {name}, {field[0]}));'
                      for field in kind._fields_]
        with tempfile.TemporaryDirectory() as folder:
            source, program = os.path.join(folder, "a.c"), os.path.join(folder, "a")
            with open(source, "w", encoding="ascii") as file:
                file.write("\n".join(lines + ["return 0; }", ""]))
            subprocess.run(["gcc", "-I", os.path.dirname(HEADER), source, "-o", program], check=True)
            said = dict(line.split() for line in subprocess.run(
                [program], check=True, capture_output=True, text=True).stdout.splitlines())
        for kind in kinds:
            self.assertEqual(int(said[kind.__name__]), ctypes.sizeof(kind), kind)
            for field in kind._fields_:
                self.assertEqual(int(said[f"{kind.__name__}.{field[0]}"]), getattr(kind, field[0]).offset)

    def test_every_status_has_an_exception(self):
        with open(HEADER, encoding="utf-8") as file:
            for name, value in re.findall(r"(NEP_ERR_\w+) = (-\d+)", file.read()):
                with self.assertRaises(nearep.Error) as caught:
                    nearep.errors.raise_status(int(value), "why")
                self.assertEqual(caught.exception.name, name)

    def test_every_function_is_called_by_the_package(self):
        """Or why not. Names in the text of the package: a binding that is never called would not be there."""
        reasons = {"nep_status_name": "errors.py has the names, which need no library"}
        folder, said = os.path.dirname(nearep.__file__), ""
        for name in os.listdir(folder):
            if name.endswith(".py") and name != "_abi.py":
                with open(os.path.join(folder, name), encoding="utf-8") as file:
                    said += file.read()
        used = set(re.findall(r"lib(?:rary)?\.(nep_\w+)", said))
        declared = set(_abi.FUNCTIONS)
        self.assertEqual(used - declared, set())
        self.assertEqual(declared - used, set(reasons))


class ArraysTest(unittest.TestCase):
    def test_all_kinds_give_the_same(self):
        class Interface:
            def __init__(self, value):
                self.__array_interface__ = value.__array_interface__

        class Capsule:
            def __init__(self, value):
                self.value = value

            def __dlpack__(self, **_):
                return torch.utils.dlpack.to_dlpack(self.value)
        base = torch.arange(12, dtype=torch.float32).view(3, 4)
        for value in (base, base.numpy(), Interface(base.numpy()), Capsule(base), memoryview(base.numpy())):
            found = tensors.array_of(value)
            self.assertEqual((found.pointer, found.shape, found.dtype, found.is_cuda),
                             (base.data_ptr(), (3, 4), "fp32", False), type(value))
        self.assertEqual(tensors.array_of(Capsule(base.bfloat16())).dtype, "bf16")
        self.assertEqual(tensors.array_of(array.array("i", [1, 2])).dtype, "int32")

    def test_what_cannot_be_used_is_refused(self):
        for value in (torch.zeros(4, 4).t(), numpy.zeros((4, 4)).T, torch.zeros(2, dtype=torch.complex64), b"ab"):
            with self.assertRaises(ValueError):
                tensors.array_of(value)
        with self.assertRaises(TypeError):
            tensors.array_of(3)


class ErrorsTest(unittest.TestCase):
    def test_sentences_and_kinds(self):
        comm = alone()
        with self.assertRaisesRegex(nearep.InvalidError, "hidden is 17"):
            comm.ep(num_experts=4, top_k=2, hidden=17, max_tokens=4)
        with self.assertRaises(ValueError):
            comm.ep(num_experts=4, top_k=2, hidden=32, max_tokens=4, layout="sideways")
        ep = comm.ep(num_experts=4, top_k=2, hidden=32, max_tokens=4)
        handle = ep.handle()
        x, ids = torch.zeros(4, 32).bfloat16(), torch.zeros(4, 2, dtype=torch.int32)
        with self.assertRaisesRegex(ValueError, "topk_ids has shape"):
            ep.dispatch_send(handle, x, ids[:3])
        with self.assertRaisesRegex(nearep.InvalidError, "9"):
            ep.dispatch_send(handle, x, ids + 9)
        ep.dispatch_send(handle, x, ids)
        with self.assertRaises(nearep.BusyError):
            ep.dispatch_send(handle, x, ids)
        with self.assertRaises(nearep.RoomError):
            ep.dispatch_recv(handle, torch.zeros(1, 32).bfloat16())
        ep.dispatch_recv(handle, torch.zeros(8, 32).bfloat16())
        comm.close()
        comm.close()
        with self.assertRaisesRegex(ValueError, "closed"):
            handle.pointer
        with self.assertRaises(nearep.Error):
            nearep.Trace("/nowhere.nept")

    def test_an_exception_in_the_callers_allgather_comes_out(self):
        def fail(_):
            raise RuntimeError("the network of the caller")
        with self.assertRaises(nearep.Error) as caught:
            nearep.Comm(0, 2, allgather=fail)
        self.assertIn("the network of the caller", str(caught.exception.__cause__))


def halves(rank, ranks):
    """NumPy in, NumPy out; several operations outstanding; another thread runs while one waits."""
    comm = nearep.Comm.from_torch(ranks_per_node=[1] * ranks)
    must(comm.topology.num_nodes == ranks and comm.fault() is None, "topology")
    ep = comm.ep(num_experts=2 * ranks, top_k=2, hidden=32, max_tokens=8, dtype="fp32", outstanding=2)
    tokens = world(ranks, [8] * ranks, 32, 2 * ranks, 2)
    mine = tokens[rank]
    x, ids, weights = mine.x.float().numpy(), mine.ids.numpy(), mine.weights.numpy()
    ticks = []
    stop = threading.Event()

    def tick():
        while not stop.is_set():
            ticks.append(time.monotonic())
            time.sleep(0.002)
    ticker = threading.Thread(target=tick)
    ticker.start()
    first, second = ep.handle(), ep.handle()
    if rank == 0:
        time.sleep(0.3)
    for handle in (first, second):
        ep.dispatch_send(handle, x, ids, weights)
    received = []
    for handle in (first, second):
        counts = ep.dispatch_counts(handle)
        rows = numpy.empty((counts.num_rows, 32), numpy.float32)
        sources = numpy.empty((2, counts.num_rows), numpy.int32)
        ep.dispatch_recv(handle, rows, source_rank=sources[0], source_token=sources[1])
        want = [tokens[s].x[t].float().numpy() for s, t in sources.T]
        must(all((a == b).all() for a, b in zip(rows, want)), "rows")
        received.append((handle, rows))
    for handle, rows in received:
        ep.combine_send(handle, rows)
        out = numpy.empty_like(x)
        ep.combine_recv(handle, out)
        used = ((ids >= 0) * weights).sum(1, keepdims=True)
        must(numpy.abs(out - used * x).max() < 1e-5, "sums")
    stop.set()
    ticker.join()
    gaps = max(b - a for a, b in zip(ticks, ticks[1:]))
    must(rank == 0 or len(ticks) > 20, f"the other thread ran {len(ticks)} times, longest gap {gaps}")
    must(ep.stats()["dispatches"] == 2 and sum(ep.load()) == 2 * int((ids >= 0).sum()), "counters")
    must(comm.metrics().count("# TYPE") > 5, "metrics")
    with tempfile.TemporaryDirectory() as folder:
        comm.dump_events(os.path.join(folder, "%r.json"))
        with open(os.path.join(folder, f"{rank}.json"), encoding="utf-8") as file:
            must(len(json.load(file)["traceEvents"]) > 0, "events")
    shared = ep.empty((4, 32), torch.float32)
    must(shared.shape == (4, 32) and float(shared.abs().sum()) == 0, "memory of the pool")
    kept = ep.empty((2, 3), numpy.int32)
    kept[:] = 7
    must(int(kept.sum()) == 42, "as NumPy")


def registered(rank, ranks):
    """Memory of the caller's own: tokens, received rows and results in one shared memory object."""
    comm = nearep.Comm.from_torch()
    ep = comm.ep(num_experts=2 * ranks, top_k=2, hidden=32, max_tokens=8, dtype="fp32")
    size = (8 + ep.max_rows() + 8) * 32
    fd = os.memfd_create("rows")
    os.ftruncate(fd, size * 4)
    with mmap.mmap(fd, size * 4) as memory:
        mine = numpy.frombuffer(memory, numpy.float32).reshape(-1, 32)
        mine[:] = numpy.nan
        try:
            ep.register(numpy.zeros(16, numpy.float32))
            must(False, "memory without a file, between processes")
        except nearep.UnsupportedError as error:
            must("nep_buffer_alloc" in str(error), str(error))
        number = ep.register(mine, fd) if rank != ranks - 1 else ep.register()
        tokens = world(ranks, [8] * ranks, 32, 2 * ranks, 2)[rank]
        x, rows, out = mine[:8], mine[8:-8], mine[-8:]
        x[:] = tokens.x.float().numpy()
        for _ in range(2):
            handle = ep.handle()
            ep.dispatch_send(handle, x, tokens.ids.numpy(), tokens.weights.numpy())
            ep.dispatch_recv(handle, rows)
            ep.combine_send(handle, rows)
            ep.combine_recv(handle, out)
            used = ((tokens.ids >= 0) * tokens.weights).sum(1, keepdims=True).numpy()
            must(numpy.abs(out - used * x).max() < 1e-5, "sums")
            if number is not None:
                ep.deregister(number)  # and once more from private memory
                number = None
        del mine, x, rows, out, handle
        ep.close()
    os.close(fd)


def awaited(rank, ranks):
    """Outputs that are not written in time, and flags that cannot be."""
    comm = nearep.Comm.from_torch()
    ep = comm.ep(num_experts=2 * ranks, top_k=2, hidden=32, max_tokens=8, dtype="fp32")
    mine = world(ranks, [8] * ranks, 32, 2 * ranks, 2, absent=0)[rank]
    handle, rows, out = ep.handle(), torch.empty(ep.max_rows(), 32), torch.empty(8, 32)
    ep.dispatch_send(handle, mine.x.float(), mine.ids, mine.weights)
    ep.dispatch_recv(handle, rows)
    flags = torch.zeros(2, 9, dtype=torch.int32)
    ep.set_timeout(0.2)
    for bad, kind, word in ((dict(least=1, rows_per_flag=4), nearep.DeadlineError, "were not written"),
                            (dict(least=1, rows_per_flag=1), nearep.InvalidError, "9 flags")):
        try:
            counts = ep.dispatch_counts(handle).rows_per_slot
            ep.combine_await(handle, flags, **bad)
            must(max(counts) <= 9, f"{word}: {counts}")
        except kind as error:
            must(word in str(error), str(error))
        except nearep.DeadlineError:
            must(counts[0] <= 9, "too few flags for the first slot")
    ep.set_timeout(0)
    ep.combine_await(handle, flags + 5, 5, rows_per_flag=8)
    ep.combine_send(handle, rows)
    ep.combine_recv(handle, out)
    want = mine.x.float() * mine.weights.sum(1, keepdim=True)
    must(float((out - want).abs().max()) < 1e-5, "sums")


def recording(rank, ranks, path):
    comm = nearep.Comm.from_torch()
    ep = comm.ep(num_experts=4, top_k=2, hidden=32, max_tokens=8, num_layers=2)
    ep.record_start(sample=1.0, model="test")
    keys, prefill = torch.arange(4) // 2, torch.tensor([1, 0, 1, 0], dtype=torch.uint8)
    mine = world(ranks, [4] * ranks, 32, 4, 2, absent=0)[rank]
    handles = [ep.handle(), ep.handle()]
    for layer, handle in enumerate(handles):
        ep.dispatch_send(handle, mine.x, mine.ids, mine.weights, layer=layer, request_keys=keys, is_prefill=prefill)
        rows = torch.empty(ep.dispatch_counts(handle).num_rows, 32).bfloat16()
        ep.dispatch_recv(handle, rows)
    must(ep.record_save(f"{path}.{rank}") == 4, "tokens recorded")
    with nearep.Trace(f"{path}.{rank}") as trace:
        must(trace.shape.num_requests == 2 and trace.shape.num_layers == 2, "shape of the recording")
        must(sorted(trace.ids(t, 1) for t in range(4)) == sorted(mine.ids.tolist()), "ids of the recording")


class GroupTest(unittest.TestCase):
    def test_halves(self):
        run(3, halves)

    def test_memory_of_the_callers_own(self):
        run(2, registered)

    def test_outputs_that_are_not_written(self):
        run(2, awaited)

    def test_recording(self):
        with tempfile.TemporaryDirectory() as folder:
            run(2, recording, os.path.join(folder, "t"))

    def test_from_the_environment(self):
        """As under a launcher: rank, number of ranks and where they meet come from variables."""
        import socket
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def work(rank, ranks):
            os.environ.update(NEP_RANK=str(rank), NEP_RANKS=str(ranks), NEP_RENDEZVOUS=f"127.0.0.1:{port}")
            comm = nearep.Comm()
            must((comm.rank, comm.num_ranks) == (rank, ranks), "rank and size")
            ep = comm.ep(num_experts=2, top_k=1, hidden=32, max_tokens=4)
            handle, x = ep.handle(), torch.ones(4, 32).bfloat16()
            ep.dispatch_send(handle, x, torch.full((4, 1), 1 - rank))
            rows = torch.empty(ep.dispatch_counts(handle).num_rows, 32).bfloat16()
            ep.dispatch_recv(handle, rows)
            must(rows.shape[0] == 4 and bool((rows == 1).all()), "rows")
        run(2, work)

    def test_from_mpi(self):
        class MpiLike:
            def Get_rank(self):
                return 0

            def Get_size(self):
                return 1

            def allgather(self, value):
                return [value]
        with nearep.Comm.from_mpi(MpiLike()) as comm:
            self.assertEqual(comm.topology.num_ranks, 1)

    def test_a_lost_rank_is_named(self):
        def work(rank, ranks):
            comm = nearep.Comm.from_torch(timeout=2)
            ep = comm.ep(num_experts=2, top_k=1, hidden=32, max_tokens=4)
            if rank == 1:
                return
            handle, x = ep.handle(), torch.zeros(4, 32).bfloat16()
            ep.dispatch_send(handle, x, torch.ones(4, 1, dtype=torch.int64))
            try:
                ep.dispatch_counts(handle)
                must(False, "a dispatch without rank 1")
            except (nearep.DeadlineError, nearep.PeerLostError) as error:
                must("rank 1" in str(error) and comm.fault().rank == 1, str(error))
        run(2, work)


class PlacementTest(unittest.TestCase):
    def test_maps(self):
        rows = [[0, 1, 2, 3, 3, -1], [3, 2, 1, 0, 0, 1]]
        with nearep.Map.from_slots(rows, 4, [2, 1]) as found:
            self.assertEqual(found.slots(), rows)
            self.assertEqual(found.shape.slots_per_rank, 2)
            other = nearep.Map.from_slots([rows[1], rows[0]], 4, [2, 1])
            self.assertEqual(found.moves_to(found), [])
            self.assertGreater(len(found.moves_to(other)), 0)
            scores = found.home_scores(0, torch.tensor([[0, 1]], dtype=torch.int32))
            self.assertEqual(len(scores), 2)
        with self.assertRaises(ValueError):
            nearep.Map.from_slots([[5]], 4, [1])

    def test_balance(self):
        with nearep.Map.contiguous(8, [1, 1, 1, 1], slots_per_rank=3) as found, \
                nearep.Balance(found, 2, window_tokens=64, max_moves=4) as balance:
            moved, result = balance.update()
            self.assertIsNone(moved)
            self.assertEqual(result.moved_copies, 0)
            for home in range(4):  # all want the experts of one node
                balance.observe(0, home, torch.tensor([[0, 1]] * 32, dtype=torch.int32))
            moved, result = balance.update()
            self.assertGreater(result.imbalance, 1.13)
            self.assertEqual(moved is not None, result.moved_copies > 0)
            with self.assertRaises(ValueError):
                balance.observe(0, 0, torch.tensor([[0, 1, 2]], dtype=torch.int32))
        some = dict(row_bytes=1e4, token_layers=1e6, num_moves=8, expert_bytes=1e7)
        self.assertTrue(nearep.map_pays(rows_saved_per_token=1.0, **some))
        self.assertFalse(nearep.map_pays(rows_saved_per_token=1e-4, **some))

    def test_eplb_answers_as_deepseek(self):
        rng = torch.Generator().manual_seed(1)
        weight = torch.rand(3, 16, generator=rng) ** 4
        physical, logical, count = eplb.rebalance_experts(weight, 24, 4, 2, 8)
        self.assertEqual((tuple(physical.shape), tuple(count.shape)), ((3, 24), (3, 16)))
        self.assertEqual(count.sum(1).tolist(), [24] * 3)
        for layer in range(3):
            for expert in range(16):
                copies = [slot for slot in logical[layer, expert].tolist() if slot >= 0]
                self.assertEqual(len(copies), int(count[layer, expert]))
                self.assertTrue(all(int(physical[layer, slot]) == expert for slot in copies))
        share = weight.gather(1, physical) / count.gather(1, physical)
        per_gpu = share.view(3, 8, 3).sum(2)
        even = weight.sum(1, keepdim=True) / 8
        self.assertLess(float((per_gpu / even).max()), 2.0)
        lists = eplb.rebalance_experts(weight.tolist(), 24, 4, 2, 8)
        self.assertEqual(lists[0], physical.tolist())
        with self.assertRaises(ValueError):
            eplb.rebalance_experts(weight, 25, 4, 2, 8)

    def test_eplb_by_pairs_puts_friends_together(self):
        pairs = torch.zeros(1, 8, 8)
        for a, b in ((0, 5), (1, 4), (2, 7), (3, 6)):
            pairs[0, a, b] = pairs[0, b, a] = 10
        physical, _, _ = eplb.rebalance_experts_by_pairs(pairs, 8, 2, 4)
        node = {expert: slot // 4 for slot, expert in enumerate(physical[0])}
        for a, b in ((0, 5), (1, 4), (2, 7), (3, 6)):
            self.assertEqual(node[a], node[b])


class QueueTest(unittest.TestCase):
    def test_requests_go_home(self):
        with nearep.Queue(2, 2) as queue:
            queue.push(1, 0, scores=[0.0, 5.0])
            queue.push(2, 1, scores=[5.0, 0.0])
            self.assertEqual(queue.pop(1, 2), [2])
            self.assertEqual(queue.pop(0, 2), [1])
            self.assertEqual(queue.update(1, [5.0, 0.0], tokens_left=100, move_cost=1.0), 1)
            queue.finish(1)
            with self.assertRaises(nearep.NotFoundError):
                queue.finish(1)
            self.assertEqual(queue.stats()["popped"], 2)


class TraceTest(unittest.TestCase):
    def check(self, path, ids, num_requests):
        with nearep.Trace(path) as trace:
            self.assertEqual(trace.shape.num_requests, num_requests)
            for index, (want, prefill) in enumerate(ids):
                request = trace.request(index)
                self.assertEqual((request.prefill_tokens, request.prefill_tokens + request.decode_tokens),
                                 (prefill, len(want)))
                for t, layers in enumerate(want):
                    for layer, row in enumerate(layers):
                        self.assertEqual(trace.ids(request.first_token + t, layer), row)

    def test_vllm(self):
        a, b = numpy.random.default_rng(1).integers(0, 8, (5, 2, 3)), numpy.arange(12).reshape(2, 2, 3) % 8
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "t.nept")
            nearep.from_vllm([{"routed_experts": a, "num_prompt_tokens": 3, "domain": "code"},
                              {"routed_experts": b}], path, num_experts=8)
            self.check(path, [(a.tolist(), 3), (b.tolist(), 0)], 2)
            with self.assertRaisesRegex(ValueError, "request 1"):
                nearep.from_vllm([{"routed_experts": a}, {"routed_experts": b[:, :1]}], path, num_experts=8)

    def test_sglang(self):
        """Fields as its recorder writes them: no request ids, physical experts, a dense first layer."""
        table = torch.tensor([list(range(10)), [7, 6, 5, 4, 3, 2, 1, 0, 0, 3]])
        first = torch.arange(2 * 5 * 2).view(2, 5, 2) % 10
        first[0] = -1
        chunk = torch.tensor([[[-1, -1]], [[9, 8]]])
        step = torch.tensor([[[-1, -1]] * 2, [[5, 6], [7, 0]]])
        records = [dict(forward_pass_id=1, positions=[0, 1, 0, 1, 2], extend_seq_lens=[2, 3], forward_mode=1,
                        input_ids=[1] * 5, topk_ids_of_layer=first),
                   dict(forward_pass_id=2, positions=[3], extend_seq_lens=[1], forward_mode=1, input_ids=[1],
                        topk_ids_of_layer=chunk),
                   dict(forward_pass_id=3, positions=[2, 4], extend_seq_lens=None, forward_mode=2,
                        input_ids=[1] * 2, topk_ids_of_layer=step)]
        dump = dict(records=records, last_physical_to_logical_map=table)

        def logical(ids):
            return [[[-1 if i < 0 else int(table[layer, i]) for i in row] for layer, row in enumerate(token)]
                    for token in ids.permute(1, 0, 2).tolist()]
        rows, late, more = logical(first), logical(step), logical(chunk)
        want = [(rows[:2] + late[:1], 2), (rows[2:] + more + late[1:], 4)]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "t.nept")
            self.assertEqual(nearep.from_sglang(dump, path, num_experts=8), 2)
            self.check(path, want, 2)
            for record, rids in zip(records, (["a", "b"], ["b"], ["a", "b"])):
                record["rids"] = rids
            self.assertEqual(nearep.from_sglang(dump, path, num_experts=8), 2)
            self.check(path, want, 2)

    def test_recorder(self):
        recorder = nearep.Recorder(2, 8, 2)
        for layer in range(2):
            recorder.add(torch.tensor([[layer, 2], [3, layer]]), [5, 6], [True, False])
        with self.assertRaises(ValueError):
            recorder.add(torch.tensor([[1, 2]]), [5], [True])
            recorder.add(torch.tensor([[1, 2]]), [6], [True])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "t.nept")
            self.assertEqual(recorder.save(path), 2)
            self.check(path, [([[[0, 2], [1, 2]]], 1), ([[[3, 0], [3, 1]]], 0)], 2)


class SpeedTest(unittest.TestCase):
    def test_overhead_is_reported(self):
        """Printed, not judged: what Python adds to a cached dispatch of no tokens."""
        ep = alone().ep(num_experts=4, top_k=2, hidden=32, max_tokens=4, layout="rank")
        handle, x = ep.handle(), torch.zeros(1, 32).bfloat16()
        ep.dispatch_send(handle, x, torch.zeros(1, 2, dtype=torch.int64))
        ep.dispatch_recv(handle, torch.zeros(4, 32).bfloat16())
        out = torch.zeros(4, 32).bfloat16()
        for label, call in (("addresses", lambda: (ep.send_raw(handle, 1, x.data_ptr(), None, None, 0, None, 0, None),
                                                   ep.recv_raw(handle, out.data_ptr(), 4, *[None] * 6))),
                            ("tensors", lambda: (ep.dispatch_send(handle, x), ep.dispatch_recv(handle, out)))):
            start = time.perf_counter()
            for _ in range(2000):
                call()
            print(f"cached dispatch by {label}: {(time.perf_counter() - start) / 2000 * 1e6:.1f} us")
        equal(out[:1], x, "rows")


if __name__ == "__main__":
    unittest.main()
