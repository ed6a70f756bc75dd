"""The replacements for transformers' losses, each made of the original, with its name and signature.

logits [N, V] or [B, S, V], labels [N] or [B, S]; N = tokens, V = vocabulary, B = sequences, S = their length.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.nn import functional as F

from llm_adapt.ops.cross_entropy import cross_entropy

__all__ = ["ForCausalLMLoss", "ForMaskedLMLoss", "fixed_cross_entropy"]

Loss = Callable[..., torch.Tensor]
Tell = Callable[[str, str, str], None]


def fixed_cross_entropy(original: Loss, tell: Tell, ours: Mapping[str, Loss]) -> Loss:
    """The mean over the targets that count, or their sum over num_items_in_batch; in the dtype of the source."""

    @functools.wraps(original)
    def loss_of(
        source: torch.Tensor,
        target: torch.Tensor,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> torch.Tensor:
        why = _refusal(source, target)
        if why:
            tell("transformers: fixed_cross_entropy", "its own code", why)
            return original(source, target, num_items_in_batch, ignore_index, **kwargs)
        loss = _loss(source, target, num_items_in_batch, ignore_index).to(source.dtype)
        return _divided(loss, num_items_in_batch)

    return loss_of


def ForCausalLMLoss(original: Loss, tell: Tell, ours: Mapping[str, Loss]) -> Loss:
    """The token at s predicts the one at s + 1; shift_labels are shifted already."""
    names = original.__globals__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def loss_of(
        logits: torch.Tensor,
        labels: Any,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        shift_labels: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not _is_narrow(logits) or names["fixed_cross_entropy"] is not ours.get("fixed_cross_entropy"):
            return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs)
        # The last token has no label.
        target = F.pad(labels[..., 1:], (0, 1), value=ignore_index) if shift_labels is None else shift_labels
        return _narrow_loss(logits, target, vocab_size, num_items_in_batch, ignore_index, names)

    return loss_of


def ForMaskedLMLoss(original: Loss, tell: Tell, ours: Mapping[str, Loss]) -> Loss:
    """Each token predicts its own label."""
    names = original.__globals__  # type: ignore[attr-defined]

    @functools.wraps(original)
    def loss_of(
        logits: torch.Tensor,
        labels: torch.Tensor,
        vocab_size: int,
        num_items_in_batch: Any = None,
        ignore_index: int = -100,
        **kwargs: Any,
    ) -> torch.Tensor:
        if not _is_narrow(logits) or names["fixed_cross_entropy"] is not ours.get("fixed_cross_entropy"):
            return original(logits, labels, vocab_size, num_items_in_batch, ignore_index, **kwargs)
        return _narrow_loss(logits, labels, vocab_size, num_items_in_batch, ignore_index, names)

    return loss_of


def _is_narrow(logits: torch.Tensor) -> bool:
    """Whether the cast to float32 is a copy that the op can do without."""
    return logits.dtype in (torch.bfloat16, torch.float16)


def _narrow_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    vocab_size: int,
    num_items_in_batch: Any,
    ignore_index: int,
    names: Mapping[str, Any],
) -> torch.Tensor:
    """The loss of 16-bit logits in float32, as of the same logits cast before."""
    logits = logits.reshape(-1, vocab_size)
    target = target.reshape(-1).to(logits.device)
    if _refusal(logits, target, is_wide=True):  # which fixed_cross_entropy tells
        found: torch.Tensor = names["fixed_cross_entropy"](logits.float(), target, num_items_in_batch, ignore_index)
        return found
    return _divided(_loss(logits, target, num_items_in_batch, ignore_index), num_items_in_batch)


def _loss(source: torch.Tensor, target: torch.Tensor, num_items_in_batch: Any, ignore_index: int) -> torch.Tensor:
    reduction: Literal["mean", "sum"] = "mean" if num_items_in_batch is None else "sum"
    return cross_entropy(source, target, ignore_index=ignore_index, reduction=reduction)[0]


def _divided(loss: torch.Tensor, num_items_in_batch: Any) -> torch.Tensor:
    """The sum over the number of items of all micro-batches, wherever that number is."""
    if num_items_in_batch is None:
        return loss
    if torch.is_tensor(num_items_in_batch):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    found: torch.Tensor = loss / num_items_in_batch
    return found


def _refusal(source: torch.Tensor, target: torch.Tensor, is_wide: bool = False) -> str:
    """Why the op does not take a call; "" when it does.

    Args:
        is_wide: the result is float32 anyway; else it has the dtype of the source, which autocast would widen.
    """
    if type(source) not in (torch.Tensor, torch.nn.Parameter) or type(target) is not torch.Tensor:
        return f"takes plain tensors, not {type(source).__name__} and {type(target).__name__}"
    if source.ndim != 2 or target.ndim != 1:
        return "takes the classes on the last axis and one index a row"
    if target.dtype != torch.int64 or not source.is_floating_point():
        return f"takes int64 targets; found {target.dtype} of {source.dtype}"
    if not is_wide and source.element_size() < 4 and torch.is_autocast_enabled(source.device.type):
        return "the result of 16 bits under autocast has a dtype that autocast chooses"
    return ""
