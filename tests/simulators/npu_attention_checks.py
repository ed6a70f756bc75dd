"""Attention in float64 from its definition, and tensors in the layouts of torch_npu.

N query heads, S queries, K keys, D head size; B batch, T packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

__all__ = ["attend", "causal_mask", "dense", "from_heads", "npu", "numbers", "packed", "seen", "to_heads"]

_ORDER = {"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (2, 0, 1, 3)}


def npu() -> Any:
    """torch_npu, which only a process that simulates an NPU has."""
    import torch_npu

    return torch_npu


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    """Normal random numbers, the same for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def causal_mask() -> torch.Tensor:
    """The mask of the compressed sparse modes."""
    return torch.ones(2048, 2048, dtype=torch.bool).triu(1)


def from_heads(x: torch.Tensor, layout: str) -> torch.Tensor:
    """[B, N, S, D] in another layout."""
    x = x.permute(_ORDER[layout]).contiguous()
    return x.flatten(2) if layout in ("BSH", "SBH") else x


def to_heads(x: torch.Tensor, layout: str, heads: int) -> torch.Tensor:
    """[B, N, S, D] from another layout."""
    x = x.unflatten(2, (heads, -1)) if layout in ("BSH", "SBH") else x
    return x.permute({"BNSD": (0, 1, 2, 3), "BSND": (0, 2, 1, 3), "BSH": (0, 2, 1, 3), "SBH": (1, 2, 0, 3)}[layout])


def seen(rows: int, keys: int, rule: Callable[[int, int], bool]) -> torch.Tensor:
    """[S, K] of rule(query, key)."""
    return torch.tensor([[rule(i, j) for j in range(keys)] for i in range(rows)], dtype=torch.bool).view(rows, keys)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    scale: float,
    keep: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    sink: torch.Tensor | None = None,
    factor: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output [N, S, D], maximum and sum [N, S, 1] of one sequence; rows without keys are zero.

    bias: added to scale * q k^T. factor: of the probabilities, as dropout makes them.
    """
    k, v = (x.repeat_interleave(q.shape[0] // x.shape[0], 0) for x in (k, v))
    scores = scale * torch.einsum("nsd,nkd->nsk", q, k)
    scores = scores if bias is None else scores + bias
    keep = torch.ones_like(scores, dtype=torch.bool) if keep is None else keep.expand_as(scores)
    scores = scores.masked_fill(~keep, -1e30)
    top = scores.amax(-1, keepdim=True).detach()
    if sink is not None:
        top = torch.maximum(top, sink.detach()[:, None, None])
    weights = torch.where(keep, (scores - top).exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sink is not None:
        total = total + (sink[:, None, None] - top).exp()
    weights = weights / total.clamp(min=1e-300)
    return torch.einsum("nsk,nkd->nsd", weights if factor is None else weights * factor, v), top, total


def dense(layout: str, heads: int, groups: int, **how: Any) -> Callable[..., torch.Tensor]:
    """The formula of a dense call in `layout`; how[name] may be a function of the batch."""

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = (to_heads(x, layout, n) for x, n in ((q, heads), (k, groups), (v, groups)))
        outs = []
        for batch in range(q.shape[0]):
            given = {name: item(batch) if callable(item) else item for name, item in how.items()}
            outs.append(attend(q[batch], k[batch], v[batch], **given)[0])
        return from_heads(torch.stack(outs), layout)

    return formula


def packed(ends_q: list[int], ends_k: list[int], **how: Any) -> Callable[..., torch.Tensor]:
    """The formula of packed sequences [T, N, D]; how[name] may be a function of (sequence, S, K)."""

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        outs = []
        for index, (first, end, first_key, end_key) in enumerate(
            zip([0, *ends_q], ends_q, [0, *ends_k], ends_k, strict=False)
        ):
            rows, keys = end - first, end_key - first_key
            given = {name: item(index, rows, keys) if callable(item) else item for name, item in how.items()}
            one = (
                x[i:j].transpose(0, 1)
                for x, i, j in ((q, first, end), (k, first_key, end_key), (v, first_key, end_key))
            )
            outs.append(attend(*one, **given)[0].transpose(0, 1))
        return torch.cat(outs)

    return formula
