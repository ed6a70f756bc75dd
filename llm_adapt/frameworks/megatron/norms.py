"""Megatron's norms without apex and TransformerEngine.

x [..., H] = hidden states, weight and bias [H].

WrappedTorchNorm refuses sequence parallelism, zero-centered weights and two kernel hints. Here the first two are
supported, and the hints (persist_layer_norm, memory_efficient_layer_norm) are accepted: they choose a CUDA
kernel, not numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

__all__ = ["LayerNorm", "RMSNorm", "wrapped"]


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


_NORMS: dict[str, type[LayerNorm] | type[RMSNorm]] = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def wrapped(original: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`WrappedTorchNorm.__new__` that honours what the config asks for; other norms go to the original."""

    @functools.wraps(original)
    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm_class = _NORMS.get(config.normalization)
        if norm_class is None:
            return original(cls, config, hidden_size, eps, *args, **kwargs)
        norm = norm_class(hidden_size, eps=eps)
        if config.layernorm_zero_centered_gamma:
            norm.zero_centered = True
            torch.nn.init.zeros_(norm.weight)
        for parameter in norm.parameters():
            # Megatron sums the gradients of parameters that carry this mark over the tensor-parallel ranks.
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return norm

    return new
