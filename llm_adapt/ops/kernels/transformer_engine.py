"""Cross entropy of TransformerEngine, in Triton. logits [..., V], target [...], N = number of targets.

Source: transformer_engine/pytorch/cross_entropy.py of NVIDIA/TransformerEngine at 02965d2: the loss is float32 for
16-bit logits, and the gradient takes the place of the logits, so it is given a copy. Its average counts ignored rows
too, so the rows are reduced here. Its norms, rotary embedding and attention are modules with parameters of their own,
take angles instead of tables, or choose among backends themselves: no op is served by them. Not run: tests/contracts
calls it against a fake.
"""

from __future__ import annotations

from typing import Literal

import torch
from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["cross_entropy"]


def _refuses(call: Call) -> str | None:
    if call.logits.dtype not in (torch.float32, torch.bfloat16):
        return "takes float32 and bfloat16"
    if 0 in call.logits.shape or call.target.dtype != torch.int64:
        return "takes int64 targets, and no empty tensors"
    return None


@kernel("cross_entropy", "parallel_cross_entropy of TransformerEngine at 02965d2", refuses=_refuses)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """parallel_cross_entropy of one rank, by rows. Its arguments go by position: it is Function.apply."""
    rows = logits.clone(memory_format=torch.contiguous_format).reshape(1, -1, logits.shape[-1])
    loss = parallel_cross_entropy(rows, target.reshape(1, -1), label_smoothing, False, None, ignore_index)
    loss = loss.reshape(target.shape)
    if reduction == "sum":
        loss = loss.sum()
    elif reduction == "mean":
        loss = loss.sum() / (target != ignore_index).sum()
    return loss, torch.zeros_like(loss)
