# SPDX-License-Identifier: Apache-2.0
"""Keeping a running map in balance, and what a new map must save to be worth its moves."""
import ctypes
from typing import Any, NamedTuple, Optional, Tuple

from . import _abi
from ._lib import Owner, check, create, lib, sized
from .maps import Map
from .tensors import array_of


class BalanceResult(NamedTuple):
    """What an update found: the imbalance of nodes in the window before the moves, remote nodes per token,
    copies that moved; is_drifting: remote nodes rise steadily, time to solve anew."""

    imbalance: float
    remote_nodes_per_token: float
    moved_copies: int
    is_drifting: bool


class Balance(Owner):
    """Watches what is routed, and where a layer's load leaves its balance moves a few copies. No
    communicator; one thread at a time.

    map: a placement Map; top_k: of what is observed; window_tokens: tokens a layer that decide (768);
    max_moves: copies that may move per layer and update (8); act_above: max/mean load of nodes that
    calls for moves (1.13).
    """

    def __init__(self, map: Map, top_k: int, *, window_tokens: int = 0, max_moves: int = 0,
                 act_above: float = 0.0):
        params = sized(_abi.nep_balance_params, map=map.pointer, top_k=top_k, window_tokens=window_tokens,
                       max_moves=max_moves, act_above=act_above)
        super().__init__(create(lib.nep_balance_create, ctypes.addressof(params)), lib.nep_balance_destroy)
        self.map, self.top_k = map, top_k

    def observe(self, layer: int, home: int, topk_ids: Any) -> None:
        """topk_ids: [T, K] int32, logical, -1 = unused, of tokens whose home is `home`."""
        found = array_of(topk_ids)
        if found.dtype != "int32" or len(found.shape) != 2 or found.shape[1] != self.top_k or found.is_cuda:
            raise ValueError(f"nearep: topk_ids is {found.dtype} {found.shape}; it must be int32 "
                             f"[T, {self.top_k}] in host memory")
        check(lib.nep_balance_observe(self.pointer, layer, home, found.pointer or None, found.shape[0]))

    def update(self) -> Tuple[Optional[Map], BalanceResult]:
        """(a new map to stage, or None when nothing moved; what was found)."""
        pointer, found = ctypes.c_void_p(), sized(_abi.nep_balance_result)
        check(lib.nep_balance_update(self.pointer, ctypes.byref(pointer), ctypes.addressof(found)))
        result = BalanceResult(found.imbalance, found.remote_nodes_per_token, found.moved_copies,
                               bool(found.is_drifting))
        return (Map(pointer.value) if pointer.value else None), result


def map_pays(*, rows_saved_per_token: float, row_bytes: float, token_layers: float, num_moves: int,
             expert_bytes: float) -> bool:
    """Whether a new map is worth its moves: the bytes of rows that it saves before it is replaced
    (token_layers: tokens times layers until then) against those of the experts that move."""
    return bool(lib.nep_map_pays(rows_saved_per_token, row_bytes, token_layers, num_moves, expert_bytes))
