"""Softmax and cross entropy of torch_npu. x [B, N, Q, K] = scores; logits [..., V], target [...].

npu_scaled_masked_softmax says nothing of rows that are masked whole: they are shown to it unmasked, and are 0 after.
npu_cross_entropy_loss gives a loss of shape [1] in the dtype of the logits, so it is given float32.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel
from llm_adapt.ops.scaled_masked_softmax import hidden_scores

__all__ = ["cross_entropy", "scaled_masked_softmax"]


def _softmax_refuses(call: Call) -> str | None:
    if all(32 <= size <= 4096 and size % 32 == 0 for size in call.x.shape[-2:]):
        return None
    return "takes 32 to 4096 queries and keys, in steps of 32"


@npu_kernel("scaled_masked_softmax", "npu_scaled_masked_softmax", refuses=_softmax_refuses)
def scaled_masked_softmax(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    scale: float = 1.0,
    causal: bool = False,
    window: tuple[int, int] | None = None,
) -> torch.Tensor:
    """npu_scaled_masked_softmax, True = masked out in both; causal and window become part of the mask."""
    hidden = hidden_scores(x, mask, causal, window)
    may_be_empty = mask is not None or (hidden is not None and x.shape[-1] < x.shape[-2])
    if hidden is None:
        hidden = torch.zeros(x.shape[-2:], dtype=torch.bool, device=x.device)
    hidden = hidden.expand(*hidden.shape[:-2], *x.shape[-2:])
    empty = hidden.all(-1, keepdim=True)
    if may_be_empty:
        hidden = hidden & ~empty
    whole = x if x.ndim == 4 else x.unsqueeze(0)
    hidden = hidden.reshape((1,) * (4 - hidden.ndim) + tuple(hidden.shape))
    p: torch.Tensor = torch_npu.npu_scaled_masked_softmax(whole, hidden, scale=scale, fixed_triu_mask=False)
    p = p.reshape(x.shape)
    return p.masked_fill(empty, 0.0) if may_be_empty else p


def _loss_refuses(call: Call) -> str | None:
    if call.reduction == "mean" and (call.class_weight or call.ignore_index != -100):
        return "has a gradient of the mean without class weights and with the usual ignore_index alone"
    if call.ignore_index >= call.logits.shape[-1]:
        return "takes an ignore_index below the number of classes"
    if call.logits.shape[:-1].numel() > 200_000:
        return "takes at most 200000 rows"
    return None


@npu_kernel("cross_entropy", "npu_cross_entropy_loss", refuses=_loss_refuses)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_cross_entropy_loss, without z-loss and label smoothing, which it has no gradient of."""
    weight = None if class_weight is None else class_weight.detach().float()
    loss = torch_npu.npu_cross_entropy_loss(
        logits.float().reshape(-1, logits.shape[-1]),
        target.long().reshape(-1),
        weight=weight,
        reduction=reduction,
        ignore_index=ignore_index,
    )[0].reshape(target.shape if reduction == "none" else ())
    return loss, torch.zeros_like(loss)
