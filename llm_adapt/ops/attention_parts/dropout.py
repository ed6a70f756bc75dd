"""Dropout of attention weights as a function of a seed and of where a weight stands.

No generator is used: the same seed drops the same weights in backward, in activation recompute, on every device and
in whatever blocks a kernel computes, and the random state of the process stays as it was.
Source: the integer mixer is the finaliser of MurmurHash3 (Appleby, public domain), over 32-bit words in int64.
"""

from __future__ import annotations

import torch

__all__ = ["kept"]

_WORD = 0xFFFFFFFF


def kept(
    seed: int, probability: float, batch: int, heads: int, rows: slice, columns: slice, device: torch.device
) -> torch.Tensor:
    """Whether a weight is kept [batch, heads, rows, columns], True with 1 - probability, each on its own."""
    whole = torch.full((), seed, dtype=torch.int64, device=device)
    key = _mixed(_mixed(whole & _WORD) ^ ((whole >> 32) & _WORD))
    head = _mixed(key ^ torch.arange(batch * heads, device=device))
    row = torch.arange(rows.start, rows.stop, device=device)
    column = torch.arange(columns.start, columns.stop, device=device)
    # Odd multipliers (of xxHash32) keep indices apart that differ in few bits.
    row = _mixed(head[:, None] ^ (row * 0x9E3779B1 & _WORD))
    drawn = _mixed(row[:, :, None] ^ (column * 0x85EBCA77 & _WORD))
    return torch.ge(drawn, int(probability * 2**32)).view(batch, heads, *drawn.shape[1:])


def _mixed(x: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit words after which every bit depends on every other."""
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _WORD
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _WORD
    return x ^ (x >> 16)
