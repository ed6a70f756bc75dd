"""What the public calls of lightop show of its RMSNorm, in float64."""

from __future__ import annotations

from typing import Any

import torch

from tests.contracts.recording import demand

__all__ = ["rmsnorm_backward", "rmsnorm_forward"]


def rmsnorm_forward(inp: torch.Tensor, weight: torch.Tensor, ln_out: torch.Tensor, eps: float, training: bool) -> Any:
    """(y, rsigma); y is written into ln_out."""
    demand(inp.dtype == weight.dtype and weight.shape == inp.shape[-1:], "weight has the dtype and last axis of inp")
    demand(inp.is_contiguous() and ln_out.is_contiguous() and ln_out.shape == inp.shape, "ln_out: contiguous, as inp")
    rsigma = (inp.double().square().mean(-1) + eps).rsqrt()
    ln_out.copy_(inp.double() * rsigma[..., None] * weight.double())
    return ln_out, rsigma.float().flatten()


def rmsnorm_backward(grad_output: torch.Tensor, inp: torch.Tensor, rsigma: torch.Tensor, weight: torch.Tensor) -> Any:
    """(dx, dweight) from the rsigma that is given."""
    demand(grad_output.is_contiguous(), "grad_output is contiguous")
    r = rsigma.double().reshape(*inp.shape[:-1], 1)
    x_hat, g = inp.double() * r, grad_output.double() * weight.double()
    dx = r * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return dx.to(inp.dtype), (grad_output.double() * x_hat).flatten(0, -2).sum(0).to(weight.dtype)
