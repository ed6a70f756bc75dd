"""torch.nn.functional.cross_entropy. Source: its torch 2.13 documentation."""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import kernel

__all__ = ["cross_entropy"]


@kernel("cross_entropy", "torch.nn.functional.cross_entropy", compilable=True, functorch=True)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """F.cross_entropy of float32 logits: of 16-bit ones it would round the log-probabilities."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    weight = None if class_weight is None else class_weight.detach().to(wide.dtype)
    index = target.reshape(-1).long()
    loss = F.cross_entropy(wide, index, weight, None, ignore_index, None, reduction, label_smoothing)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss, torch.zeros_like(loss, requires_grad=False)
