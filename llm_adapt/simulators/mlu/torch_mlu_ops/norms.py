"""Norms of torch_mlu_ops. Legend: x [T, H], gamma and beta [H]."""

from __future__ import annotations

import torch

from .arguments import check_tensors, refuse_given

__all__ = ["fused_layer_norm", "fused_rms_norm"]

Result = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


def _norm(
    entry: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    eps: float,
    returns_sum: bool,
) -> Result:
    check_tensors(entry, 2, x, residual, gamma, beta)
    h = x.float() if residual is None else x.float() + residual.float()
    centered = h if entry == "fused_rms_norm" else h - h.mean(-1, keepdim=True)
    y = centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if gamma is None else y * gamma.float()
    y = (y if beta is None else y + beta.float()).to(x.dtype)
    return (y, h.to(x.dtype)) if returns_sum else y


@torch.no_grad()
def fused_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dynamic_quant: bool = False,
    store_output_after_norm: bool = False,
    quant_type: torch.dtype = torch.int8,
    scale_type: torch.dtype = torch.float32,
    mx_quant: bool = False,
) -> Result:
    """h = x + residual; h / sqrt(mean(h^2) + eps) gamma + beta; with store_output_before_norm (that, h)."""
    refuse_given(
        "fused_rms_norm",
        bias=(bias, None),
        quant_scale=(quant_scale, None),
        out=(out, None),
        dynamic_quant=(dynamic_quant, False),
        store_output_after_norm=(store_output_after_norm, False),
        mx_quant=(mx_quant, False),
    )
    return _norm("fused_rms_norm", x, residual, gamma, beta, eps, store_output_before_norm)


@torch.no_grad()
def fused_layer_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    gamma: torch.Tensor | None,
    beta: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    store_output_before_norm: bool,
    quant_scale: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    dynamic_quant: bool = False,
    store_output_after_norm: bool = False,
    quant_type: torch.dtype = torch.int8,
    gamma_add_coef: float = 0.0,
    scale_type: torch.dtype = torch.float32,
    mx_quant: bool = False,
) -> Result:
    """LayerNorm of h = x + residual, times gamma plus beta; with store_output_before_norm (that, h)."""
    refuse_given(
        "fused_layer_norm",
        bias=(bias, None),
        quant_scale=(quant_scale, None),
        out=(out, None),
        dynamic_quant=(dynamic_quant, False),
        store_output_after_norm=(store_output_after_norm, False),
        gamma_add_coef=(gamma_add_coef, 0.0),
        mx_quant=(mx_quant, False),
    )
    return _norm("fused_layer_norm", x, residual, gamma, beta, eps, store_output_before_norm)
