"""Attention by all its scores: of short sequences on the CPU, where matrix products outrun torch's fused kernel.

Letters as in llm_adapt/ops/attention.py.
"""

from __future__ import annotations

import torch

__all__ = ["attention_by_scores", "is_for_scores"]

_MOST_SCORES = 2**18  # of one head: 512 queries of 512 keys. Their memory is what the fused kernel is there to save.


def is_for_scores(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a call on [B, H, S, D] takes less time so, and is as accurate.

    Without gradients torch's kernel is as fast, where it serves; it does not where values have a size of their own. Of
    16 bits, scores would be rounded: 1 % of the output at times.
    """
    if query.device.type != "cpu" or query.dtype != torch.float32 or torch.compiler.is_compiling():
        return False
    if not 0 < query.shape[2] * key.shape[2] <= _MOST_SCORES or not query.shape[0]:
        return False
    if query.shape[-1] != value.shape[-1]:
        return True
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
    each = heads // groups
    factor = size**-0.5 if scale is None else scale
    stacked, keys, values = query.reshape(-1, each * rows, size), key.flatten(0, 1), value.flatten(0, 1)
    if is_causal or mask is None:
        hidden = query.new_zeros(())
        if is_causal:
            hidden = query.new_full((rows, columns), -torch.inf).triu_(1).repeat(each, 1)
        scores = torch.baddbmm(hidden, stacked, keys.transpose(1, 2), alpha=factor)
    else:
        scores = torch.bmm(stacked, keys.transpose(1, 2)).view(batch, heads, rows, columns) * factor
        scores = scores.masked_fill_(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        scores = scores.reshape(-1, each * rows, columns)
    return torch.bmm(torch.softmax(scores, -1), values).view(batch, heads, rows, -1)
