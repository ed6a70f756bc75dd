"""Load-balancing loss of a router. T = tokens, E = experts, K = experts per token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["router_aux_loss"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.rand(sizes, generator=generator).to(dtype)

    counts = torch.randint(0, 9, (8,), generator=generator)
    padding = torch.rand(21, generator=generator) < 0.3
    yield {"probs": draw(24, 8), "tokens_per_expert": counts}
    yield {"probs": draw(24, 8), "tokens_per_expert": counts.float(), "topk": 1, "coeff": 0.01, "num_tokens": 96}
    yield {"probs": draw(21, 8), "tokens_per_expert": counts, "padding_mask": padding}
    total = torch.tensor(40)
    yield {"probs": draw(21, 8), "tokens_per_expert": counts, "num_tokens_tensor": total, "num_experts": 4}
    yield {"probs": draw(0, 8), "tokens_per_expert": counts}


@fused_op(inputs=_inputs, differentiable=("probs",), dynamic=frozenset({"coeff", "num_tokens"}))
def router_aux_loss(
    probs: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    padding_mask: torch.Tensor | None = None,
    num_tokens_tensor: torch.Tensor | None = None,
    topk: int = 2,
    coeff: float = 1.0,
    num_tokens: int | None = None,
    num_experts: int | None = None,
) -> torch.Tensor:
    """loss = coeff * num_experts / (K * N^2) * sum_e (tokens_per_expert[e] * sum_t probs[t, e]), 0 for N = 0.

    N = tokens that tokens_per_expert counts: num_tokens, or num_tokens_tensor where only the device knows it, or the
    rows that are not padding. Counts of more tokens than the rows (a global batch) want one of the first two.
    padding_mask: True = padding; such rows add nothing.
    num_experts: E unless given; with the sequences of a batch side by side in the columns it is smaller.

    Shapes: probs [T, E], tokens_per_expert [E], padding_mask [T] bool, num_tokens_tensor [] -> loss [].
    Dtypes: sums and loss in float32 (float64 for float64 probs); the counts are of any dtype and get no gradient.
    Raises: ValueError for shapes that do not fit, or N given twice.
    Source: Fedus et al. 2021 (Switch Transformer), equations 4 to 6; Megatron-Core 0.16
        core/transformer/moe/moe_utils.py.
    """
    if probs.ndim != 2 or tokens_per_expert.shape != probs.shape[1:]:
        raise ValueError(
            f"router_aux_loss: probs [T, E] and tokens_per_expert [E] were expected; found {tuple(probs.shape)} and "
            f"{tuple(tokens_per_expert.shape)}."
        )
    if padding_mask is not None and (padding_mask.shape != probs.shape[:1] or padding_mask.dtype != torch.bool):
        raise ValueError(
            f"router_aux_loss: padding_mask must be bool of shape {tuple(probs.shape[:1])}; found "
            f"{padding_mask.dtype} of {tuple(padding_mask.shape)}."
        )
    if num_tokens is not None and num_tokens_tensor is not None:
        raise ValueError("router_aux_loss: num_tokens and num_tokens_tensor were both given; give one of them.")
    wide = torch.promote_types(probs.dtype, torch.float32)
    rows = probs if padding_mask is None else probs.masked_fill(padding_mask.unsqueeze(1), 0)
    sums = rows.sum(0, dtype=wide)
    loads = tokens_per_expert.to(wide)
    if tokens_per_expert.is_floating_point():  # integers have no gradient, and a detach costs as much as a product
        loads = loads.detach()
    factor = coeff * (num_experts or probs.shape[1]) / topk
    if num_tokens_tensor is None and (num_tokens is not None or padding_mask is None):
        # The host knows N. A product of sums of the order of N each is far from the largest float32.
        count = max(probs.shape[0] if num_tokens is None else num_tokens, 1)
        return torch.dot(sums, loads).mul_(factor / (count * count))
    known = (~padding_mask).sum() if num_tokens_tensor is None else num_tokens_tensor.detach()  # type: ignore[operator]
    number = known.to(wide).clamp(min=1)
    return torch.dot(sums / number, loads / number) * factor
