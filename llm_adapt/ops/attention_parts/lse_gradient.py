"""The gradient of a log-sum-exp that a fused kernel returns without one.

The gradient of the log-sum-exp with respect to the scores is the softmax P. With g that of the log-sum-exp,
dq = scale g P k, which is attention with the keys as values; and dk = scale P^T (g q), which is the gradient that the
same attention gives to its values. So a kernel that has backward has this one too, for one call more.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.ops.autograd import Function

__all__ = ["with_gradient"]


def with_gradient(
    lse: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    scale: float,
    attend: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
    beside: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """The log-sum-exp, through which gradients flow to q and k.

    Args:
        attend: (q, k, values) -> output of the kernel, in the layout of q; differentiable in the values.
        beside: brings the gradient of lse to the axes of q, with a last axis of one.
    """
    found: torch.Tensor = _WithGradient.apply(lse.detach(), q, k, scale, attend, beside)  # type: ignore[no-untyped-call]
    return found


class _WithGradient(Function):
    """Hands lse on; backward as above."""

    @staticmethod
    def forward(
        ctx: Any, lse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, scale: float, attend: Any, beside: Any
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k)
        ctx.scale, ctx.attend, ctx.beside = scale, attend, beside
        return lse.view_as(lse)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[Any, ...]:  # type: ignore[override]
        q, k = ctx.saved_tensors
        g = ctx.beside(g) * ctx.scale
        with torch.enable_grad():
            values = k.detach().requires_grad_()
            attended = ctx.attend(q.detach(), k.detach(), values)
        (dk,) = torch.autograd.grad(attended, values, (g * q).to(attended.dtype))
        return None, (g * attended.detach()).to(q.dtype), dk, None, None, None
