"""Kernels for Cambricon MLU: torch_mlu's fused scaled_dot_product_attention, and torch_mlu_ops for inference.

Written from sdp_utils.h of Cambricon/torch_mlu at d578002 (attention: outside these limits it silently takes the
math path, which keeps all scores), and from the signatures of torch_mlu_ops (manual 1.3.2, and the calls of
vllm_mlu 0.8.3 to version 1.5.0). torch_mlu_ops has no backward and its signatures move between versions, so it is
called by keyword, in torch.inference_mode() alone. Not run on an MLU: tests/contracts calls it against a fake.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

import torch
import torch_mlu  # noqa: F401 - without it there is no device "mlu"
from torch.nn import functional as F

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["add_rms_norm", "attention", "glu", "layer_norm", "rms_norm"]

_HAS_TMO = importlib.util.find_spec("torch_mlu_ops") is not None
_HALVES = (torch.float16, torch.bfloat16)
_TMO = "torch_mlu_ops 1.5.0, called by vllm_mlu 0.8.3 (_mlu_ops.py): "


def _tmo() -> Any:
    """torch_mlu_ops; imported at the first call, since it needs the vendor's libraries."""
    import torch_mlu_ops

    return torch_mlu_ops


def _attention_refuses(call: Call) -> str | None:
    batch, heads, rows, size = _sizes(call, call.q.shape)
    columns = _sizes(call, call.k.shape)[2]
    if call.layout == "thd":
        return "takes no packed sequences"
    if call.q.dtype not in _HALVES or call.v.shape[-1] != size or not 64 <= size <= 256 or size % 8:
        return "takes float16 and bfloat16, with one head size of 64 to 256 in steps of 8"
    if rows == 0 or columns == 0 or batch * heads * -(-columns // 256) <= 12:
        return "takes the fused path from 13 blocks of 256 keys on"
    if rows * columns < 0.6 * (-(-rows // 512) * 512) * (-(-columns // 256) * 256):
        return "takes the fused path for lengths that fill 0.6 of their blocks of 512 and 256"
    if call.causal == "bottom_right" and rows != columns:
        return "aligns causal attention at the top left"
    return None


def _sizes(call: Call, shape: torch.Size) -> tuple[int, ...]:
    order = {"bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3), "bhsd": (0, 1, 2, 3)}.get(call.layout)
    return (1, shape[1], shape[0], shape[2]) if order is None else tuple(shape[axis] for axis in order)


@kernel("attention", "torch_mlu d578002, sdp_utils.h", refuses=_attention_refuses)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    scale: float | None = None,
    seed: int | None = None,  # of the dropout, which is not taken
) -> torch.Tensor:
    """scaled_dot_product_attention with the heads of a group written out: the fused path takes equal numbers."""
    axes = {"bshd": (0, 2, 1, 3), "sbhd": (1, 2, 0, 3), "bhsd": (0, 1, 2, 3)}[layout]
    back = {"bshd": (0, 2, 1, 3), "sbhd": (2, 0, 1, 3), "bhsd": (0, 1, 2, 3)}[layout]
    q, k, v = (x.permute(axes) for x in (q, k, v))
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal != "none", scale=scale)
    return out.permute(back).contiguous()


def _norm_refuses(call: Call) -> str | None:
    if not _HAS_TMO:
        return "torch_mlu_ops is not installed"
    if call.weight is None or any(tensor.dtype != call.x.dtype for tensor in call.tensors.values()):
        return "takes a weight, and tensors of one dtype"
    if call.x.dtype not in (torch.float32, *_HALVES) or 0 in call.x.shape:
        return "takes float32, float16 and bfloat16, and no empty tensors"
    return None


def _fused_norm(function: str, x: torch.Tensor, residual: torch.Tensor | None, **named: Any) -> Any:
    """One of the two norms of torch_mlu_ops, on rows."""
    rows = None if residual is None else residual.reshape(-1, x.shape[-1]).contiguous()
    return getattr(_tmo(), function)(
        x=x.reshape(-1, x.shape[-1]).contiguous(),
        residual=rows,
        bias=None,
        store_output_before_norm=residual is not None,
        quant_scale=None,
        out=None,
        dynamic_quant=False,
        **named,
    )


@kernel("rms_norm", _TMO + "fused_rms_norm", refuses=_norm_refuses, inference_only=True, has_backward=False)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """torch_mlu_ops.fused_rms_norm."""
    y: torch.Tensor = _fused_norm("fused_rms_norm", x, None, gamma=weight, beta=None, eps=eps)
    return y.reshape(x.shape)


@kernel("add_rms_norm", _TMO + "fused_rms_norm", refuses=_norm_refuses, inference_only=True, has_backward=False)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """torch_mlu_ops.fused_rms_norm with a residual, which then returns the sum too."""
    y, h = _fused_norm("fused_rms_norm", x, residual, gamma=weight, beta=None, eps=eps)
    return y.reshape(x.shape), h.reshape(x.shape)


@kernel("layer_norm", _TMO + "fused_layer_norm", refuses=_norm_refuses, inference_only=True, has_backward=False)
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """torch_mlu_ops.fused_layer_norm."""
    y: torch.Tensor = _fused_norm("fused_layer_norm", x, None, gamma=weight, beta=bias, eps=eps)
    return y.reshape(x.shape)


def _glu_refuses(call: Call) -> str | None:
    if not _HAS_TMO:
        return "torch_mlu_ops is not installed"
    if call.activation != "silu" or call.layout != "halves":
        return "takes silu, the gate first; which form its gelu has is not documented"
    if call.x.dtype not in (torch.float32, *_HALVES) or 0 in call.x.shape:
        return "takes float32, float16 and bfloat16, and no empty tensors"
    return None


@kernel("glu", "torch_mlu_ops manual 1.3.2: active", refuses=_glu_refuses, inference_only=True, has_backward=False)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
) -> torch.Tensor:
    """torch_mlu_ops.active, gated: silu(first half) second half."""
    packed = x if up is None else torch.cat([x, up], -1)
    rows = packed.reshape(-1, packed.shape[-1]).contiguous()
    y: torch.Tensor = _tmo().active(input=rows, act_mode="silu", is_gated=True)
    return y.reshape(*packed.shape[:-1], packed.shape[-1] // 2)
