"""softmax(scores) V over some queries and some keys, in the dtype of what is given.

B batch, H query heads, G key and value heads (each serves H / G query heads), Sq and Sk lengths, D and Dv head sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llm_adapt.ops.attention_parts.dropout import kept
from llm_adapt.ops.attention_parts.places import Places

__all__ = ["Weighting", "attend", "part_of_mask"]


@dataclass(frozen=True)
class Weighting:
    """How a product of query and key becomes a weight: everything but the tensors that receive gradients.

    Attributes:
        slopes: of ALiBi, broadcast to [B, H, Sq, 1].
        left, right: sliding window; -1 = unlimited.
    """

    places: Places
    scale: float
    softcap: float = 0.0
    is_causal: bool = False
    left: int = -1
    right: int = -1
    slopes: torch.Tensor | None = None
    dropout_p: float = 0.0
    seed: int = 0


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
    how: Weighting,
    rows: slice,
    columns: slice,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries to some keys: those that stand in `rows` and `columns` of all.

    Shapes: query [B, H, Sq, D], key [B, G, Sk, D], value [B, G, Sk, Dv], mask broadcast to [B, H, Sq, Sk], sinks [H]
        -> out [B, H, Sq, Dv], log-sum-exp [B, H, Sq], where Sq and Sk are the sizes of rows and columns.
    Dtypes: as query throughout.
    """
    scores = _scores(query, key, mask, how, rows, columns)
    # The largest score is taken off: a constant to the gradient. A row without keys has -inf, and keeps 0.
    top = (
        scores.detach().amax(-1, keepdim=True)
        if scores.shape[-1]
        else scores.new_full((*scores.shape[:-1], 1), -torch.inf)
    )
    sink = None if sinks is None else sinks[None, :, None, None]
    if sink is not None:
        top = torch.maximum(top, sink.detach())
    top = top.masked_fill(top == -torch.inf, 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + torch.exp(sink - top)
    if how.dropout_p:
        keep = kept(how.seed, how.dropout_p, scores.shape[0], scores.shape[1], rows, columns, scores.device)
        weights = weights * keep / (1 - how.dropout_p)
    is_empty = total == 0
    total = total.masked_fill(is_empty, 1.0)  # 1 before the division and the logarithm: their gradients stay finite
    lse = (top + torch.log(total)).masked_fill(is_empty, -torch.inf)
    return _by_group(weights, value) / total, lse.squeeze(-1)


def _scores(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, how: Weighting, rows: slice, columns: slice
) -> torch.Tensor:
    """scale * QK^T, capped, with bias and mask [B, H, Sq, Sk]."""
    scores = _by_group(query, key.transpose(-1, -2)) * how.scale
    if how.softcap:
        scores = how.softcap * torch.tanh(scores / how.softcap)
    places = how.places.part(rows, columns)
    if how.slopes is not None:
        slopes = how.slopes if how.slopes.shape[2] == 1 else how.slopes[:, :, rows]
        scores = scores - slopes * places.distance().abs()
    seen = places.visible(how.is_causal, how.left, how.right)
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    elif mask is not None:
        seen = mask if seen is None else seen & mask
    return scores if seen is None else scores.masked_fill(~seen, -torch.inf)


def part_of_mask(mask: torch.Tensor, rows: slice, columns: slice) -> torch.Tensor:
    """A view of the mask [B or 1, H or 1, Sq or 1, Sk or 1] for some queries and keys."""
    mask = mask if mask.shape[2] == 1 else mask[:, :, rows]
    return mask if mask.shape[3] == 1 else mask[..., columns]


def _by_group(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """left [B, H, M, K] @ right [B, G, K, N]: the H / G heads of a group as rows of one product."""
    batch, heads, rows, inner = left.shape
    groups = right.shape[1]
    stacked = left.reshape(batch, groups, heads // groups * rows, inner)
    return torch.matmul(stacked, right).reshape(batch, heads, rows, right.shape[-1])
