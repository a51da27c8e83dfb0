# SPDX-License-Identifier: Apache-2.0
"""Handles: opaque to frameworks, sequences to upstream's tests. Items that only a test reads are made
when they are read."""
from __future__ import annotations

from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple

import torch

if TYPE_CHECKING:
    from .seats import Kind, Seat, Shape


class Owned:
    """A handle of nearep that goes back to its pool with this."""

    def __init__(self, seat: Seat):
        self.seat = seat
        self.handle = seat.handle()
        self.is_idle = True
        if seat.ep.executor == "cuda" and torch.cuda.is_current_stream_capturing():
            seat.captured.append(self)  # a graph uses it for good

    def __del__(self) -> None:
        try:
            if self.is_idle:
                self.seat.free.append(self.handle)
        except AttributeError:
            pass


class _Lazy(Sequence[Any]):
    _makers: Tuple[str, ...] = ()

    def __init__(self) -> None:
        self._made: Dict[int, Any] = {}

    def __len__(self) -> int:
        return len(self._makers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return tuple(self[i] for i in range(*index.indices(len(self))))
        index = range(len(self))[index]
        if index not in self._made:
            self._made[index] = getattr(self, self._makers[index])()
        return self._made[index]


class NormalHandle(_Lazy):
    """Of a dispatch in normal mode: 6 items on one node, 10 on several, as upstream orders them.

    What nearep does not have is computed from what it has: prefix sums by source of this rank's own
    column (other columns are -1: a rank knows what it receives, not what others do), channels of equal
    shares of tokens.
    """

    def __init__(self, owned: Owned, key: Kind, num_channels: int):
        super().__init__()
        self.owned, self.key, self.num_channels = owned, key, num_channels
        self.twins: Dict[Any, Owned] = {}  # the same routing on an ep for another payload
        self.routing: Any = None  # (topk_idx, its version, topk_weights)
        self.is_token_in_rank: Any = None
        self.num_tokens = 0
        self.most = 0            # tokens of the largest rank's call, the same number on all
        self.alignment = 1
        self.ones: Optional[torch.Tensor] = None  # expanded: weights of 1 for its combine, [T, K]
        self.num_rows = 0
        self.rows_per_source: Optional[List[int]] = None
        self.source_token: Any = None
        self.source_rank: Any = None
        self.topology: Any = None
        self._makers = ("_rank_prefix", "_channel_prefix", "_recv_channel_prefix", "_src_idx", "_in_rank",
                        "_send_head")

    def set_nodes(self, topology: Any) -> None:
        """Which items there are follows from the number of nodes."""
        self.topology = topology
        if topology.num_nodes > 1:
            self._makers = ("_in_rank", "_rdma_channel_prefix", "_channel_prefix",
                            "_recv_rdma_channel_prefix", "_recv_rdma_rank_prefix_sum",
                            "_recv_channel_prefix", "_recv_gbl_rank_prefix_sum", "_src_meta", "_rdma_head",
                            "_nvl_head")

    # ---- items --------------------------------------------------------------------------------

    def _sources(self) -> torch.Tensor:
        if self.rows_per_source is None:  # worst case: counts were never read on the host
            found = self.source_rank[:self.num_rows]
            self.rows_per_source = torch.bincount(found[found >= 0].long().cpu(),
                                                  minlength=self.topology.num_ranks).tolist()
        return torch.tensor(self.rows_per_source, dtype=torch.int32, device="cpu")

    def _rank_prefix(self) -> torch.Tensor:
        ranks = self.topology.num_ranks
        matrix = torch.full((ranks, ranks), -1, dtype=torch.int32, device="cpu")
        matrix[:, self.topology.rank] = torch.cumsum(self._sources(), 0).int()
        return matrix.to(self.is_token_in_rank.device)

    def _prefix_by_channel(self, sent: torch.Tensor) -> torch.Tensor:
        """[X, C]: inclusive prefix by channel of what goes to each of X; channels share tokens evenly."""
        tokens, channels = sent.shape[0], self.num_channels
        share = -(-tokens // channels) if tokens else 0
        ends = [min(share * (c + 1), tokens) for c in range(channels)]
        total = torch.cat([torch.zeros(1, sent.shape[1], dtype=torch.int64, device=sent.device),
                           sent.long().cumsum(0)])
        return total[ends].t().int().contiguous()

    def _channel_prefix(self) -> torch.Tensor:
        return self._prefix_by_channel(self.is_token_in_rank)

    def _by_node(self) -> torch.Tensor:
        nodes = torch.tensor(self.topology.node_of_rank, device=self.is_token_in_rank.device)
        sent = torch.zeros(self.num_tokens, self.topology.num_nodes, dtype=torch.int64,
                           device=self.is_token_in_rank.device)
        return sent.index_add_(1, nodes, self.is_token_in_rank.long()) > 0

    def _rdma_channel_prefix(self) -> torch.Tensor:
        return self._prefix_by_channel(self._by_node())

    def _recv_channel_prefix(self) -> torch.Tensor:
        """Where this rank's rows of each (source, channel) start, channels by equal shares of rows."""
        rows = self._sources()
        share = torch.div(rows + self.num_channels - 1, self.num_channels, rounding_mode="floor")
        channels = torch.arange(self.num_channels, dtype=torch.int32, device="cpu")
        return torch.minimum(share[:, None] * channels, rows[:, None])

    def _recv_rdma_channel_prefix(self) -> torch.Tensor:
        found = self._recv_channel_prefix()
        nodes = torch.tensor(self.topology.node_of_rank, device="cpu")
        return torch.zeros(self.topology.num_nodes, self.num_channels, dtype=torch.int32, device="cpu").index_add_(
            0, nodes, found)

    def _recv_gbl_rank_prefix_sum(self) -> torch.Tensor:
        return torch.cumsum(self._sources(), 0).int().to(self.is_token_in_rank.device)

    def _recv_rdma_rank_prefix_sum(self) -> torch.Tensor:
        nodes = torch.tensor(self.topology.node_of_rank, device="cpu")
        sums = torch.zeros(self.topology.num_nodes, dtype=torch.int64, device="cpu")
        sums.index_add_(0, nodes, self._sources().long())
        return sums.cumsum(0).int()

    def _src_idx(self) -> torch.Tensor:
        return self.source_token[:self.num_rows]

    def _src_meta(self) -> torch.Tensor:
        """u8[N, 8]: source rank and token, two int32."""
        pair = torch.stack([self.source_rank[:self.num_rows], self.source_token[:self.num_rows]], 1)
        return pair.contiguous().view(torch.uint8)

    def _in_rank(self) -> torch.Tensor:
        return self.is_token_in_rank

    def _heads(self, sent: torch.Tensor) -> torch.Tensor:
        order = sent.long().cumsum(0) - 1
        return torch.where(sent, order, torch.full_like(order, -1)).int()

    def _send_head(self) -> torch.Tensor:
        return self._heads(self.is_token_in_rank)

    def _rdma_head(self) -> torch.Tensor:
        return self._heads(self._by_node())

    def _nvl_head(self) -> torch.Tensor:
        size = max(self.topology.node_ranks)
        return torch.zeros(self.num_rows, size, dtype=torch.int32, device=self.is_token_in_rank.device)


class LowLatencyHandle(_Lazy):
    """Of a low-latency dispatch: source tokens [L, R * M], ranges [L, R] (begin << 32 | count), M, H, E."""

    _makers = ("_src_info", "_layout_range", "_tokens", "_hidden", "_experts")

    def __init__(self, owned: Owned, shape: Shape, source_token: torch.Tensor, source_rank: torch.Tensor,
                 counts: torch.Tensor):
        super().__init__()
        self.owned, self.shape = owned, shape
        self.source_token, self.source_rank, self.counts = source_token, source_rank, counts
        self.topk_idx: Any = None  # (the dispatch's, its version, ranks that were masked then)
        self.ids: Any = None       # as they were sent
        self.sent: Any = None      # rows and scales, which must stay until the dispatch completes
        self.weights: Any = None   # (those given to the dispatch, their version), or None
        self.complete: Any = None  # finishes the dispatch if its hook has not run

    def _ready(self) -> None:
        if self.complete is not None:
            self.complete()

    def _src_info(self) -> torch.Tensor:
        self._ready()
        return self.source_token

    def _layout_range(self) -> torch.Tensor:
        self._ready()
        slots, rows = self.source_rank.shape
        ranks = rows // self.shape[0]
        is_row = torch.arange(rows, device=self.counts.device)[None, :] < self.counts[:, None]
        at = torch.arange(slots, device=self.counts.device)[:, None] * ranks + self.source_rank.long()
        num = torch.bincount(at[is_row], minlength=slots * ranks).view(slots, ranks)
        begin = num.cumsum(1) - num
        return begin * (1 << 32) + num

    def _tokens(self) -> int:
        return self.shape[0]

    def _hidden(self) -> int:
        return self.shape[1]

    def _experts(self) -> int:
        return self.shape[2]
