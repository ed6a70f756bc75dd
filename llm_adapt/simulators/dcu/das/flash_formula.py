"""The formula of flash attention in float32, and what DTK's build refuses. Shapes as in flash_attn_interface.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.das.limits import demand

__all__ = ["LARGEST_HEAD", "Options", "attend", "check", "unwritten_behind"]

LARGEST_HEAD = 512
_MOST_SINKS = 64


@dataclass(frozen=True)
class Options:
    """The arguments that choose a formula."""

    dropout_p: float
    softmax_scale: float | None
    causal: bool
    window_size: tuple[int, int]
    softcap: float
    s_aux: torch.Tensor | None


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None, options: Options) -> None:
    """Refuse what the kernels do not take.

    Raises:
        RuntimeError: as in flash_attn_interface.py.
        SimulatorError: s_aux that wants a gradient.
    """
    demand(all(x.is_cuda for x in (q, k, v)), "Input tensor must be on CUDA device")
    halves = (torch.float16, torch.bfloat16)
    demand(q.dtype == k.dtype == v.dtype and q.dtype in halves, "FlashAttention only support fp16 and bf16 data type")
    demand(q.shape[-1] == k.shape[-1] == v.shape[-1], "q, k and v have one head size")
    demand(q.shape[-1] <= LARGEST_HEAD, f"FlashAttention forward only supports head dimension at most {LARGEST_HEAD}")
    demand(k.shape[-2] == v.shape[-2], "k and v have one number of heads")
    demand(q.shape[-2] % k.shape[-2] == 0, "Number of heads in key/value must divide number of heads in query")
    demand(all(x.stride(-1) == 1 for x in (q, k, v)), "Input tensor must have contiguous last dimension")
    if slopes is not None:
        demand(slopes.dtype == torch.float32, "ALiBi slopes must have dtype fp32")
        demand(slopes.device == q.device and slopes.shape[-1] == q.shape[-2], "ALiBi slopes: one for each head of q")
    if options.s_aux is not None:
        demand(options.s_aux.dtype == q.dtype, "s_aux has the dtype of q")
        demand(tuple(options.s_aux.shape) == (q.shape[-2],) and q.shape[-2] <= _MOST_SINKS, "s_aux: up to 64 heads")
        if options.s_aux.requires_grad:
            raise SimulatorError("flash_attn was given s_aux that wants a gradient; whether it gets one is not public.")


def attend(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, slopes: torch.Tensor | None, options: Options
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of dense sequences: out [B, S, H, D] in the dtype of q and log-sum-exp [B, H, S] in float32."""
    wide_q, wide_k, wide_v = (x.float().transpose(1, 2) for x in (q, k, v))
    groups = wide_q.shape[1] // wide_k.shape[1]
    wide_k, wide_v = wide_k.repeat_interleave(groups, 1), wide_v.repeat_interleave(groups, 1)
    scale = q.shape[-1] ** -0.5 if options.softmax_scale is None else options.softmax_scale
    scores = scale * wide_q @ wide_k.transpose(-1, -2)
    if options.softcap > 0:
        scores = options.softcap * torch.tanh(scores / options.softcap)
    place, key = _places(scores)
    if slopes is not None:
        scores = scores - slopes[:, :, None, None] * (place - key).abs()
    seen = _seen(place, key, options)
    scores = scores.masked_fill(~seen, -math.inf)
    if options.s_aux is not None:
        sinks = options.s_aux.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], -1)
    is_empty = torch.isneginf(scores).all(-1, keepdim=True)
    scores = scores.masked_fill(is_empty, 0.0)
    weights = scores.softmax(-1)[..., : wide_v.shape[2]].masked_fill(is_empty, 0.0)
    out = F.dropout(weights, options.dropout_p) @ wide_v
    lse = torch.logsumexp(scores, -1).masked_fill(is_empty[..., 0], math.inf)
    return out.transpose(1, 2).to(q.dtype), lse.detach()


def _places(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of queries [S, 1] and keys [1, K], aligned at the bottom right."""
    queries, keys = scores.shape[-2:]
    place = torch.arange(queries, device=scores.device)[:, None] + keys - queries
    return place, torch.arange(keys, device=scores.device)[None]


def _seen(place: torch.Tensor, key: torch.Tensor, options: Options) -> torch.Tensor:
    left, right = options.window_size
    seen = torch.ones_like(place - key, dtype=torch.bool)
    if options.causal or right >= 0:
        seen = seen & (key <= place + (0 if options.causal else right))
    if left >= 0:
        seen = seen & (key >= place - left)
    return seen


class _Unwritten(torch.autograd.Function):
    """x; its gradient is NaN behind the last sequence, where a kernel writes nothing."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, end: int) -> torch.Tensor:
        ctx.end = end
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:  # type: ignore[override]
        gradient = gradient.clone()
        gradient[ctx.end :] = torch.nan
        return gradient, None


def unwritten_behind(x: torch.Tensor, end: int) -> torch.Tensor:
    """x, whose gradient is not written for rows from `end` on."""
    found: torch.Tensor = _Unwritten.apply(x, end)  # type: ignore[no-untyped-call]
    return found
