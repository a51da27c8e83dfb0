# SPDX-License-Identifier: Apache-2.0
"""Traces of routing (.nept): reading, writing, and converting what serving engines return.

Formats read here: what vLLM returns with enable_return_routed_experts (one array of
[tokens, layers, top-k] expert ids per request), and what SGLang's expert distribution recorder dumps
in its per-token mode.
"""
import ctypes
from typing import Any, Dict, Iterable, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

from . import _abi
from ._lib import Owner, check, create, lib, sized, text


class TraceShape(NamedTuple):
    """Sizes of a trace."""

    num_layers: int
    num_experts: int
    top_k: int
    num_requests: int
    num_domains: int
    num_tokens: int


class Request(NamedTuple):
    """A request of a trace: prefill tokens first, then decode, from first_token on."""

    domain: int
    prefill_tokens: int
    decode_tokens: int
    has_boundary: bool
    first_token: int


class Trace(Owner):
    """A .nept file, checked whole when it is opened. Any number of threads may read it."""

    def __init__(self, path: Any):
        super().__init__(create(lib.nep_trace_open, text(path)), lib.nep_trace_close)
        found = sized(_abi.nep_trace_shape)
        check(lib.nep_trace_get_shape(self.pointer, ctypes.addressof(found)))
        self.shape = TraceShape(found.num_layers, found.num_experts, found.top_k, found.num_requests,
                                found.num_domains, found.num_tokens)
        self.model = lib.nep_trace_model(self.pointer).decode(errors="replace")
        self.domains = [lib.nep_trace_domain(self.pointer, i).decode(errors="replace")
                        for i in range(self.shape.num_domains)]

    def request(self, index: int) -> Request:
        """The request of this number."""
        at = lib.nep_trace_request_at(self.pointer, index)
        if not at:
            raise IndexError(f"nearep: the trace has {self.shape.num_requests} requests, not {index + 1}")
        found = _abi.nep_trace_request.from_address(at)
        return Request(found.domain, found.prefill_tokens, found.decode_tokens,
                       not found.flags & _abi.NEP_TRACE_NO_BOUNDARY, found.first_token)

    def ids(self, token: int, layer: int) -> List[int]:
        """[K] expert ids, -1 = none."""
        if not (0 <= token < self.shape.num_tokens and 0 <= layer < self.shape.num_layers):
            raise IndexError(f"nearep: token {token} or layer {layer} is not in the trace")
        ids = (ctypes.c_int32 * self.shape.top_k)()
        lib.nep_trace_ids(self.pointer, token, layer, ctypes.addressof(ids))
        return list(ids)


