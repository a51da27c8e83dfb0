# SPDX-License-Identifier: Apache-2.0
"""Placement maps: which slots hold copies of which expert; made from a trace, from loads, or by hand."""
import ctypes
import os
import tempfile
from typing import Any, List, NamedTuple, Optional, Sequence, Tuple

from . import _abi
from ._lib import Owner, check, create, lib, sized, text


class MapShape(NamedTuple):
    """ranks_per_node: [N]; slots_per_rank: L."""

    num_layers: int
    num_experts: int
    num_nodes: int
    num_ranks: int
    slots_per_rank: int
    ranks_per_node: Tuple[int, ...]


class Move(NamedTuple):
    """One expert to copy; slots are physical (rank * L + slot). is_staged: read it aside first."""

    layer: int
    expert: int
    from_slot: int
    to_slot: int
    is_staged: bool


def _shape_struct(num_layers: int, num_experts: int, ranks_per_node: Sequence[int], slots_per_rank: int) -> Any:
    sizes = (ctypes.c_uint32 * len(ranks_per_node))(*ranks_per_node)
    struct = sized(_abi.nep_map_shape, num_layers=num_layers, num_experts=num_experts,
                   num_nodes=len(ranks_per_node), num_ranks=sum(ranks_per_node),
                   slots_per_rank=slots_per_rank, ranks_per_node=ctypes.addressof(sizes))
    struct.keep = sizes
    return struct


