"""What the manual of torch_mlu_ops documents of norms and activations, in float64. All of it is for inference."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from tests.contracts.recording import demand

__all__ = ["active", "fused_layer_norm", "fused_rms_norm"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _norm(a: dict[str, Any], is_rms: bool) -> Any:
    x, residual, gamma = a["x"], a["residual"], a["gamma"]
    given = {name for name in ("bias", "quant_scale", "out") if a[name] is not None}
    demand(not given and not a["dynamic_quant"] and not a["store_output_after_norm"], f"{given} are not faked")
    demand(x.ndim == 2 and x.is_contiguous() and x.dtype in FLOATS, "x is [rows, hidden]")
    tensors = [t for t in (residual, gamma, a["beta"]) if t is not None]
    demand(all(t.dtype == x.dtype for t in tensors), "all tensors have one dtype")
    h = x.double() if residual is None else x.double() + residual.double()
    centered = h if is_rms else h - h.mean(-1, keepdim=True)
    y = centered * (centered.square().mean(-1, keepdim=True) + a["eps"]).rsqrt()
    y = y if gamma is None else y * gamma.double()
    y = (y if a["beta"] is None else y + a["beta"].double()).to(x.dtype)
    return (y, h.to(x.dtype)) if a["store_output_before_norm"] else y


def fused_rms_norm(**a: Any) -> Any:
    """RMSNorm of x, or of x + residual; with store_output_before_norm the sum too."""
    return _norm(a, is_rms=True)


def fused_layer_norm(**a: Any) -> Any:
    """LayerNorm, likewise; beta is what is added after it."""
    demand(a["gamma_add_coef"] == 0.0, "gamma_add_coef is not faked")
    return _norm(a, is_rms=False)


def active(input: torch.Tensor, act_mode: str, is_gated: bool, active_coef: float) -> torch.Tensor:
    """silu(first half) second half."""
    demand(act_mode == "silu" and is_gated and active_coef == 1.0, "only gated silu is faked")
    demand(input.ndim == 2 and input.is_contiguous() and input.dtype in FLOATS, "input is [rows, 2D]")
    gate, linear = input.double().chunk(2, -1)
    return (F.silu(gate) * linear).to(input.dtype)
