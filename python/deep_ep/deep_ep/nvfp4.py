# SPDX-License-Identifier: Apache-2.0
"""NVFP4 of low_latency_dispatch(use_nvfp4=True), as vLLM asks for it: 4-bit numbers, two in a byte, and a scale of
type e4m3 for each 16 channels. Made by torch on the sending side, a few kernels over [T, H]; the bytes travel as
they are, and scales are put into the order that Blackwell's matrix multiplies read."""
from __future__ import annotations

from typing import Tuple, Union

import torch

from .seats import FP8

BLOCK = 16   # channels that share a scale
MOST = 6.0   # largest 4-bit number


def _encode(x: torch.Tensor, fraction_bits: int, least_exponent: int, bias: int) -> torch.Tensor:
    """Not negative numbers as bits of a small float type, nearest, ties to even; within its range."""
    exponent = (torch.frexp(x)[1] - 1).masked_fill(x == 0, least_exponent).clamp(min=least_exponent)
    units = torch.round(torch.ldexp(x, fraction_bits - exponent))
    return ((exponent + (bias - 1)) * 2 ** fraction_bits + units.int()).to(torch.uint8)


def quantise(x: torch.Tensor, global_scale: Union[torch.Tensor, float]) -> Tuple[torch.Tensor, torch.Tensor]:
    """(uint8 [T, H/2], low half first; uint8 [T, H/16], bits of e4m3) of x [T, H]. A number is worth its 4 bits
    times its scale, divided by global_scale (one, or one for each token)."""
    tokens, hidden = x.shape
    factor = torch.as_tensor(global_scale, dtype=torch.float32, device=x.device).reshape(-1, 1)
    blocks = (x.float() * factor).view(tokens, hidden // BLOCK, BLOCK)
    scales = (blocks.abs().amax(2) / MOST).clamp(max=448.0)
    bits = _encode(scales, 3, -6, 7)
    # what the bits say: the numbers are rounded with it
    exponent, units = (bits >> 3).int(), (bits & 7).int()
    stored = torch.ldexp((units + 8 * (exponent > 0)).float(), exponent.clamp(min=1) - 10)
    inverse = torch.where(stored > 0, 1 / stored, torch.zeros_like(stored))
    scaled = blocks * inverse[:, :, None]
    number = _encode(scaled.abs().clamp(max=MOST), 1, 0, 1) | (torch.signbit(scaled).to(torch.uint8) << 3)
    number = number.view(tokens, hidden // 2, 2)
    return number[:, :, 0] | (number[:, :, 1] << 4), bits


def room(slots: int, rows: int, columns: int, device: torch.device) -> Tuple[torch.Tensor, torch.Tensor]:
    """(memory for the scales of rows [L, N, H/16], the view of it that matrix multiplies take, [32, 4, ceil(N/128), 4,
    ceil(H/64), L]): scale (l, n, c) is at [n % 32, n / 32 % 4, n / 128, c % 4, c / 4, l]."""
    stored = torch.empty(slots, -(-rows // 128), -(-columns // 4), 32, 4, 4, dtype=torch.uint8, device=device)
    return stored, stored.view(FP8).permute(3, 4, 1, 5, 2, 0)


def arrange(scales: torch.Tensor, stored: torch.Tensor) -> None:
    """Fills it from [L, N, H/16] uint8."""
    slots, rows, columns = scales.shape
    tiles, groups = stored.shape[1:3]
    if rows % 128 or columns % 4:
        scales = torch.nn.functional.pad(scales, (0, groups * 4 - columns, 0, tiles * 128 - rows))
    stored.copy_(scales.view(slots, tiles, 4, 32, groups, 4).permute(0, 1, 4, 3, 2, 5))
