"""Megatron's norms without apex and TransformerEngine.

x [..., H] = hidden states, weight and bias [H].

WrappedTorchNorm refuses sequence parallelism, zero-centered weights and two kernel hints. Here the first two are
supported, and the hints (persist_layer_norm, memory_efficient_layer_norm) are accepted: they choose a CUDA
kernel, not numbers.

Where apex is installed, Megatron takes apex's LayerNorm, and where its spec is TransformerEngine's, that one's norms:
neither is touched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.plain_norms import LayerNorm, RMSNorm
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row

__all__ = ["rows", "served_l2_norm", "wrapped", "wrapped_served"]

_NORM = "megatron.core.transformer.torch_norm"
_NEW = {"0.12 to 0.16": "ba0629be43e2", "0.17 to 0.19": "f4b37eb6d00a"}
_L2 = {"0.12 to 0.16": "6f999abe1049", "0.17 to 0.19": "6e2dc64e367c"}


def rows(context: Context) -> list[Row]:
    """Norms that the operators serve; with ops="off", only what the config may ask for without apex."""
    if not context.serves_operators:
        if not context.adapter.needs_facade:
            return []
        reason = "norms without apex and TransformerEngine"
        return [seam(f"{_NORM}:WrappedTorchNorm.__new__", wrapped, reason, bodies=_NEW)]
    reason = "norms without apex and TransformerEngine, served by the operators layer_norm and rms_norm"
    l2 = "served by the operator rms_norm, without a weight"
    return [
        seam(f"{_NORM}:WrappedTorchNorm.__new__", wrapped_served, reason, bodies=_NEW),
        seam(f"{_NORM}:L2Norm.forward", served_l2_norm, l2, bodies=_L2),
    ]


Norms = Mapping[str, type[LayerNorm] | type[RMSNorm]]
_NORMS: Norms = {"LayerNorm": LayerNorm, "RMSNorm": RMSNorm}


def wrapped(original: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """`WrappedTorchNorm.__new__` that honours what the config asks for; other norms go to the original."""
    return _wrapped(original, _NORMS)


def wrapped_served(original: Callable[..., torch.nn.Module]) -> Callable[..., torch.nn.Module]:
    """The same with norms that the operators serve."""
    from llm_adapt.frameworks.megatron import served_norms

    return _wrapped(original, {"LayerNorm": served_norms.LayerNorm, "RMSNorm": served_norms.RMSNorm})


def _wrapped(original: Callable[..., torch.nn.Module], norms: Norms) -> Callable[..., torch.nn.Module]:
    @functools.wraps(original)
    def new(cls: type, config: Any, hidden_size: int, eps: float = 1e-5, *args: Any, **kwargs: Any) -> torch.nn.Module:
        norm_class = norms.get(config.normalization)
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


def served_l2_norm(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`L2Norm.forward`: x / sqrt(mean(x^2) + eps), in float32 and rounded to the dtype of x."""
    from llm_adapt.ops.rms_norm import rms_norm

    @functools.wraps(original)
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, None, self.eps)

    return forward
