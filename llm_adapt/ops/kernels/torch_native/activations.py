"""Activations of torch. Source: torch 2.13 documentation of each function named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.glu import split
from llm_adapt.ops.kernels.torch_native.norms import mixed_dtypes

__all__ = ["activation", "glu"]


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def _other_activations(call: Call) -> str | None:
    name = call.options.get("activation") or call.options["function"]
    if name not in _ACTIVATIONS:
        return f"torch has no {name}"
    if name == "gelu" and call.device == "npu":
        return "F.gelu computes the tanh form there, whatever is asked (aclnnGelu, torch_npu 2.13)"
    return mixed_dtypes(call)


@kernel("activation", "torch.nn.functional", refuses=_other_activations, compilable=True, functorch=True)
def activation(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    function: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "gelu",
) -> torch.Tensor:
    """F.gelu, F.silu and the like: one kernel that computes in float32 and reads and writes 16 bits."""
    return _ACTIVATIONS[function](x if bias is None else x + bias)


@kernel("glu", "torch.nn.functional", refuses=_other_activations, compilable=True, functorch=True)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
) -> torch.Tensor:
    """F.silu and the like of the gate, then the product, each one kernel on tensors of the dtype of x."""
    gate, linear = (x, up) if up is not None else split(x if bias is None else x + bias, layout)
    if up is not None and bias is not None:
        gate_bias, linear_bias = split(bias, layout)
        gate, linear = gate + gate_bias, linear + linear_bias
    return _ACTIVATIONS[activation](gate) * linear
