# SPDX-License-Identifier: Apache-2.0
"""Config: accepted, checked and passed around as upstream's is. nearep sizes its buffers by itself,
so the numbers only answer the size hints."""
from typing import Dict, Tuple

_DISPATCH = {2: (24, 256, 6, 128), 4: (6, 256, 6, 128), 8: (6, 256, 6, 128), 16: (36, 288, 20, 128),
             24: (32, 288, 8, 128), 32: (32, 288, 8, 128), 48: (32, 288, 8, 128), 64: (32, 288, 8, 128),
             96: (20, 480, 12, 128), 128: (20, 560, 12, 128), 144: (32, 720, 12, 128),
             160: (28, 720, 12, 128)}
_COMBINE = {2: (10, 256, 6, 128), 4: (9, 256, 6, 128), 8: (4, 256, 6, 128), 16: (4, 288, 12, 128),
            24: (1, 288, 8, 128), 32: (1, 288, 8, 128), 48: (1, 288, 8, 128), 64: (1, 288, 8, 128),
            96: (1, 480, 8, 128), 128: (1, 560, 8, 128), 144: (2, 720, 8, 128), 160: (2, 720, 8, 128)}


class Config:
    """Positional, as upstream: SMs, then chunked send and receive tokens on NVLink and on RDMA."""

    def __init__(self, num_sms: int = 20, num_max_nvl_chunked_send_tokens: int = 6,
                 num_max_nvl_chunked_recv_tokens: int = 256, num_max_rdma_chunked_send_tokens: int = 6,
                 num_max_rdma_chunked_recv_tokens: int = 256):
        if num_sms < 0:
            raise ValueError(f"deep_ep.Config: num_sms is {num_sms}")
        for name, send, recv in (("nvl", num_max_nvl_chunked_send_tokens, num_max_nvl_chunked_recv_tokens),
                                 ("rdma", num_max_rdma_chunked_send_tokens,
                                  num_max_rdma_chunked_recv_tokens)):
            if not 0 < send < recv:
                raise ValueError(f"deep_ep.Config: {name} sends chunks of {send} tokens and receives {recv}; "
                                 "the first must be above 0 and below the second")
        send = num_max_rdma_chunked_send_tokens
        recv = -(-num_max_rdma_chunked_recv_tokens // send) * send
        if recv < 2 * send:
            raise ValueError(f"deep_ep.Config: rdma receives {recv} tokens; it must be twice the {send} sent")
        self.num_sms = num_sms
        self.num_max_nvl_chunked_send_tokens = num_max_nvl_chunked_send_tokens
        self.num_max_nvl_chunked_recv_tokens = num_max_nvl_chunked_recv_tokens
        self.num_max_rdma_chunked_send_tokens = send
        self.num_max_rdma_chunked_recv_tokens = recv

    def _hint(self, hidden_bytes: int, peers: int, tokens: int, more: int) -> int:
        per_token = hidden_bytes + 128 * (8 + 4 + 4) + 16  # ids, weights and scales of the largest kind
        size = max(self.num_sms // 2, 1) * peers * (tokens * per_token + more)
        return -(-size // 128) * 128

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes; nearep does not need them, callers pass them on."""
        return self._hint(hidden_bytes, min(num_ranks, 8), self.num_max_nvl_chunked_recv_tokens, 64)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        """Bytes; 0 up to 8 ranks."""
        if num_ranks <= 8:
            return 0
        return self._hint(hidden_bytes, -(-num_ranks // 8), 2 * self.num_max_rdma_chunked_recv_tokens, 128)


def _nearest(table: Dict[int, Tuple[int, int, int, int]], num_ranks: int, num_sms: int) -> Config:
    """Any number of ranks: the entry of the next larger published one, else the largest."""
    if num_ranks < 1:
        raise ValueError(f"deep_ep: {num_ranks} ranks")
    key = next((ranks for ranks in sorted(table) if ranks >= num_ranks), max(table))
    return Config(num_sms, *table[key])


def dispatch_config(num_ranks: int, num_sms: int) -> Config:
    """Of Buffer.get_dispatch_config."""
    return _nearest(_DISPATCH, num_ranks, num_sms)


def combine_config(num_ranks: int, num_sms: int) -> Config:
    """Of Buffer.get_combine_config."""
    return _nearest(_COMBINE, num_ranks, num_sms)
