"""Megatron's norms by the operators. (norms.py is read by every patch(), this file where Megatron is used.)

x [..., H] = hidden states, weight and bias [H]. Parameters, their names and their marks are those of plain_norms.py.
"""

from __future__ import annotations

from typing import Literal

import torch

from llm_adapt.frameworks.megatron import plain_norms
from llm_adapt.ops.layer_norm import layer_norm
from llm_adapt.ops.rms_norm import rms_norm

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(plain_norms.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with weight + 1 where it is zero-centered.

    Shapes: x [..., H] -> y [..., H].
    Dtypes: computed in float32. y has the dtype of x, or of the weight where x is wider, as a float32 residual stream
        is: what follows is a projection with weights of that dtype.
    Source: as plain_norms.LayerNorm; fused_layer_norm.py of Megatron-Core 0.16.1 (weight + 1 in that of the weight).
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        form: Literal["standard", "one_plus_rounded"] = "one_plus_rounded" if self.zero_centered else "standard"
        return layer_norm(x, self.weight, self.bias, self.eps, form, _result_dtype(x, self.weight))


class RMSNorm(plain_norms.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight, with weight + 1 where it is zero-centered.

    Shapes: x [..., H] -> y [..., H].
    Dtypes: as of LayerNorm above.
    Source: as plain_norms.RMSNorm.
    """

    eps: float

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        form: Literal["standard", "one_plus_rounded"] = "one_plus_rounded" if self.zero_centered else "standard"
        return rms_norm(x, self.weight, self.eps, form, _result_dtype(x, self.weight))


def _result_dtype(x: torch.Tensor, weight: torch.Tensor) -> Literal["x", "weight"]:
    return "weight" if x.dtype.itemsize > weight.dtype.itemsize else "x"
