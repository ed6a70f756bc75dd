"""z loss of a router. T = tokens, E = experts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["router_z_loss"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"logits": draw(24, 8)}
    yield {"logits": draw(21, 5), "padding_mask": torch.rand(21, generator=generator) < 0.3, "coeff": 1e-3}
    yield {"logits": draw(3, 5), "padding_mask": torch.ones(3, dtype=torch.bool)}
    yield {"logits": draw(0, 8)}


@fused_op(inputs=_inputs, dynamic=frozenset({"coeff"}))
def router_z_loss(logits: torch.Tensor, padding_mask: torch.Tensor | None = None, coeff: float = 1.0) -> torch.Tensor:
    """loss = coeff * mean over tokens of log(sum_e exp(logits))^2; 0 where there is no token.

    padding_mask: True = padding, left out of the mean.

    Shapes: logits [T, E], padding_mask [T] bool -> loss [].
    Dtypes: computed and returned in float32 (float64 for float64 logits).
    Raises: ValueError for shapes that do not fit.
    Source: Zoph et al. 2022 (ST-MoE), equation 5; Megatron-Core 0.16 core/transformer/moe/moe_utils.py.
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"router_z_loss: logits [T, E] were expected; found {tuple(logits.shape)}.")
    if padding_mask is not None and (padding_mask.shape != logits.shape[:1] or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"router_z_loss: padding_mask must be bool of shape {tuple(logits.shape[:1])}; found "
            f"{padding_mask.dtype} of {tuple(padding_mask.shape)}."
        )
    squares = logits.to(torch.promote_types(logits.dtype, torch.float32)).logsumexp(-1).square()
    if padding_mask is None:
        return squares.sum() * (coeff / max(logits.shape[0], 1))
    squares = squares.masked_fill(padding_mask, 0)
    return squares.sum() / (~padding_mask).sum().clamp(min=1) * coeff
