"""Activations of torch_npu. x [..., H], or [..., 2D] = the gate, then the linear part.

npu_gelu computes the form that it is asked for; torch.nn.functional.gelu on an NPU computes tanh whatever it is asked.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch_npu
from torch.nn import functional as F

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["activation", "glu"]

_PLAIN = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def _wide(x: torch.Tensor, weights: torch.Tensor | None) -> torch.Tensor:
    """x in the dtype of weights where that is wider: their gradient is a sum of products with the activation."""
    return x if weights is None else x.to(torch.promote_types(x.dtype, weights.dtype))


def _activation_refuses(call: Call) -> str | None:
    return None if call.function in _PLAIN else f"torch_npu has no kernel of {call.function}"


@npu_kernel("activation", "npu_gelu", "npu_fast_gelu", refuses=_activation_refuses)
def activation(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    function: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "gelu",
) -> torch.Tensor:
    """npu_gelu, npu_fast_gelu (which is x sigmoid(1.702 x)) or aten's silu; bias and weights around it."""
    y = _wide(x, weights)
    y = y if bias is None else y + bias
    if function == "silu":
        y = F.silu(y)
    elif function == "quick_gelu":
        y = torch_npu.npu_fast_gelu(y)
    else:
        y = torch_npu.npu_gelu(y, approximate="none" if function == "gelu" else "tanh")
    return (y if weights is None else y * weights).to(x.dtype)


def _glu_refuses(call: Call) -> str | None:
    if call.activation not in ("silu", "gelu", "gelu_tanh"):
        return f"torch_npu has no kernel of a unit gated by {call.activation}"
    if call.layout == "interleaved":
        return "its kernel of interleaved parts has no backward"
    if call.layout == "halves_swapped" and call.activation == "silu":
        return "npu_swiglu takes the gate first"
    return None


@npu_kernel("glu", "npu_swiglu", "npu_geglu", refuses=_glu_refuses)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
) -> torch.Tensor:
    """npu_swiglu or npu_geglu of the packed parts; they are packed first where they are given apart."""
    packed = _wide(x if up is None else torch.cat([x, up], -1), weights)
    packed = (packed if bias is None else packed + bias).contiguous()
    y: torch.Tensor
    if activation == "silu":
        y = torch_npu.npu_swiglu(packed, dim=-1)
    else:
        y, _ = torch_npu.npu_geglu(
            packed, dim=-1, approximate=int(activation == "gelu_tanh"), activate_left=layout == "halves"
        )
    return (y if weights is None else y * weights).to(x.dtype)