class TraceWriter(Owner):
    """Collects requests in memory and writes them as one .nept file. One thread at a time."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, model: str = "",
                 domains: Sequence[str] = ("all",)):
        shape = sized(_abi.nep_trace_shape, num_layers=num_layers, num_experts=num_experts, top_k=top_k,
                      num_domains=len(domains))
        names = (ctypes.c_char_p * len(domains))(*[name.encode() for name in domains])
        super().__init__(create(lib.nep_trace_writer_create, ctypes.addressof(shape), model.encode(),
                                ctypes.addressof(names)), lib.nep_trace_writer_destroy)
        self.num_layers, self.num_experts, self.top_k = num_layers, num_experts, top_k
        self.domains = list(domains)

    def add(self, ids: Any, *, prefill_tokens: Optional[int] = None, domain: int = 0) -> None:
        """One request. ids: [tokens, layers, top-k], nested lists or any array, -1 = none, prefill
        first. prefill_tokens: how many; None: not known."""
        flat = _flatten(ids)
        per_token = self.num_layers * self.top_k
        num = len(flat) // per_token
        if num * per_token != len(flat):
            raise ValueError(f"nearep: {len(flat)} ids are not whole tokens of {self.num_layers} layers x "
                             f"{self.top_k}")
        array = (ctypes.c_int32 * max(len(flat), 1))(*flat)
        prefill = prefill_tokens or 0
        if prefill > num:
            raise ValueError(f"nearep: {prefill} tokens of prefill in a request of {num}")
        request = sized(_abi.nep_trace_request) if hasattr(_abi.nep_trace_request, "size") else \
            _abi.nep_trace_request()
        request.domain, request.prefill_tokens, request.decode_tokens = domain, prefill, num - prefill
        request.flags = _abi.NEP_TRACE_NO_BOUNDARY if prefill_tokens is None else 0
        check(lib.nep_trace_writer_add(self.pointer, ctypes.addressof(request), ctypes.addressof(array)))

    def save(self, path: Any) -> None:
        """Writes through a temporary file; the writer stays usable."""
        check(lib.nep_trace_writer_save(self.pointer, text(path)))


def _flatten(ids: Any) -> List[int]:
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    flat = list(ids)
    while flat and isinstance(flat[0], (list, tuple)) or (flat and hasattr(flat[0], "tolist")):
        flat = [value for part in flat for value in (part.tolist() if hasattr(part, "tolist") else part)]
    return [int(value) for value in flat]


def _shape_of(ids: Any) -> Tuple[int, ...]:
    shape = getattr(ids, "shape", None)
    if shape is not None:
        return tuple(int(extent) for extent in shape)
    found = []
    while isinstance(ids, (list, tuple)):
        found.append(len(ids))
        ids = ids[0] if ids else None
    return tuple(found)


def from_vllm(requests: Iterable[Dict[str, Any]], path: Any, *, num_experts: int, model: str = "") -> int:
    """Writes vLLM's routed experts as a trace; returns the number of requests.

    requests: one mapping per request with `routed_experts` [tokens, layers, top-k] (the attribute of
    that name of CompletionOutput), and optionally `num_prompt_tokens` and `domain` (a name). With
    shorter routing than tokens (the last token is not routed) only what is there is written.
    """
    listed = [item if isinstance(item, dict) else vars(item) for item in requests]
    if not listed:
        raise ValueError("nearep: no requests")
    domains = sorted({str(item.get("domain", "all")) for item in listed})
    _, layers, top_k = _shape_of(listed[0]["routed_experts"])
    with TraceWriter(layers, num_experts, top_k, model=model, domains=domains) as writer:
        for number, item in enumerate(listed):
            shape = _shape_of(item["routed_experts"])
            if len(shape) != 3 or shape[1:] != (layers, top_k):
                raise ValueError(f"nearep: request {number} has routing of shape {shape}; the first has "
                                 f"{layers} layers and top-{top_k}")
            prompt = item.get("num_prompt_tokens")
            writer.add(item["routed_experts"], domain=domains.index(str(item.get("domain", "all"))),
                       prefill_tokens=None if prompt is None else min(int(prompt), shape[0]))
        writer.save(path)
    return len(listed)


class _Collected:
    def __init__(self) -> None:
        self.prefill: list = []
        self.decode: list = []
        self.next_position = 0


class _Batches:
    """Requests of a dump without request ids: a prefill at position 0 begins one; what comes at
    position p goes to the one that has been waiting longest in batch order for p."""

    def __init__(self) -> None:
        self.requests: List[_Collected] = []
        self._live: List[_Collected] = []

    def _take(self, position: int, used: Set[int]) -> _Collected:
        for found in self._live:
            if found.next_position == position and id(found) not in used:
                return found
        found = _Collected()
        self.requests.append(found)
        self._live.append(found)
        return found

    def owners(self, record: Dict[str, Any], lengths: List[int]) -> Iterator[_Collected]:
        """One _Collected for each token of a forward pass."""
        positions, at = _flatten(record["positions"]), 0
        used: Set[int] = set()
        for length in lengths:
            if length == 0:
                continue
            found = self._take(positions[at], used)
            used.add(id(found))
            found.next_position = positions[at] + length
            yield from [found] * length
            at += length


_DECODE = 2  # SGLang's ForwardMode.DECODE


def _lengths(record: Dict[str, Any], num: int) -> List[int]:
    lengths = record.get("extend_seq_lens")
    if lengths is None or record.get("forward_mode") == _DECODE:
        return [1] * num
    return _flatten(lengths)


def _logical(ids: Any, table: Any) -> Any:
    if table is None:
        return ids
    return [[[row[value] if value >= 0 else -1 for value in token] for token in layer]
            for layer, row in zip(ids, table)]


def from_sglang(dump: Any, path: Any, *, num_experts: int, model: str = "") -> int:
    """Writes a dump of SGLang's expert distribution recorder (mode per_token) as a trace; returns the
    number of requests.

    dump: what torch.load gives for one .pt file: a mapping with `records` and
    `last_physical_to_logical_map` [layers, physical experts]; or the records alone, whose ids are then
    logical. A record is a forward pass: `topk_ids_of_layer` [layers, tokens, top-k] (-1 = none, also for
    dense layers), `positions`, `extend_seq_lens`, `forward_mode`. SGLang does not write which request a
    token belongs to: it is worked out from positions and the order in the batch, where two of equal
    length may be mistaken for each other; `rids`, which some branches write, are used if they are there.
    """
    records: Any = dump
    table: Any = None
    if isinstance(dump, dict):
        records, table = dump["records"], dump.get("last_physical_to_logical_map")
        table = table.tolist() if hasattr(table, "tolist") else table
    batches = _Batches()
    named: Dict[Any, _Collected] = {}
    shape: Sequence[int] = ()
    for record in records:
        ids, found = record["topk_ids_of_layer"], _shape_of(record["topk_ids_of_layer"])
        if len(found) != 3 or (shape and (found[0], found[2]) != (shape[0], shape[2])):
            raise ValueError(f"nearep: topk_ids_of_layer has shape {found}; it must be [layers, tokens, top-k], "
                             "with the layers and top-k of the others")
        shape = found
        num = len(_flatten(record["positions"])) if "positions" in record else found[1]
        lengths = _lengths(record, num)
        listed = _logical(ids.tolist() if hasattr(ids, "tolist") else ids, table)
        if record.get("rids") is not None:
            owners = [named.setdefault(rid, _Collected()) for rid, length in zip(record["rids"], lengths)
                      for _ in range(length)]
        else:
            owners = list(batches.owners(record, lengths))
        is_decode = record.get("forward_mode") == _DECODE
        for token, owner in enumerate(owners[:found[1]]):
            row = [layer[token] for layer in listed]
            (owner.decode if is_decode else owner.prefill).append(row)
    requests = list(named.values()) + batches.requests
    if not requests:
        raise ValueError("nearep: no records")
    with TraceWriter(shape[0], num_experts, shape[2], model=model) as writer:
        for one in requests:
            writer.add(one.prefill + one.decode, prefill_tokens=len(one.prefill))
        writer.save(path)
    return len(requests)


class Recorder:
    """Collects top-k tensors while serving, for engines whose dispatch is not nearep's (else use
    Ep.record_start): add() once per layer of a step, layers ascending; then save()."""

    def __init__(self, num_layers: int, num_experts: int, top_k: int, *, model: str = ""):
        self.num_layers, self.num_experts, self.top_k, self.model = num_layers, num_experts, top_k, model
        self._step: List[Any] = []
        self._keys: List[int] = []
        self._prefill: List[bool] = []
        self._requests: Dict[int, _Collected] = {}

    def add(self, topk_ids: Any, request_keys: Sequence[int], is_prefill: Sequence[bool]) -> None:
        """topk_ids: [T, K] of the next layer; request_keys, is_prefill: [T]."""
        ids = topk_ids.tolist() if hasattr(topk_ids, "tolist") else [list(row) for row in topk_ids]
        keys = _flatten(request_keys)
        if len(ids) != len(keys) or (self._step and keys != self._keys):
            raise ValueError("nearep: all layers of a step must have the same tokens in the same order")
        self._keys, self._prefill = keys, [bool(value) for value in _flatten(is_prefill)]
        self._step.append(ids)
        if len(self._step) < self.num_layers:
            return
        for token, (key, prefill) in enumerate(zip(self._keys, self._prefill)):
            into = self._requests.setdefault(key, _Collected())
            (into.prefill if prefill else into.decode).append([ids[token] for ids in self._step])
        self._step = []

    def save(self, path: Any) -> int:
        """Writes all whole steps as a trace; returns the number of requests."""
        with TraceWriter(self.num_layers, self.num_experts, self.top_k, model=self.model) as writer:
            for found in self._requests.values():
                writer.add(found.prefill + found.decode, prefill_tokens=len(found.prefill))
            writer.save(path)
        return len(self._requests)
