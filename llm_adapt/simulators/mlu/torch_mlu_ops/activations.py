"""Activations of torch_mlu_ops. Legend: input [T, C]."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from .arguments import check_tensors, refuse_given

__all__ = ["active"]


@torch.no_grad()
def active(input: torch.Tensor, act_mode: str, is_gated: bool, active_coef: float = 1.0) -> torch.Tensor:
    """act(input), or act(first half) second half when gated. gelu's form and swish's coefficient are not public."""
    refuse_given("active", active_coef=(active_coef, 1.0))
    check_tensors("active", 2, input)
    if act_mode not in ("silu", "quick_gelu"):
        raise NotImplementedError(
            f"torch_mlu_ops.active was asked for {act_mode!r}; the MLU simulator models silu and quick_gelu."
        )
    x = input.float()
    gate, linear = x.chunk(2, -1) if is_gated else (x, None)
    y = F.silu(gate) if act_mode == "silu" else gate * torch.sigmoid(1.702 * gate)
    return (y if linear is None else y * linear).to(input.dtype)
