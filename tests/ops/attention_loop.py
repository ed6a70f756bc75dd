"""Attention written a second time, one query and one head at a time in float64, from the sentences of its docstring."""

from __future__ import annotations

import math
from typing import Any

import torch

__all__ = ["attention_loop"]


def attention_loop(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    causal: str = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one sequence: q [Sq, H, D], k [Sk, G, D], v [Sk, G, Dv], mask [H, Sq, Sk]."""
    rows, heads, size = q.shape
    columns, groups, _ = k.shape
    q, k, v = (x.detach().double() for x in (q, k, v))
    out = torch.zeros(rows, heads, v.shape[-1], dtype=torch.float64)
    lse = torch.full((heads, rows), -math.inf, dtype=torch.float64)
    for h in range(heads):
        g = h // (heads // groups)
        for i in range(rows):
            place = i if causal == "top_left" else i + columns - rows
            scores: dict[int, float] = {}
            for j in range(columns):
                if causal != "none" and j > place:
                    continue
                if window_left >= 0 and j < place - window_left:
                    continue
                if window_right >= 0 and j > place + window_right:
                    continue
                s = float(q[i, h] @ k[j, g]) * (1 / math.sqrt(size) if scale is None else scale)
                if softcap:
                    s = softcap * math.tanh(s / softcap)
                if alibi_slopes is not None:
                    s -= float(alibi_slopes[h]) * abs(place - j)
                if mask is not None:
                    if mask.dtype == torch.bool and not mask[h, i, j]:
                        continue
                    s += 0.0 if mask.dtype == torch.bool else float(mask[h, i, j])
                scores[j] = s
            terms = {j: math.exp(s) for j, s in scores.items()}
            total = sum(terms.values()) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
            if total:
                lse[h, i] = math.log(total)
                out[i, h] = sum((e / total * v[j, g] for j, e in terms.items()), torch.zeros(v.shape[-1]).double())
    return out, lse


def drawn(seed: int, *sizes: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Normal numbers of a seed."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gradients(outputs: Any, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of all outputs, each with an upstream gradient of a fixed seed."""
    values = outputs if isinstance(outputs, tuple) else (outputs,)
    upstream = [drawn(100 + index, *value.shape).to(value.dtype) for index, value in enumerate(values)]
    return torch.autograd.grad(values, inputs, upstream, retain_graph=True)
