"""Kernels in plain PyTorch that never hold a matrix of all scores, for devices whose libraries have none that fits.

Source: Rabe and Staats 2021, Self-attention does not need O(n^2) memory.
"""

from __future__ import annotations

from typing import Literal

import torch

from llm_adapt.ops.attention_parts.blocks import attend_in_blocks
from llm_adapt.ops.attention_parts.request import Biases, Options, Request, Sequences
from llm_adapt.ops.dispatch import kernel

__all__ = ["attention"]


@kernel("attention", "Rabe and Staats 2021; llm_adapt/ops/attention_parts/blocks.py")
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    seqused_q: torch.Tensor | None = None,
    seqused_k: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    seed: int | None = None,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    return_lse: bool = False,
    deterministic: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Everything that the reference computes, in blocks of queries that backward forms again."""
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k)
    options = Options(layout, causal, window_left, window_right, scale, softcap, dropout_p, seed)
    request = Request(q, k, v, sequences, Biases(mask, alibi_slopes, sinks), options)
    out, lse = request.finished(*attend_in_blocks(request))
    return (out, lse) if return_lse else out
