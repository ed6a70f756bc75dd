"""Clipping of gradients by their norm. n = gradients of any shapes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.multi_tensor_l2norm import shrink_lists

__all__ = ["clip_grads"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw() -> list[torch.Tensor]:
        return [torch.randn(sizes, generator=generator).to(dtype) for sizes in ((5, 7), (64,), (), (0, 3))]

    yield {"grads": draw()}
    yield {"grads": draw(), "max_norm": 100.0, "eps": 0.0}
    yield {"grads": draw(), "max_norm": 0.5, "norm_type": 1.0}
    yield {"grads": draw(), "max_norm": 0.5, "norm_type": math.inf}
    yield {"grads": draw(), "total_norm": torch.tensor(20.0)}


@fused_op(
    inputs=_inputs,
    differentiable=(),
    mutates=("grads",),
    dynamic=frozenset({"max_norm", "eps"}),
    shrink=shrink_lists,
)
def clip_grads(
    grads: list[torch.Tensor],
    total_norm: torch.Tensor | None = None,
    max_norm: float = 1.0,
    norm_type: float = 2.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """grads *= min(1, max_norm / (norm + eps)) in place; returns norm = (sum |g|^norm_type)^(1 / norm_type).

    norm_type=inf: the largest |g|.
    total_norm: the norm where it is known, as after a sum over ranks; then it is returned, and norm_type is not given.
    The norm stays on its device: whether it is finite is for the caller to ask. nan spreads to all gradients.

    Shapes: grads of any shapes -> norm [].
    Dtypes: norm and product in float32 (float64 where a gradient is), each gradient rounded once to its own dtype.
    Raises: ValueError for norm_type not positive, or given with total_norm.
    Source: torch 2.13 nn/utils/clip_grad.py; Megatron-Core 0.16 core/optimizer/clip_grads.py.
    """
    if not norm_type > 0:
        raise ValueError(f"clip_grads: norm_type={norm_type} was asked; it must be positive.")
    if total_norm is not None and norm_type != 2.0:
        raise ValueError(f"clip_grads: norm_type={norm_type} was asked of a total_norm that is given; leave one out.")
    with torch.no_grad():
        norm = _norm(grads, norm_type) if total_norm is None else total_norm.detach().clone().reshape(())
        share = (max_norm / (norm.to(torch.promote_types(norm.dtype, _wide(grads))) + eps)).clamp(max=1.0)
        for grad in grads:
            wide = torch.promote_types(grad.dtype, torch.float32)
            grad.copy_(grad.to(wide) * share.to(grad.device, wide))
        return norm


def _wide(grads: list[torch.Tensor]) -> torch.dtype:
    return torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32


def _norm(grads: list[torch.Tensor], norm_type: float) -> torch.Tensor:
    """The norm of all elements together, 0 of none."""
    held = [grad for grad in grads if grad.numel()]
    if not held:
        return torch.zeros((), device=grads[0].device) if grads else torch.zeros(())
    norms = [torch.linalg.vector_norm(grad.to(_wide(held)), norm_type).to(held[0].device) for grad in held]
    norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms), norm_type)
    return norm
