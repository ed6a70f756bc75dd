"""lightop of DTK: RMSNorm, forward and backward, which is all of it that is public. x [..., H], weight [H].

Source: FlagScale at da4935e, hardware/Hygon_BW1000/Megatron-LM/diff.patch, dcu_megatron/legacy/model/rms_norm.py. What
dtypes it takes is not shown there; one of 16 or 32 bits for x and weight is taken here, as in its calls. The form of
rsigma is its own: it goes from one function to the other.
"""

from __future__ import annotations

import torch

from llm_adapt.simulators.dcu.das.limits import demand, missing

__all__ = ["rmsnorm_backward", "rmsnorm_forward"]

__getattr__ = missing("lightop")


@torch.no_grad()
def rmsnorm_forward(
    inp: torch.Tensor, weight: torch.Tensor, ln_out: torch.Tensor, eps: float, training: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """x / sqrt(mean(x^2) + eps) * weight, written into ln_out; returns it and rsigma. Knows nothing of autograd.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    _check(inp, weight)
    demand(ln_out.is_contiguous() and ln_out.shape == inp.shape and ln_out.dtype == inp.dtype, "ln_out: as inp")
    rsigma = (inp.float().square().mean(-1) + eps).rsqrt()
    ln_out.copy_(inp.float() * rsigma[..., None] * weight.float())
    return ln_out, rsigma.flatten()


@torch.no_grad()
def rmsnorm_backward(
    grad_output: torch.Tensor, inp: torch.Tensor, rsigma: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of inp and of weight, from the rsigma of the forward.

    Raises:
        RuntimeError: tensors that the kernel does not take.
    """
    _check(inp, weight)
    demand(grad_output.is_contiguous() and grad_output.shape == inp.shape, "grad_output: contiguous, sized as inp")
    scale = rsigma.reshape(*inp.shape[:-1], 1)
    normed, gradient = inp.float() * scale, grad_output.float() * weight.float()
    dx = scale * (gradient - normed * (gradient * normed).mean(-1, keepdim=True))
    dweight = (grad_output.float() * normed).flatten(0, -2).sum(0)
    return dx.to(inp.dtype), dweight.to(weight.dtype)


def _check(inp: torch.Tensor, weight: torch.Tensor) -> None:
    demand(inp.is_cuda and weight.device == inp.device, "lightop takes tensors of one DCU")
    floats = (torch.float32, torch.float16, torch.bfloat16)
    demand(inp.dtype in floats and weight.dtype == inp.dtype, "lightop takes x and weight of one dtype, 16 or 32 bits")
    demand(inp.is_contiguous() and weight.shape == inp.shape[-1:], "lightop takes a contiguous x, a weight of its rows")
