# SPDX-License-Identifier: Apache-2.0
"""One MoE shape on a communicator: dispatch and combine, whole and in halves.

Letters as in nearep.h: T tokens of a call, M most tokens of any call, H hidden, K top-k, E experts,
L slots per rank, R ranks. "Array" is a torch tensor, or anything that tensors.array_of takes.
"""
import ctypes
import functools
from typing import Any, Dict, List, NamedTuple, Optional, Sequence, Tuple

from . import _abi
from ._lib import Owner, check, create, lib, sized, text
from .comm import Comm
from .tensors import Memory, SIZES, array_of, pointer_of

DTYPES = {"bf16": 1, "fp16": 2, "fp32": 3, "fp8": 4, "opaque": 5, None: 0}
LAYOUTS = {"rank": 1, "packed": 2, "padded": 3, "front": 4, None: 0}
EXECUTORS = {"host": 1, "cuda": 2}
SCALES = {"fp32": 0, "pow2": 1, "ue8m0": 2, None: 0}
IDS = ("int32", "int64")
Address = Optional[int]


class Counts(NamedTuple):
    """What a dispatch brings this rank. rows_per_slot, first_row: [L]; rows_per_source: [R]."""

    num_rows: int
    num_real_rows: int
    rows_per_slot: List[int]
    first_row: List[int]
    rows_per_source: List[int]


def _choose(table: Dict[Any, int], value: Optional[str], what: str) -> int:
    if value not in table:
        raise ValueError(f"nearep: {what} is {value!r}; it must be one of {[k for k in table if k]}")
    return table[value]


def _list(kind: Any, pointer: int, num: int) -> List[int]:
    return list((kind * num).from_address(pointer))


class Handle(Owner):
    """Where the rows of one dispatch went. Reusable, one operation at a time; keep one per layer for
    cached dispatches and combines. Made by Ep.handle()."""

    def __init__(self, ep: "Ep"):
        super().__init__(create(lib.nep_handle_create, ep.pointer), lib.nep_handle_destroy, ep)
        self.num_tokens = 0
        self.keep: list = []  # arrays of the operation under way


@functools.lru_cache(maxsize=None)
def build_has_cuda() -> bool:
    """Asked of the library, by what it says of the memory that such an ep would take."""
    zero, one = ctypes.c_uint32(0), ctypes.c_uint32(1)
    topology = sized(_abi.nep_topology, num_ranks=1, num_nodes=1, node_of_rank=ctypes.addressof(zero),
                     local_of_rank=ctypes.addressof(zero), node_ranks=ctypes.addressof(one))
    params = sized(_abi.nep_ep_params, num_experts=1, top_k=1, hidden=16, max_tokens=1, executor=2)
    memory = sized(_abi.nep_memory)
    return lib.nep_ep_memory(ctypes.addressof(params), ctypes.addressof(topology),
                             ctypes.addressof(memory)) != _abi.NEP_ERR_UNSUPPORTED


