"""Rounding to int8 on the CPU, in blocks of rows that stay in the cache of a core. Source: torch 2.13."""

from __future__ import annotations

import torch

from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.quantize_int8 import LARGEST, check_scale, rounded_rows

__all__ = ["quantize_int8", "quantized_rows"]

_BLOCK = 2**19  # elements of a block: smaller ones cost more calls than the cache saves
_FEW = 2**17  # elements that stay in the cache anyway
_LEAST = 2.0**-126  # the smallest float32 of full precision


def _not_blocked(call: Call) -> str | None:
    if call.device != "cpu":
        return "a loop over blocks of rows, for the CPU"
    return "computes in float32, float64 inputs as well" if call.x.dtype == torch.float64 else None


@kernel("quantize_int8", "torch, block by block", refuses=_not_blocked)
def quantize_int8(x: torch.Tensor, smooth_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """No tensor of the size of x but the result."""
    with torch.no_grad():
        return quantized_rows(x, smooth_scale)


def quantized_rows(x: torch.Tensor, smooth_scale: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """As `rounded_rows` of the op, bit for bit."""
    check_scale(x, smooth_scale)
    if x.numel() <= _FEW:
        wide = x.float() if smooth_scale is None else x.float() * smooth_scale.float()
        scale = wide.abs().amax(-1).div_(LARGEST)
        if not scale.numel() or not float(scale.min()) > _LEAST:
            return rounded_rows(x, smooth_scale)
        return (wide / scale.unsqueeze(-1)).round_().to(torch.int8), scale
    rows = x.reshape(-1, x.shape[-1])
    q, scale = torch.empty_like(rows, dtype=torch.int8), rows.new_empty(rows.shape[0], dtype=torch.float32)
    size = max(1, _BLOCK // rows.shape[1])
    work = rows.new_empty(min(size, rows.shape[0]), rows.shape[1], dtype=torch.float32)
    for start in range(0, rows.shape[0], size):
        given, out = rows[start : start + size], scale[start : start + size]
        block = work[: given.shape[0]]
        if smooth_scale is not None:
            given = block.copy_(given).mul_(smooth_scale.float())
        elif given.dtype != torch.float32:
            given = block.copy_(given)
        torch.maximum(given.amax(-1), given.amin(-1).neg_(), out=out).div_(LARGEST)
        if float(out.min()) > _LEAST:
            torch.div(given, out.unsqueeze(-1), out=block).round_()
        else:  # a quotient by 0 is nan, and by a subnormal number it may be beyond 127
            torch.div(given, torch.where(out > 0, out, 1).unsqueeze(-1), out=block)
            block.round_().clamp_(-LARGEST, LARGEST)
        q[start : start + size] = block
    return q.view(x.shape), scale.view(x.shape[:-1])