class Map(Owner):
    """An immutable placement map. Any thread."""

    def __init__(self, pointer: int):
        super().__init__(pointer, lib.nep_map_destroy)
        found = sized(_abi.nep_map_shape)
        check(lib.nep_map_get_shape(pointer, ctypes.addressof(found)))
        nodes = tuple((ctypes.c_uint32 * found.num_nodes).from_address(found.ranks_per_node))
        self.shape = MapShape(found.num_layers, found.num_experts, found.num_nodes, found.num_ranks,
                              found.slots_per_rank, nodes)

    @classmethod
    def load(cls, path: Any) -> "Map":
        """Reads and checks a .nepmap file."""
        return cls(create(lib.nep_map_load, text(path)))

    @classmethod
    def contiguous(cls, num_experts: int, ranks_per_node: Sequence[int], *, num_layers: int = 1,
                   slots_per_rank: int = 0) -> "Map":
        """Expert e on slot e."""
        shape = _shape_struct(num_layers, num_experts, ranks_per_node, slots_per_rank)
        return cls(create(lib.nep_map_contiguous, ctypes.addressof(shape)))

    @classmethod
    def from_slots(cls, slots: Sequence[Sequence[int]], num_experts: int,
                   ranks_per_node: Sequence[int]) -> "Map":
        """slots: [layers][R * L] the expert of each physical slot, -1 = empty (EPLB's phy2log)."""
        num_ranks = sum(ranks_per_node)
        if not slots or any(len(row) != len(slots[0]) for row in slots) or len(slots[0]) % num_ranks:
            raise ValueError(f"nearep: each layer needs the same number of slots, a multiple of {num_ranks}")
        per_rank = len(slots[0]) // num_ranks
        lines = ["nepmap 1", f"layers {len(slots)} experts {num_experts} nodes {len(ranks_per_node)} "
                 f"ranks_per_node {','.join(map(str, ranks_per_node))} slots_per_rank {per_rank}"]
        for layer, row in enumerate(slots):
            copies: List[List[str]] = [[] for _ in range(num_experts)]
            for slot, expert in enumerate(row):
                if expert >= num_experts or expert < -1:
                    raise ValueError(f"nearep: layer {layer}, slot {slot} holds expert {expert}; there are "
                                     f"{num_experts}")
                if expert >= 0:
                    copies[expert].append(f"{slot // per_rank}:{slot % per_rank}")
            lines += [f"{layer} {expert} {' '.join(where)}" for expert, where in enumerate(copies)]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "map")
            with open(path, "w", encoding="ascii") as file:
                file.write("\n".join(lines) + "\n")
            return cls.load(path)

    @classmethod
    def solve(cls, trace: Any, ranks_per_node: Sequence[int], *, slots_per_rank: int = 0,
              max_imbalance: float = 0.0, seed: int = 0, num_threads: int = 0,
              requests: Optional[Sequence[int]] = None, time_limit: float = 0.0,
              warm: Optional["Map"] = None, max_moves: int = 0) -> "Map":
        """Places experts near the requests that use them. More slots than ceil(E / R) hold copies.
        requests: those of the trace to look at; warm: start from a running map and move at most
        max_moves copies; time_limit in seconds."""
        shape = trace.shape
        struct = _shape_struct(shape.num_layers, shape.num_experts, ranks_per_node, slots_per_rank)
        chosen = (ctypes.c_uint32 * len(requests))(*requests) if requests is not None else None
        params = sized(_abi.nep_solve_params, shape=ctypes.addressof(struct),
                       requests=ctypes.addressof(chosen) if chosen is not None else None,
                       num_requests=len(requests or ()), num_threads=num_threads,
                       max_imbalance=max_imbalance, seed=seed, time_limit_ns=int(time_limit * 1e9),
                       warm=warm.pointer if warm is not None else None, max_moves=max_moves)
        return cls(create(lib.nep_map_solve, trace.pointer, ctypes.addressof(params)))

    @classmethod
    def balance(cls, loads: Sequence[Sequence[float]], ranks_per_node: Sequence[int], *,
                slots_per_rank: int = 0, num_groups: int = 1) -> "Map":
        """By load alone, with the rules of DeepSeek's EPLB. loads: [layers][E], not negative."""
        num_experts = len(loads[0])
        flat = (ctypes.c_double * (len(loads) * num_experts))(*[v for row in loads for v in row])
        struct = _shape_struct(len(loads), num_experts, ranks_per_node, slots_per_rank)
        return cls(create(lib.nep_map_balance, ctypes.addressof(struct), num_groups,
                          ctypes.addressof(flat)))

    def save(self, path: Any) -> None:
        """Writes a .nepmap file, sorted, through a temporary file."""
        check(lib.nep_map_save(self.pointer, text(path)))

    def slots(self) -> List[List[int]]:
        """[layers][R * L]: the expert of each physical slot, -1 = empty."""
        shape = self.shape
        rows = [[-1] * (shape.num_ranks * shape.slots_per_rank) for _ in range(shape.num_layers)]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "map")
            self.save(path)
            with open(path, encoding="ascii") as file:
                for line in file.readlines()[2:]:
                    layer, expert, *copies = line.split()
                    for copy in copies:
                        rank, slot = copy.split("*")[0].split(":")
                        rows[int(layer)][int(rank) * shape.slots_per_rank + int(slot)] = int(expert)
        return rows

    @property
    def is_truncated(self) -> bool:
        """A time limit cut the search short."""
        return bool(lib.nep_map_is_truncated(self.pointer))

    def moves_to(self, other: "Map") -> List[Move]:
        """The copies that turn this map into the other, in an order that overwrites nothing needed."""
        num = ctypes.c_uint64()
        status = lib.nep_map_diff(self.pointer, other.pointer, None, 0, ctypes.addressof(num))
        if num.value == 0:
            check(status)
            return []
        moves = (_abi.nep_map_move * num.value)()
        check(lib.nep_map_diff(self.pointer, other.pointer, ctypes.addressof(moves), num.value,
                               ctypes.addressof(num)))
        return [Move(m.layer, m.expert, m.from_slot, m.to_slot, bool(m.is_staged)) for m in moves]

    def home_scores(self, layer: int, topk_ids: Any) -> List[float]:
        """[N]: remote nodes that these tokens (topk_ids [T, K] int32) would visit from each home."""
        from .tensors import array_of
        found = array_of(topk_ids)
        if found.dtype != "int32" or len(found.shape) != 2:
            raise ValueError("nearep: topk_ids must be [T, K] of int32")
        scores = (ctypes.c_float * self.shape.num_nodes)()
        check(lib.nep_map_home_scores(self.pointer, layer, found.pointer or None, found.shape[0],
                                      found.shape[1], ctypes.addressof(scores)))
        return list(scores)
