"""Megatron's norms by torch's own functions. x [..., H] = hidden states, weight and bias [H]."""

from __future__ import annotations

import torch
from torch.nn import functional as F

__all__ = ["LayerNorm", "RMSNorm"]


class LayerNorm(torch.nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, with weight + 1 where it is zero-centered.

    Shapes: x [..., H] -> y [..., H].
    Dtypes: y has the dtype of x; statistics are taken in float32 for 16-bit x (torch.nn.functional.layer_norm), but on
        the CPU torch 2.13 keeps them for backward in the dtype of x: dx of a row far from zero for its spread is off.
    Source: Ba et al. 2016, equation 4; zero-centered weights as in megatron.core.fusions.fused_layer_norm.
    """

    zero_centered = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        return F.layer_norm(x, self.normalized_shape, weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """y = x / sqrt(mean(x^2) + eps) * weight, with weight + 1 where it is zero-centered.

    Shapes: x [..., H] -> y [..., H].
    Dtypes: y has the dtype of x (torch.nn.functional.rms_norm).
    Source: Zhang and Sennrich 2019, equation 4.
    """

    zero_centered = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise the last axis."""
        weight = self.weight + 1 if self.zero_centered else self.weight
        return F.rms_norm(x, self.normalized_shape, weight, self.eps)
