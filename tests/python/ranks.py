# SPDX-License-Identifier: Apache-2.0
"""Ranks as processes of this test: forked, joined by gloo, each failure with its traceback."""
import multiprocessing
import os
import tempfile
import time
import traceback

import torch

SEED = int(os.environ.get("NEP_TEST_SEED", "0")) or time.time_ns() % 1000000
print(f"seed {SEED} (NEP_TEST_SEED)", flush=True)
DEADLINE = 150
RANKS = int(os.environ.get("NEP_TEST_RANKS", "2"))  # of the tests on one node
PLACE = ["cpu"]  # where the inputs of Tokens are; a test that moves them moves everything


def on_the_device():
    """The tests of this file run where NEP_TEST_DEVICE says, all their tensors with them."""
    PLACE[0] = os.environ.get("NEP_TEST_DEVICE", "cpu")


def _child(rank, num_ranks, path, work, arguments, pipe, is_together):
    torch.set_num_threads(1)
    if PLACE[0] != "cpu":
        torch.set_default_device(PLACE[0])  # as upstream's own tests do
    os.environ.setdefault("NEP_TIMEOUT", "60s")
    try:
        import torch.distributed as dist
        store = dist.FileStore(path, num_ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=num_ranks)
        result = work(rank, num_ranks, *arguments)
        if is_together:
            dist.barrier()
        pipe.send((None, result))
        pipe.close()
        os._exit(0)  # no teardown of gloo: peers may be gone already
    except BaseException:
        pipe.send((traceback.format_exc(), None))
        pipe.close()
        os._exit(1)


def run(num_ranks, work, *arguments, is_together=True):
    """work(rank, num_ranks, *arguments) on each rank; returns what they return, or raises."""
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        pipes, children = [], []
        for rank in range(num_ranks):
            ours, theirs = context.Pipe(False)
            child = context.Process(target=_child, args=(rank, num_ranks, os.path.join(folder, "store"), work,
                                                         arguments, theirs, is_together))
            child.start()
            theirs.close()
            pipes.append(ours)
            children.append(child)
        end = time.monotonic() + DEADLINE
        results, failures = [], []
        for rank, pipe in enumerate(pipes):
            try:
                if not pipe.poll(max(end - time.monotonic(), 0.1)):
                    raise EOFError("nothing came before the deadline")
                failure, result = pipe.recv()
            except EOFError as error:
                failure, result = f"no result: {error}", None
            if failure:
                failures.append(f"rank {rank}: {failure}")
                end = min(end, time.monotonic() + 5)
            results.append(result)
        for child in children:
            child.join(1)
            if child.is_alive():
                child.kill()
                child.join()
        if failures:
            raise AssertionError("\n".join(failures))
        return results


# ---- what every rank can compute of every rank -------------------------------------------------


def generator(rank, salt=0):
    made = torch.Generator("cpu")
    made.manual_seed(SEED * 1000003 + rank * 7919 + salt)
    return made


class Tokens:
    """The input of one rank: x [T, H] bf16, ids [T, K] distinct or -1, weights [T, K]."""

    def __init__(self, rank, num_tokens, hidden, num_experts, top_k, salt=0, absent=0.1, dtype=torch.int64):
        rng = generator(rank, salt)
        with_rng = dict(generator=rng, device="cpu")
        self.x = torch.randn(num_tokens, hidden, **with_rng).bfloat16()
        scores = torch.rand(num_tokens, num_experts, **with_rng)
        self.ids = torch.topk(scores, top_k, dim=1)[1].to(dtype) if num_tokens else \
            torch.zeros(0, top_k, dtype=dtype, device="cpu")
        self.ids[torch.rand(num_tokens, top_k, **with_rng) < absent] = -1
        self.weights = torch.rand(num_tokens, top_k, **with_rng)
        self.x, self.ids, self.weights = (value.to(PLACE[0]) for value in (self.x, self.ids, self.weights))


def world(num_ranks, sizes, hidden, num_experts, top_k, **more):
    return [Tokens(rank, sizes[rank], hidden, num_experts, top_k, **more) for rank in range(num_ranks)]


def arrivals(tokens, rank, per_rank):
    """[(source, token)] of the rows that come to a rank in normal mode, in their order."""
    found = []
    for source, given in enumerate(tokens):
        owner = torch.div(given.ids, per_rank, rounding_mode="floor")
        here = ((given.ids >= 0) & (owner == rank)).any(1)
        found += [(source, int(t)) for t in torch.nonzero(here)[:, 0]]
    return found


def must(condition, what):
    if not condition:
        raise AssertionError(what)


def equal(got, want, what):
    """Every element, bit for bit."""
    must(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}")
    wrong = int((got != want).sum())
    must(wrong == 0, f"{what}: {wrong} of {want.numel()} elements differ")


def close(got, want, scale, what, roundings=1, bits=8):
    """Every element within the roundings of a sum whose terms have absolute sum `scale` (fp64)."""
    must(got.shape == want.shape, f"{what}: shape {tuple(got.shape)}, want {tuple(want.shape)}")
    if want.numel() == 0:
        return
    bound = scale * roundings * 2.0 ** -bits + 1e-30
    over = (got.double() - want).abs() - bound
    must(bool((over <= 0).all()), f"{what}: {int((over > 0).sum())} of {want.numel()} elements beyond their "
         f"bound, the worst by {float(over.max())}")
