"""Softmax of attention scores. x [B, N, Q, K] = batch, heads, queries, keys, or [BN, Q, K]; sinks [N]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["scaled_masked_softmax"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def mask(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, generator=generator) < 0.3

    everything = torch.zeros(1, 1, 8, 16, dtype=torch.bool)
    everything[..., 2, :] = True
    yield {"x": draw(2, 3, 8, 16)}
    yield {"x": draw(2, 3, 8, 16), "mask": mask(2, 1, 8, 16), "scale": 0.5}
    yield {"x": draw(2, 3, 8, 16), "mask": everything}
    yield {"x": draw(6, 9, 9), "scale": 0.25, "causal": True}
    yield {"x": draw(2, 3, 5, 9), "causal": True, "sinks": draw(3).float()}
    yield {"x": draw(2, 3, 9, 5), "causal": True, "mask": mask(2, 3, 9, 5)}
    yield {"x": draw(2, 3, 9, 9), "window": (3, 0), "sinks": draw(3)}
    yield {"x": draw(2, 3, 9, 12), "window": (2, -1)}
    yield {"x": draw(0, 3, 4, 4), "causal": True}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """One batch and one head; queries and keys stay, since masks and kernels go by them."""
    x, mask, sinks = (arguments[name] for name in ("x", "mask", "sinks"))
    outer = (slice(1),) * (x.ndim - 2)
    if mask is not None:
        mask = mask[outer[: max(mask.ndim - 2, 0)]]
    return arguments | {"x": x[outer], "mask": mask, "sinks": None if sinks is None else sinks[:1]}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator).to(dtype), "scale": 0.125, "causal": True}


@fused_op(inputs=_inputs, shrink=_shrink, example=_example, sizes={"32 heads": (1, 32, 2048, 2048)})
def scaled_masked_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> torch.Tensor:
    """p = softmax(scale x) over the keys that are not masked out; masked keys, and rows without any other, are 0.

    mask: True = masked out, as in Megatron. causal: query i sees key j where j <= i + K - Q (aligned at the bottom
    right; one query sees all). window = (left, right): also i + K - Q - left <= j <= i + K - Q + right; -1 = no limit.
    sinks: one more logit of each head, in the denominator only, not scaled.
    A row that is masked out whole is 0, as of Megatron's fused kernel; Megatron's unfused path writes -10000 in place
    of the scores, which makes such a row uniform.

    Shapes: x [B, N, Q, K] or [BN, Q, K], mask broadcast to x, sinks [N] (x of four axes) -> p as x.
    Dtypes: computed in float32 (float64 for float64 x) and rounded once; p has the dtype of x.
    Raises: ValueError for other shapes or a window below -1; TypeError for a mask that is not boolean.
    Source: FusedScaleMaskSoftmax of Megatron-Core 0.16.1; scaled_masked_softmax.h of Megatron-LM (rows masked out
    whole); gpt-oss, Miller 2023 (sinks).
    """
    _check(x, mask, sinks, window)
    scores = x.to(torch.promote_types(x.dtype, torch.float32)) * scale
    hidden = hidden_scores(x, mask, causal, window)
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    if sinks is not None:
        column = sinks.to(scores.dtype)[None, :, None, None].expand(*x.shape[:-1], 1)
        return torch.softmax(torch.cat((scores, column), -1), -1)[..., :-1].to(x.dtype)
    if hidden is None:
        return torch.softmax(scores, -1).to(x.dtype)
    is_empty = hidden.all(-1, keepdim=True)
    # Finite before the softmax, 0 after it: where() alone would leave the NaN in the gradient.
    p = torch.softmax(scores.masked_fill(is_empty, 0.0), -1)
    return p.masked_fill(is_empty, 0.0).to(x.dtype)


def hidden_scores(
    x: torch.Tensor, mask: torch.Tensor | None, causal: bool, window: tuple[int, int] | None
) -> torch.Tensor | None:
    """All that is masked out, None for nothing."""
    left, right = window or (-1, -1)
    if causal:
        right = 0 if right < 0 else min(right, 0)
    if left < 0 and right < 0:
        return mask
    queries, keys = x.shape[-2:]
    # How far a key is behind the query's own place.
    distance = torch.arange(keys, device=x.device) - torch.arange(queries, device=x.device)[:, None] - (keys - queries)
    hidden = torch.zeros_like(distance, dtype=torch.bool) if mask is None else mask
    if right >= 0:
        hidden = hidden | (distance > right)
    if left >= 0:
        hidden = hidden | (distance < -left)
    return hidden


def _check(
    x: torch.Tensor, mask: torch.Tensor | None, sinks: torch.Tensor | None, window: tuple[int, int] | None
) -> None:
    name = "scaled_masked_softmax"
    if x.ndim not in (3, 4):
        raise ValueError(f"{name}: x has {x.ndim} axes; 4 were expected (batch, heads, queries, keys), or 3.")
    if mask is not None:
        if mask.dtype != torch.bool:
            raise TypeError(f"{name}: mask is {mask.dtype}; give torch.bool, True where a key is masked out.")
        sizes = tuple(x.shape)[-mask.ndim :]
        if not 0 < mask.ndim <= x.ndim or any(a not in (1, b) for a, b in zip(mask.shape, sizes, strict=True)):
            raise ValueError(f"{name}: mask has shape {tuple(mask.shape)}; it must broadcast to {tuple(x.shape)}.")
    if sinks is not None and (x.ndim != 4 or tuple(sinks.shape) != (x.shape[1],)):
        raise ValueError(f"{name}: sinks {tuple(sinks.shape)} and x {tuple(x.shape)} were given; one a head is needed.")
    if window is not None and min(window) < -1:
        raise ValueError(f"{name}: window={window} was given; use -1 for a side without limit.")
