"""Attention by all its scores: of short sequences on the CPU, where matrix products outrun torch's fused kernel.

Letters as in llm_adapt/ops/attention.py.
"""

from __future__ import annotations

import torch

__all__ = ["attention_by_scores", "is_for_scores"]

_MOST_SCORES = 2**18  # of one head: 512 queries of 512 keys. Their memory is what the fused kernel is there to save.


def is_for_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call on [B, H, S, D] takes less time so, and is as accurate.

    Without gradients torch's kernel is as fast; of 16 bits, scores would be rounded: 1 % of the output at times.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if not 0 < query.shape[2] * key.shape[2] <= _MOST_SCORES or not query.shape[0]:
        return False
    return torch.is_grad_enabled() and any(x.requires_grad for x in (query, key, value))


def attention_by_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> torch.Tensor:
    """As F.scaled_dot_product_attention(..., enable_gqa=True). The heads of a group are rows of one product."""
    batch, heads, rows, size = query.shape
    groups, columns = key.shape[1:3]
    stacked = (batch, groups, heads // groups * rows, -1)
    scaled = query * (size**-0.5 if scale is None else scale)
    scores = (scaled.reshape(stacked) @ key.transpose(-1, -2)).view(batch, heads, rows, columns)
    if is_causal:
        scores = scores.masked_fill_(torch.ones(rows, columns, dtype=torch.bool).triu_(1), -torch.inf)
    elif mask is not None:
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    p = torch.softmax(scores, -1).view(batch, groups, -1, columns)
    return (p @ value).view(batch, heads, rows, value.shape[-1])