class Ep(Owner):
    """Dispatch and combine for one MoE shape. Collective: all ranks make it with equal arguments; a
    difference is an error that names the field and the ranks. Used by one thread at a time.

    num_experts E, top_k K (1 to 32), hidden H (a multiple of 16), max_tokens M.
    dtype: "bf16", "fp16", "fp32"; wire: dtype, "fp8" (cast on the way, one scale per 128 channels) or
    "opaque" (row_bytes and scale_bytes pass through). scale: "fp32", "pow2", "ue8m0".
    layout: "packed" (rows by slot, expert_alignment), "padded" (slot l, source r at (l * R + r) * M),
    "front" (slot l at l * R * M, packed inside), "rank" (one row per token).
    outstanding: operations between send and complete at once, 1 to 8.
    map: a placement Map; None: contiguous. num_layers: layers that share the ep.
    pool_bytes: memory for empty(). executor: "host" or "cuda" (where the arrays of all calls are).
    """

    def __init__(self, comm: Comm, *, num_experts: int, top_k: int, hidden: int, max_tokens: int,
                 dtype: Optional[str] = None, wire: Optional[str] = None, layout: Optional[str] = None,
                 slots_per_rank: int = 0, expert_alignment: int = 0, outstanding: int = 0,
                 num_layers: int = 0, map: Any = None, pool_bytes: int = 0, scale: Optional[str] = None,
                 row_bytes: int = 0, scale_bytes: int = 0, executor: str = "host", **more: int):
        params = sized(_abi.nep_ep_params, num_experts=num_experts, slots_per_rank=slots_per_rank,
                       top_k=top_k, hidden=hidden, max_tokens=max_tokens,
                       dtype=_choose(DTYPES, dtype, "dtype"), wire=_choose(DTYPES, wire, "wire"),
                       layout=_choose(LAYOUTS, layout, "layout"), expert_alignment=expert_alignment,
                       outstanding=outstanding, num_layers=num_layers,
                       map=map.pointer if map is not None else None, pool_bytes=pool_bytes,
                       scale=_choose(SCALES, scale, "scale"), row_bytes=row_bytes,
                       scale_bytes=scale_bytes)
        fields = {name for name, _ in _abi.nep_ep_params._fields_}
        params.executor = _choose(EXECUTORS, executor, "executor")
        for name, value in more.items():
            if name not in fields:
                raise TypeError(f"Ep: no argument '{name}'")
            setattr(params, name, value)
        super().__init__(comm.guarded(create, lib.nep_ep_create, comm.pointer, ctypes.addressof(params)),
                         lib.nep_ep_destroy, comm)
        self.comm, self.map = comm, map
        self.num_experts, self.top_k, self.hidden, self.max_tokens = num_experts, top_k, hidden, max_tokens
        self.dtype, self.wire, self.layout = dtype or "bf16", wire or dtype or "bf16", layout or "packed"
        self.executor, self.is_rank_layout = executor, layout == "rank"
        map_slots = map.shape.slots_per_rank if map is not None else 0
        self.slots_per_rank = slots_per_rank or map_slots or -(-num_experts // comm.num_ranks)
        self.num_layers = num_layers or (map.shape.num_layers if map is not None else 1)
        self._scale = scale or "fp32"
        self._row = (row_bytes, scale_bytes)
        self._registered: Dict[int, Any] = {}
        # One set of argument structures for each ep: filled in for each call, never allocated.
        self.tokens = sized(_abi.nep_tokens)
        self.rows = sized(_abi.nep_rows)
        self.expert_rows = sized(_abi.nep_expert_rows)
        self.sums = sized(_abi.nep_tokens_out)
        self.counts_struct = sized(_abi.nep_counts)
        self._at = {name: ctypes.addressof(getattr(self, name)) for name in
                    ("tokens", "rows", "expert_rows", "sums", "counts_struct")}

    # ---- what a row is ------------------------------------------------------------------------

    @property
    def row_bytes(self) -> int:
        """Of a dispatched row, scales apart."""
        return self._row[0] if self.wire == "opaque" else self.hidden * SIZES[self.wire]

    @property
    def scale_row_bytes(self) -> int:
        """Of the scales that come with a dispatched row; 0: none."""
        if self.wire == "opaque":
            return self._row[1]
        return 0 if self.wire != "fp8" else -(-self.hidden // 128) * (1 if self._scale == "ue8m0" else 4)

    def max_rows(self) -> int:
        """Most rows that any dispatch can bring this rank."""
        rows = ctypes.c_uint64()
        check(lib.nep_ep_max_rows(self.pointer, ctypes.addressof(rows)))
        return rows.value

    def handle(self) -> Handle:
        """A new handle; all memory that operations need is taken here."""
        return Handle(self)

    # ---- addresses: what the calls below and the deep_ep package use -----------------------------

    def send_raw(self, handle: Handle, num_tokens: int, x: Address, scales: Address, ids: Address, id_type: int,
                 weights: Address, layer: int, stream: Address) -> None:
        """nep_dispatch_send with addresses."""
        tokens = self.tokens
        tokens.num_tokens, tokens.layer, tokens.x, tokens.scales = num_tokens, layer, x, scales
        tokens.topk_ids, tokens.id_type, tokens.topk_weights = ids, id_type, weights
        check(lib.nep_dispatch_send(self.pointer, handle.pointer, self._at["tokens"], stream))
        handle.num_tokens = num_tokens

    def bind_raw(self, handle: Handle, x: Address, capacity: int, scales: Address, source_rank: Address,
                 source_token: Address) -> None:
        """nep_handle_bind_output with addresses: the send half then moves rows to them already."""
        rows = self.rows
        rows.x, rows.capacity, rows.scales, rows.topk_slots = x, capacity, scales, None
        rows.topk_weights, rows.source_rank, rows.source_token = None, source_rank, source_token
        check(lib.nep_handle_bind_output(handle.pointer, self._at["rows"]))

    def recv_raw(self, handle: Handle, x: Address, capacity: int, scales: Address, slots: Address, weights: Address,
                 source_rank: Address, source_token: Address, stream: Address) -> None:
        """nep_dispatch_recv with addresses."""
        rows = self.rows
        rows.x, rows.capacity, rows.scales, rows.topk_slots = x, capacity, scales, slots
        rows.topk_weights, rows.source_rank, rows.source_token = weights, source_rank, source_token
        check(lib.nep_dispatch_recv(self.pointer, handle.pointer, self._at["rows"], stream))

    def await_raw(self, handle: Handle, flags: Address, flags_per_slot: int, rows_per_flag: int, least: int,
                  stream: Address) -> None:
        """nep_combine_await with addresses."""
        written = sized(_abi.nep_written, flags=flags, flags_per_slot=flags_per_slot, rows_per_flag=rows_per_flag,
                        least=least)
        check(lib.nep_combine_await(self.pointer, handle.pointer, ctypes.addressof(written), stream))

    def combine_send_raw(self, handle: Handle, y: Address, weights: Address, stream: Address,
                         token_weights: Address = None) -> None:
        """nep_combine_send with addresses."""
        rows = self.expert_rows
        rows.y, rows.topk_weights, rows.token_weights = y, weights, token_weights
        check(lib.nep_combine_send(self.pointer, handle.pointer, self._at["expert_rows"], stream))

    def combine_recv_raw(self, handle: Handle, y: Address, weights: Address, bias: Sequence[Address],
                         stream: Address) -> None:
        """nep_combine_recv with addresses; bias: two of them."""
        sums = self.sums
        sums.num_tokens, sums.y, sums.topk_weights = handle.num_tokens, y, weights
        sums.bias[0], sums.bias[1] = bias
        check(lib.nep_combine_recv(self.pointer, handle.pointer, self._at["sums"], stream))

    def dispatch_raw(self, handle: Handle, num_tokens: int, x: Address, scales: Address, ids: Address, id_type: int,
                     weights: Address, out: Address, out_rows: int, out_scales: Address, stream: Address) -> None:
        """nep_dispatch with addresses: both halves in one call, rows and scales alone."""
        tokens, rows = self.tokens, self.rows
        tokens.num_tokens, tokens.layer, tokens.x, tokens.scales = num_tokens, 0, x, scales
        tokens.topk_ids, tokens.id_type, tokens.topk_weights = ids, id_type, weights
        rows.x, rows.capacity, rows.scales, rows.topk_slots = out, out_rows, out_scales, None
        rows.topk_weights = rows.source_rank = rows.source_token = None
        check(lib.nep_dispatch(self.pointer, handle.pointer, self._at["tokens"], self._at["rows"], stream))
        handle.num_tokens = num_tokens

    def combine_raw(self, handle: Handle, y: Address, weights: Address, out: Address, out_weights: Address,
                    bias: Sequence[Address], stream: Address) -> None:
        """nep_combine with addresses: both halves in one call."""
        rows, sums = self.expert_rows, self.sums
        rows.y, rows.topk_weights, rows.token_weights = y, weights, None
        sums.num_tokens, sums.y, sums.topk_weights = handle.num_tokens, out, out_weights
        sums.bias[0], sums.bias[1] = bias
        check(lib.nep_combine(self.pointer, handle.pointer, self._at["expert_rows"], self._at["sums"], stream))

    # ---- dispatch and combine -----------------------------------------------------------------

    def dispatch_send(self, handle: Handle, x: Any, topk_ids: Any = None, topk_weights: Any = None, *,
                      scales: Any = None, layer: int = 0, stream: Optional[int] = None,
                      request_keys: Any = None, is_prefill: Any = None) -> None:
        """Starts a dispatch; never waits for another node.

        x: [T, H] of dtype, of fp8 where scales are given, or [T, row_bytes] uint8 where opaque.
        topk_ids: [T, K] int32 or int64, -1 = unused; None: the routing that the handle holds.
        topk_weights: [T, K] fp32; None: all 1, or those held. scales: [T, ceil(H / 128)].
        request_keys: [T] uint64 (or int64), is_prefill: [T] uint8, for the recorder.
        The arrays must not change until the operation completes.
        """
        keep: list = []
        found = array_of(x)
        num, top_k = found.shape[0], self.top_k
        row = found.shape[1] * SIZES[found.dtype] if len(found.shape) == 2 else -1
        expected = self.row_bytes if scales is not None or self.wire == "opaque" else \
            self.hidden * SIZES[self.dtype]
        if row != expected:
            raise ValueError(f"nearep: x has shape {found.shape} of {found.dtype}; a row must have "
                             f"{expected} bytes")
        ids = pointer_of(topk_ids, "topk_ids", IDS, (num, top_k), keep)
        id_type = IDS.index(array_of(topk_ids).dtype) if topk_ids is not None else 0
        weights = pointer_of(topk_weights, "topk_weights", ("fp32",), (num, top_k), keep)
        scale = array_of(scales) if scales is not None else None
        if scale is not None and (scale.shape[0] != num or
                                  scale.shape[1] * SIZES[scale.dtype] != self.scale_row_bytes):
            raise ValueError(f"nearep: scales have shape {scale.shape} of {scale.dtype}; a row must have "
                             f"{self.scale_row_bytes} bytes")
        self.tokens.request_keys = pointer_of(request_keys, "request_keys", ("uint64", "int64"), (num,), keep)
        self.tokens.is_prefill = pointer_of(is_prefill, "is_prefill", ("uint8", "bool"), (num,), keep)
        handle.keep = keep + [found.keep, scale.keep if scale is not None else None]
        self.send_raw(handle, num, found.pointer or None, scale.pointer if scale is not None else None, ids,
                      id_type, weights, layer, stream)

    def dispatch_counts(self, handle: Handle) -> Counts:
        """Waits (bounded) until every rank's counts are here."""
        found, slots = self.counts_struct, self.slots_per_rank
        check(lib.nep_dispatch_counts(self.pointer, handle.pointer, self._at["counts_struct"]))
        return Counts(found.num_rows, found.num_real_rows, _list(ctypes.c_uint32, found.rows_per_slot, slots),
                      _list(ctypes.c_uint64, found.first_row, slots),
                      _list(ctypes.c_uint32, found.rows_per_source, self.comm.num_ranks))

    def device_counts(self, handle: Handle) -> Tuple[Memory, Memory]:
        """Executor "cuda": rows_per_slot [L] and rows_per_source [R], uint32, of this handle's dispatches in
        device memory, as bytes, filled in stream order without a wait of the host; valid as long as the
        handle."""
        found = self.counts_struct
        check(lib.nep_dispatch_counts_device(self.pointer, handle.pointer, self._at["counts_struct"]))
        return (Memory(found.rows_per_slot, 4 * self.slots_per_rank, handle, True),
                Memory(found.rows_per_source, 4 * self.comm.num_ranks, handle, True))

    def dispatch_recv(self, handle: Handle, x: Any, *, scales: Any = None, topk_slots: Any = None,
                      topk_weights: Any = None, source_rank: Any = None, source_token: Any = None,
                      stream: Optional[int] = None) -> None:
        """Completes a dispatch. Outputs, with room for C rows (Counts.num_rows, or max_rows()):

        x: [C, row], required; scales: [C, ...] where the wire has some; rank layout: topk_slots
        [C, K] int32 (-1 = elsewhere), topk_weights [C, K] fp32; expert layouts: topk_weights [C];
        source_rank, source_token: [C] int32.
        """
        keep: list = []
        found = array_of(x)
        room = found.shape[0]
        size = SIZES[found.dtype]
        for extent in found.shape:
            size *= extent
        if room and size // room != self.row_bytes:
            raise ValueError(f"nearep: the output has rows of {size // room} bytes; dispatched ones have "
                             f"{self.row_bytes}")
        wide = (room, self.top_k) if self.is_rank_layout else (room,)
        scale = array_of(scales) if scales is not None else None
        if scale is not None and room and scale.shape[0] != room:
            raise ValueError("nearep: scales must have as many rows as x")
        self.recv_raw(handle, found.pointer or None, room, scale.pointer if scale is not None else None,
                      pointer_of(topk_slots, "topk_slots", ("int32",), (room, self.top_k), keep),
                      pointer_of(topk_weights, "topk_weights", ("fp32",), wide, keep),
                      pointer_of(source_rank, "source_rank", ("int32", "uint32"), (room,), keep),
                      pointer_of(source_token, "source_token", ("int32", "uint32"), (room,), keep), stream)
        handle.keep = []

    def combine_await(self, handle: Handle, flags: Any, least: int, *, rows_per_flag: int = 0,
                      stream: Optional[int] = None) -> None:
        """Expert layouts, before combine_send: waits, bounded, until y is written, as flags say ([L] or [L, F],
        int32 or uint32): rows_per_flag rows of a slot for each, 0: all of them; written from `least` on. On a GPU
        the stream waits."""
        keep: list = []
        found = array_of(flags)
        shape = (self.slots_per_rank, None) if len(found.shape) == 2 else (self.slots_per_rank,)
        self.await_raw(handle, pointer_of(flags, "flags", ("int32", "uint32"), shape, keep) or None,
                       found.shape[1] if len(found.shape) == 2 else 1, rows_per_flag, least, stream)

    def combine_send(self, handle: Handle, y: Any, *, topk_weights: Any = None, token_weights: Any = None,
                     stream: Optional[int] = None) -> None:
        """Starts sending the experts' outputs back. y: [rows, H] of dtype, same rows as the dispatch
        output; it must stay as it is until combine_recv. topk_weights: [rows, K] fp32 (rank layout).
        token_weights: [T, K] fp32 in place of the dispatch's weights (expert layouts, one node; on all
        ranks or on none)."""
        keep: list = []
        found = array_of(y)
        if found.dtype != self.dtype and not (self.dtype == "bf16" and found.dtype in ("uint16", "int16")):
            raise ValueError(f"nearep: y is of type {found.dtype}; this ep combines {self.dtype}")
        if found.shape[-1] != self.hidden:
            raise ValueError(f"nearep: y has shape {found.shape}; its last extent must be {self.hidden}")
        weights = pointer_of(topk_weights, "topk_weights", ("fp32",), (None, self.top_k), keep)
        late = pointer_of(token_weights, "token_weights", ("fp32",), (handle.num_tokens, self.top_k), keep)
        if late is not None:
            late = late or 8  # an array of no tokens: not read, but there
        handle.keep = keep + [found.keep]
        self.combine_send_raw(handle, found.pointer or None, weights, stream, late)

    def combine_recv(self, handle: Handle, y: Any, *, bias: Sequence[Any] = (), topk_weights: Any = None,
                     stream: Optional[int] = None) -> None:
        """Completes a combine. y: [T, H] of dtype; bias: up to two of [T, H]; topk_weights: [T, K] fp32,
        the sums of those that were sent."""
        keep: list = []
        types = ("bf16", "uint16", "int16") if self.dtype == "bf16" else (self.dtype,)
        shape = (handle.num_tokens, self.hidden)
        biases = [pointer_of(value, "bias", types, shape, keep) or None for value in bias]
        self.combine_recv_raw(handle, pointer_of(y, "y", types, shape, keep) or None,
                              pointer_of(topk_weights, "topk_weights", ("fp32",),
                                         (handle.num_tokens, self.top_k), keep),
                              (biases + [None, None])[:2], stream)
        handle.keep = []

    # ---- layout, counters, recorder, maps -----------------------------------------------------------

    def layout_counts(self, topk_ids: Any, *, rows_per_rank: Any = None, rows_per_node: Any = None,
                      rows_per_slot: Any = None, is_token_in_rank: Any = None, topk_slots: Any = None,
                      layer: int = 0) -> None:
        """Routes and counts without sending. Outputs (int32 or uint32, bool): rows_per_rank [R],
        rows_per_node [N], rows_per_slot [R * L], is_token_in_rank [T, R], topk_slots [T, K]."""
        keep: list = []
        num = array_of(topk_ids).shape[0]
        topology, top_k = self.comm.topology, self.top_k
        words = ("int32", "uint32")
        outputs = sized(
            _abi.nep_layout_counts,
            rows_per_rank=pointer_of(rows_per_rank, "rows_per_rank", words, (topology.num_ranks,), keep),
            rows_per_node=pointer_of(rows_per_node, "rows_per_node", words, (topology.num_nodes,), keep),
            rows_per_slot=pointer_of(rows_per_slot, "rows_per_slot", words,
                                     (topology.num_ranks * self.slots_per_rank,), keep),
            is_token_in_rank=pointer_of(is_token_in_rank, "is_token_in_rank", ("bool", "uint8"),
                                        (num, topology.num_ranks), keep),
            topk_slots=pointer_of(topk_slots, "topk_slots", words, (num, top_k), keep))
        tokens = sized(_abi.nep_tokens, num_tokens=num, layer=layer,
                       topk_ids=pointer_of(topk_ids, "topk_ids", IDS, (num, top_k), keep) or None,
                       id_type=IDS.index(array_of(topk_ids).dtype))
        check(lib.nep_ep_layout(self.pointer, ctypes.addressof(tokens), ctypes.addressof(outputs)))

    def stats(self) -> dict:
        """Counters since creation, this rank's view; the names and meanings of struct nep_stats."""
        found = sized(_abi.nep_stats)
        check(lib.nep_ep_stats(self.pointer, ctypes.addressof(found)))
        return {name: getattr(found, name) for name, _ in found._fields_ if name != "size"}

    def waits(self) -> List[dict]:
        """For whom this rank waited, since creation: phase, rank, num, wait_ns, longest_ns each."""
        num = ctypes.c_uint32()
        room = 64
        while True:
            found = (_abi.nep_wait_stat * room)()
            status = lib.nep_ep_waits(self.pointer, ctypes.addressof(found), room, ctypes.addressof(num))
            if status != _abi.NEP_ERR_OVERFLOW or room > 1 << 20:
                break
            room *= 8
        check(status)
        return [dict(phase=one.phase.decode(), rank=one.rank, num=one.num, wait_ns=one.wait_ns,
                     longest_ns=one.longest_ns) for one in found[:num.value]]

    def wait_by_rank(self) -> List[int]:
        """[R] nanoseconds that this rank has waited for each other."""
        sums = [0] * self.comm.num_ranks
        for one in self.waits():
            if one["rank"] < len(sums):
                sums[one["rank"]] += one["wait_ns"]
        return sums

    def set_timeout(self, seconds: float) -> None:
        """Deadline of the waits of later calls; 0: the communicator's."""
        check(lib.nep_ep_set_timeout(self.pointer, int(seconds * 1e9)))

    def resume(self) -> Tuple[int, int]:
        """After Comm.recover: (first operation that is to be done again, number of the next)."""
        first, following = ctypes.c_uint64(), ctypes.c_uint64()
        check(lib.nep_ep_resume(self.pointer, ctypes.addressof(first), ctypes.addressof(following)))
        return first.value, following.value

    def load(self, layer: int = 0) -> List[int]:
        """(token, expert) pairs per logical expert that this rank has dispatched: [E]."""
        pairs = (ctypes.c_uint64 * self.num_experts)()
        check(lib.nep_ep_load(self.pointer, layer, ctypes.addressof(pairs)))
        return list(pairs)

    def record_start(self, *, sample: float = 0.01, max_requests: int = 0, max_bytes: int = 0,
                     model: Optional[str] = None) -> None:
        """Records the routing of fresh dispatches from now on; pass request_keys to dispatch_send.
        sample: share of the requests, above 0 to 1."""
        params = sized(_abi.nep_recorder_params, sample_ppm=max(1, round(sample * 1e6)),
                       max_requests=max_requests, max_bytes=max_bytes, model=text(model))
        check(lib.nep_ep_record_start(self.pointer, ctypes.addressof(params)))

    def record_save(self, path: Any) -> int:
        """Writes what is recorded so far as a .nept trace; returns its number of tokens."""
        num = ctypes.c_uint64()
        check(lib.nep_ep_record_save(self.pointer, text(path), ctypes.addressof(num)))
        return num.value

    def record_stop(self) -> None:
        """Forgets what was recorded."""
        lib.nep_ep_record_stop(self.pointer)

    def stage_map(self, map: Any, op: int) -> int:
        """Uses map from operation number `op` on; all ranks name the same. Returns its version."""
        version = ctypes.c_uint32()
        check(lib.nep_ep_stage_map(self.pointer, map.pointer, op, ctypes.addressof(version)))
        return version.value

    def map_state(self) -> dict:
        """next_op, version, newest, oldest_held, as in struct nep_map_state."""
        found = sized(_abi.nep_map_state)
        check(lib.nep_ep_map_state(self.pointer, ctypes.addressof(found)))
        return {name: getattr(found, name) for name, _ in found._fields_ if name != "size"}

    # ---- memory -------------------------------------------------------------------------------

    def alloc(self, num_bytes: int) -> "Buffer":
        """num_bytes of memory that the ranks of this node map: rows in it move once. Zeroed, aligned
        to 4096. When the pool is exhausted it is private memory, with one more copy."""
        return Buffer(self, num_bytes)

    def register(self, value: Any = None, fd: int = -1) -> int:
        """Lets the ranks of the node reach an array of the caller's, so that rows in it move once. Collective,
        in the same order on all ranks, with no operation outstanding. value: contiguous, in host memory; None:
        this rank takes part and has nothing. fd: of the memfd or shared memory object that it is mapped from
        (mmap with MAP_SHARED); -1 works where all ranks are threads of one process. Returns the number for
        deregister(); until then, or until the ep is closed, the array is kept and must stay mapped."""
        params = sized(_abi.nep_buffer_params, fd=fd)
        found = array_of(value) if value is not None else None
        if found is not None:
            size = SIZES[found.dtype]
            for extent in found.shape:
                size *= extent
            params.base, params.bytes = found.pointer or None, size
        number = ctypes.c_uint32()
        self.comm.guarded(lambda: check(lib.nep_buffer_register(self.pointer, ctypes.addressof(params),
                                                                ctypes.addressof(number))))
        self._registered[number.value] = found
        return number.value

    def deregister(self, number: int) -> None:
        """Every rank calls it, in the same order; waits for nobody."""
        check(lib.nep_buffer_deregister(self.pointer, number))
        self._registered.pop(number, None)

    def empty(self, shape: Sequence[int], dtype: Any) -> Any:
        """A torch tensor (dtype of torch) or a NumPy array (any other dtype) in such memory."""
        num = 1
        for extent in shape:
            num *= extent
        if type(dtype).__module__ == "torch":
            import torch
            item = torch.empty(0, dtype=dtype).element_size()
            return self.alloc(max(num * item, 1)).as_torch().view(-1)[:num * item].view(dtype).view(*shape)
        import numpy
        dtype = numpy.dtype(dtype)
        memory = self.alloc(max(num * dtype.itemsize, 1)).memory
        return numpy.asarray(memory)[:num * dtype.itemsize].view(dtype).reshape(shape)


class Buffer(Owner):
    """Memory from the pool of an ep. Arrays made from it keep it alive, until the ep is closed."""

    def __init__(self, ep: Ep, num_bytes: int):
        pointer = create(lib.nep_buffer_alloc, ep.pointer, num_bytes)
        super().__init__(pointer, lambda at: lib.nep_buffer_free(ep._pointer, at), ep)
        self.num_bytes = num_bytes
        self.is_cuda = ep.executor == "cuda"

    @property
    def memory(self) -> Memory:
        """An object with an array interface, which keeps this alive."""
        return Memory(self.pointer, self.num_bytes, self, self.is_cuda)

    def as_torch(self) -> Any:
        """[num_bytes] uint8."""
        import torch
        if self.is_cuda:
            return torch.as_tensor(self.memory, device="cuda")
        whole: Any = (ctypes.c_uint8 * self.num_bytes).from_address(self.pointer)
        whole.owner = self
        return torch.frombuffer(whole, dtype=torch.uint8)
