"""Cross entropy, whole or of a shard. logits [..., V], target [...]. No float32 copy of the logits is made.

Kept for backward: logits and target as they are, and one float32 number a row.
"""

from __future__ import annotations

import ctypes
from typing import Any, Literal, NamedTuple

import torch

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.openmp.library import (
    TYPES,
    first_order,
    function,
    gradients_wanted,
    openmp_kernel,
    pointer,
    rows_of,
    too_few,
)

__all__ = ["cross_entropy", "softmax_partials"]

_loss = function("cross_entropy", "pli p pi pppp ll l ffff i i", ctypes.c_int64)
_loss_backward = function("cross_entropy_backward", "pli p pi pl pp p ll l ffff i")
_partials = function("softmax_partials", "pli p ppp ll l ff i")
_partials_backward = function("softmax_partials_backward", "pli p p ppp p ll l ff i")
_Counts = ctypes.c_double * 2  # what a mean divides the loss and the z-loss by
_REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}
_LEAST = 2**16
_SOURCE = "our own; Milakov and Gimelshein 2018"


class _How(NamedTuple):
    """The numbers of a call, as the library takes them."""

    ignore_index: int
    label_smoothing: float
    z_loss: float
    scale: float
    softcap: float


def _loss_of(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, how: _How, reduction: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Any]:
    """Loss and z-loss, log-sum-exp of each row, and the counts."""
    rows, stride = rows_of(logits)
    columns = logits.shape[-1]
    sizes = target.shape if reduction == "none" else ()
    loss, z, lse = (logits.new_empty(size, dtype=torch.float32) for size in (sizes, sizes, target.numel()))
    counts = _Counts()
    wrong = _loss(
        rows.data_ptr(), stride, TYPES[logits.dtype], target.data_ptr(),
        pointer(class_weight), 0 if class_weight is None else TYPES[class_weight.dtype],
        loss.data_ptr(), z.data_ptr(), lse.data_ptr(), counts,
        target.numel(), columns, *how, _REDUCTIONS[reduction], torch.get_num_threads(),
    )  # fmt: skip
    if wrong >= 0:
        raise IndexError(
            f"cross_entropy: target {int(target.reshape(-1)[wrong])} was given; the logits have {columns} classes, "
            f"and {how.ignore_index} is ignored. Correct target, or ignore_index."
        )
    return loss, z, lse, counts


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        how: _How,
        reduction: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        loss, z, lse, ctx.counts = _loss_of(logits, target, class_weight, how, reduction)
        ctx.how, ctx.is_reduced = how, reduction != "none"
        ctx.save_for_backward(logits, target, class_weight, lse)
        ctx.mark_non_differentiable(z)
        return loss, z

    @staticmethod
    @first_order
    def backward(ctx: Any, upstream: torch.Tensor, _: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits, target, class_weight, lse = ctx.saved_tensors
        rows, stride = rows_of(logits)
        upstream = upstream.contiguous()
        dx = logits.new_empty(logits.shape)
        _loss_backward(
            rows.data_ptr(), stride, TYPES[logits.dtype], target.data_ptr(),
            pointer(class_weight), 0 if class_weight is None else TYPES[class_weight.dtype],
            upstream.data_ptr(), 0 if ctx.is_reduced else 1, lse.data_ptr(), ctx.counts, dx.data_ptr(),
            target.numel(), logits.shape[-1], *ctx.how, torch.get_num_threads(),
        )  # fmt: skip
        return dx, None, None, None, None


def _misfit(call: Call) -> str | None:
    """What both ops ask of their tensors."""
    logits, target, softcap = call.logits, call.target, call.logit_softcap
    if not logits.shape[-1:].numel() or target.shape != logits.shape[:-1] or not logits.ndim:
        return "takes logits of at least one class, and a target for each row"
    if target.dtype.is_floating_point or target.dtype == torch.bool:
        return "takes a target of indices"
    return None if softcap is None or softcap > 0 else "takes a positive softcap"


def _not_for_loss(call: Call) -> str | None:
    weight = call.class_weight
    if weight is not None and weight.shape != call.logits.shape[-1:]:
        return "takes a weight for each class"
    if not 0.0 <= call.label_smoothing <= 1.0 or call.reduction not in _REDUCTIONS:
        return "does not know that reduction, or label_smoothing"
    if call.logits.shape[-1:] == (1,):  # the loss is 0, but for what cancels
        return "takes at least two classes"
    return _misfit(call) or too_few(call.logits, _LEAST)


@openmp_kernel("cross_entropy", _SOURCE, _not_for_loss)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits are read once each way, and their gradient is written in their dtype."""
    target = target.long().contiguous()
    if class_weight is not None:
        class_weight = class_weight.detach().contiguous()
    how = _How(ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap or 0.0)
    if gradients_wanted(logits):
        found: tuple[torch.Tensor, torch.Tensor] = _CrossEntropy.apply(logits, target, class_weight, how, reduction)
        return found
    return _loss_of(logits, target, class_weight, how, reduction)[:2]


class _Shard(NamedTuple):
    """The numbers of a call, as the library takes them, and whether the total is wanted."""

    start: int
    scale: float
    softcap: float
    with_total: bool


def _partials_of(logits: torch.Tensor, target: torch.Tensor, how: _Shard) -> tuple[torch.Tensor, ...]:
    rows, stride = rows_of(logits)
    found = tuple(logits.new_empty(target.shape, dtype=torch.float32) for _ in range(3 if how.with_total else 2))
    pointers = (*map(pointer, found), None)[:3]
    _partials(
        rows.data_ptr(), stride, TYPES[logits.dtype], target.data_ptr(), *pointers,
        target.numel(), logits.shape[-1], *how[:3], torch.get_num_threads(),
    )  # fmt: skip
    return found


class _Partials(Function):
    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, target: torch.Tensor, how: _Shard) -> tuple[torch.Tensor, ...]:
        found = _partials_of(logits, target, how)
        ctx.how = how
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, target, found[0])
        return found

    @staticmethod
    @first_order
    def backward(ctx: Any, *upstream: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        logits, target, lse = ctx.saved_tensors
        rows, stride = rows_of(logits)
        given = [None if part is None else part.contiguous() for part in upstream]
        pointers = (*map(pointer, given), None)[:3]
        dx = logits.new_empty(logits.shape)
        _partials_backward(
            rows.data_ptr(), stride, TYPES[logits.dtype], target.data_ptr(), lse.data_ptr(), *pointers, dx.data_ptr(),
            target.numel(), logits.shape[-1], *ctx.how[:3], torch.get_num_threads(),
        )  # fmt: skip
        return dx, None, None


@openmp_kernel("softmax_partials", _SOURCE, _misfit)
def softmax_partials(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int = 0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    with_total: bool = False,
) -> tuple[torch.Tensor, ...]:
    """The logits are read once each way, and their gradient is written in their dtype."""
    target = target.long().contiguous()
    how = _Shard(start, logit_scale, logit_softcap or 0.0, with_total)
    if gradients_wanted(logits):
        found: tuple[torch.Tensor, ...] = _Partials.apply(logits, target, how)
        return found
    return _partials_of(logits, target, how)
