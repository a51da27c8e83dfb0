# SPDX-License-Identifier: Apache-2.0
"""DeepSeek's EPLB call, and the same with nearep's solver behind it.

Results are torch tensors where the weights are, else nested lists.
"""
from typing import Any, List, Tuple

from .maps import Map


def _rows(weight: Any) -> List[List[float]]:
    if hasattr(weight, "tolist"):
        weight = weight.tolist()
    return [[float(value) for value in row] for row in weight]


def tables(map: Map) -> Tuple[list, list, list]:
    """(phy2log [layers][slots], log2phy [layers][experts][most copies], -1 = none, logcnt [layers][experts])."""
    slots = map.slots()
    copies: List[List[List[int]]] = [[[] for _ in range(map.shape.num_experts)] for _ in slots]
    for layer, row in enumerate(slots):
        for slot, expert in enumerate(row):
            if expert >= 0:
                copies[layer][expert].append(slot)
    most = max(len(found) for row in copies for found in row)
    return (slots, [[found + [-1] * (most - len(found)) for found in row] for row in copies],
            [[len(found) for found in row] for row in copies])


def _give(map: Map, like: Any) -> Tuple[Any, Any, Any]:
    found = tables(map)
    if type(like).__module__ != "torch":
        return found
    import torch
    a, b, c = (torch.tensor(part, dtype=torch.int64) for part in found)
    return a, b, c


def _nodes(num_replicas: int, num_nodes: int, num_gpus: int) -> Tuple[List[int], int]:
    if num_gpus % num_nodes or num_replicas % num_gpus:
        raise ValueError(f"nearep: {num_replicas} replicas on {num_gpus} GPUs of {num_nodes} nodes do not "
                         "divide evenly")
    return [num_gpus // num_nodes] * num_nodes, num_replicas // num_gpus


def rebalance_experts(weight: Any, num_replicas: int, num_groups: int, num_nodes: int,
                      num_gpus: int) -> Tuple[Any, Any, Any]:
    """Places and copies experts by load, as DeepSeek's EPLB does.

    weight: [layers, num_logical_experts] load of each expert. num_replicas: physical experts in all,
    a multiple of num_gpus. num_groups: groups of experts that stay on one node where they divide
    evenly. Returns (physical_to_logical_map [layers, num_replicas], logical_to_physical_map
    [layers, num_logical_experts, X] with -1 for none, expert_count [layers, num_logical_experts]).
    """
    nodes, per_rank = _nodes(num_replicas, num_nodes, num_gpus)
    return _give(Map.balance(_rows(weight), nodes, slots_per_rank=per_rank, num_groups=num_groups), weight)


def rebalance_experts_by_trace(trace: Any, num_replicas: int, num_nodes: int, num_gpus: int, *,
                               max_imbalance: float = 0.0, seed: int = 0,
                               time_limit: float = 0.0) -> Tuple[Any, Any, Any]:
    """The same results from a trace of routing (nearep.Trace): experts that the same requests use come
    to the same node, within a limit on imbalance (max/mean load of nodes; 1.10)."""
    nodes, per_rank = _nodes(num_replicas, num_nodes, num_gpus)
    found = Map.solve(trace, nodes, slots_per_rank=per_rank, max_imbalance=max_imbalance, seed=seed,
                      time_limit=time_limit)
    return tables(found)


def rebalance_experts_by_pairs(pairs: Any, num_replicas: int, num_nodes: int, num_gpus: int, *,
                               max_imbalance: float = 0.0, seed: int = 0, samples: int = 8192,
                               path: Any = None) -> Tuple[Any, Any, Any]:
    """The same from counts of co-activation, pairs [layers, E, E] (symmetric; the diagonal, how often
    an expert was used, may be zero): each pair stands for tokens of two experts, so that solving
    their trace puts pairs that occur often onto one node. At most about `samples` such tokens a layer."""
    import os
    import tempfile
    from .trace import Trace, TraceWriter
    layers = pairs.tolist() if hasattr(pairs, "tolist") else pairs
    num_experts = len(layers[0])
    drawn = [_spread(layer, samples) for layer in layers]
    length = max(len(found) for found in drawn)
    if length == 0:
        raise ValueError("nearep: all counts of co-activation are zero")
    with tempfile.TemporaryDirectory() as folder, TraceWriter(len(layers), num_experts, 2) as writer:
        for token in range(length):
            writer.add([[list(found[token % len(found)]) if found else [-1, -1] for found in drawn]],
                       prefill_tokens=0)
        name = path or os.path.join(folder, "pairs.nept")
        writer.save(name)
        with Trace(name) as trace:
            return rebalance_experts_by_trace(trace, num_replicas, num_nodes, num_gpus,
                                              max_imbalance=max_imbalance, seed=seed)


def _spread(counts: Any, samples: int) -> Any:
    """About `samples` pairs in proportion to their counts, largest remainders first."""
    listed = [(counts[a][b], a, b) for a in range(len(counts)) for b in range(a + 1, len(counts))
              if counts[a][b] > 0]
    total = sum(count for count, _, _ in listed)
    found = []
    carry = 0.0
    for count, a, b in listed:
        carry += count * min(1.0, samples / total)
        found += [(a, b)] * int(carry)
        carry -= int(carry)
    return found
