# SPDX-License-Identifier: Apache-2.0
"""What a call of deep_ep costs the host, one rank and one token, the library's work included: a line for each
call, us, the best of five batches. Not a test. NEP_TEST_DEVICE=cuda: on a GPU that has nothing else to do, the
launches included, and what a torch addition takes there."""
import os
import tempfile
import time

import deep_ep
import torch
import torch.distributed as dist

DEVICE = os.environ.get("NEP_TEST_DEVICE", "cpu")
H, K, E = 1024, 4, 8


def us(call, num, settle):
    """Of one call; settle() is not timed."""
    best = float("inf")
    for _ in range(5):
        spent = 0.0
        for _ in range(num):
            before = time.perf_counter()
            call()
            spent += time.perf_counter() - before
            settle()
        best = min(best, spent / num)
    return best * 1e6


def main():
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        dist.init_process_group("gloo", store=dist.FileStore(os.path.join(folder, "store"), 1), rank=0, world_size=1)
        buffer = deep_ep.Buffer(dist.group.WORLD, 1 << 26, 0)
        x = torch.ones(1, H, device=DEVICE).bfloat16()
        ids, weights = torch.arange(K, device=DEVICE)[None, :].clone(), torch.ones(1, K, device=DEVICE)

        def fresh():
            layout = buffer.get_dispatch_layout(ids, E)
            return buffer.dispatch(x, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3],
                                   num_tokens_per_expert=layout[2], topk_idx=ids, topk_weights=weights)
        layout = buffer.get_dispatch_layout(ids, E)
        rows, handle = fresh()[0], fresh()[4]
        ep, inner, own = handle.owned.seat.ep, handle.owned.handle, torch.empty_like(rows)
        calls = {
            "layout": lambda: buffer.get_dispatch_layout(ids, E),
            "fresh dispatch": lambda: buffer.dispatch(
                x, num_tokens_per_rank=layout[0], is_token_in_rank=layout[3], num_tokens_per_expert=layout[2],
                topk_idx=ids, topk_weights=weights),
            "cached dispatch": lambda: buffer.dispatch(x, handle=handle),
            "  of it the library": lambda: ep.dispatch_raw(
                inner, 1, x.data_ptr(), None, None, 0, None, own.data_ptr(), own.shape[0], None, None),
            "combine": lambda: buffer.combine(rows, handle),
            "  of it the library (combine)": lambda: ep.combine_raw(
                inner, rows.data_ptr(), None, own.data_ptr(), None, (None, None), None),
            "a torch addition": lambda: torch.add(x, x),
        }
        is_cuda = DEVICE == "cuda"
        for name, call in calls.items():
            for _ in range(20):
                call()
            settle = torch.cuda.synchronize if is_cuda else int
            print(f"{name}: {us(call, 100 if is_cuda else 1000, settle):.1f} us", flush=True)


if __name__ == "__main__":
    main()
