"""RMSNorm of lightop, Hygon's library for DCU. x [..., H], weight [H].

Written from the calls of rmsnorm_forward and rmsnorm_backward in Hygon's Megatron adaptor (FlagScale at da4935e,
hardware/Hygon_BW1000/Megatron-LM/diff.patch, dcu_megatron/legacy/model/rms_norm.py), which has no list of dtypes: one
dtype for x and weight is asked here, as there. Not run on a DCU: tests/contracts calls it against a fake.
"""

from __future__ import annotations

from typing import Any, Literal

import lightop
import torch

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["rms_norm"]


def _refuses(call: Call) -> str | None:
    if call.weight is None or call.weight.dtype != call.x.dtype:
        return "takes a weight of the dtype of x"
    if call.x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "takes float32, float16 and bfloat16"
    if 0 in call.x.shape:
        return "takes no empty tensors"
    if call.form == "one_plus" and call.x.dtype != torch.float32:
        return "would round 1 + weight"
    return None


class _RMSNorm(Function):
    """Forward and backward are two functions of lightop, which know nothing of autograd."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
        y, rsigma = lightop.rmsnorm_forward(x, weight, torch.empty_like(x), eps, training=True)
        ctx.save_for_backward(x, weight, rsigma)
        found: torch.Tensor = y
        return found

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:  # type: ignore[override]
        x, weight, rsigma = ctx.saved_tensors
        dx, dweight = lightop.rmsnorm_backward(dy.contiguous(), x, rsigma, weight)
        return dx, dweight.to(weight.dtype), None


@kernel("rms_norm", "lightop.rmsnorm_forward and rmsnorm_backward (FlagScale da4935e)", refuses=_refuses)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Literal["standard", "cast_first", "one_plus", "one_plus_rounded"] = "standard",
) -> torch.Tensor:
    """lightop.rmsnorm_forward in a Function of ours."""
    if weight is None:
        raise TypeError("lightop.rms_norm was called without a weight, which it refuses.")
    gamma = weight + 1 if form.startswith("one_plus") else weight
    y: torch.Tensor = _RMSNorm.apply(x.contiguous(), gamma.contiguous(), eps)  # type: ignore[no-untyped-call]
    return y
