"""Losses. Source: torch 2.13 documentation of torch.nn.functional.cross_entropy; Hsu et al. 2024 (Liger Kernel)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.cross_entropy import cross_entropy as dispatched_cross_entropy
from llm_adapt.ops.cross_entropy import reduced
from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.fused_linear_cross_entropy import check_head, rows_of_chunk

__all__ = ["cross_entropy", "fused_linear_cross_entropy"]


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


class _GradientsAhead(Function):
    """The sum of the losses of rows, weighted by `share`; their gradients are formed while the logits are there."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        share: torch.Tensor,
        chunk_rows: int,
        options: dict[str, Any],
    ) -> torch.Tensor:
        total = hidden.new_zeros((), dtype=share.dtype)
        of_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        of_weight: torch.Tensor | None = None
        of_bias: torch.Tensor | None = None
        for start in range(0, hidden.shape[0], chunk_rows):
            rows = slice(start, start + chunk_rows)
            logits = F.linear(hidden[rows], weight, bias).requires_grad_()
            with torch.enable_grad():
                loss, _ = dispatched_cross_entropy(logits, target[rows], reduction="none", **options)
            (grad,) = torch.autograd.grad(loss, logits, share[rows])
            total += torch.dot(loss.detach(), share[rows])
            if of_hidden is not None:
                torch.mm(grad, weight, out=of_hidden[rows])
            if ctx.needs_input_grad[1]:
                of_weight = _added(of_weight, grad.t(), hidden[rows], is_only=hidden.shape[0] <= chunk_rows)
            if ctx.needs_input_grad[2]:
                part = grad.sum(0, dtype=share.dtype)
                of_bias = part if of_bias is None else of_bias.add_(part)
        ctx.save_for_backward(of_hidden, of_weight, of_bias)
        ctx.dtype = hidden.dtype
        return total

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if grad is None else (grad * upstream).to(ctx.dtype) for grad in ctx.saved_tensors)
        return (*scaled, None, None, None, None)


def _added(total: torch.Tensor | None, columns: torch.Tensor, rows: torch.Tensor, is_only: bool) -> torch.Tensor:
    """The weight's gradient, in float32 where there are several chunks."""
    if is_only:
        return columns @ rows
    if total is None:
        return (columns @ rows).to(torch.promote_types(rows.dtype, torch.float32))
    return total.addmm_(columns, rows) if total.dtype == rows.dtype else total.add_(columns @ rows)


def _not_ahead(call: Call) -> str | None:
    if call.device not in ("cpu", "cuda"):
        return "keeps the gradients from the forward pass on: for the CPU and CUDA"
    if call.reduction == "none":
        return "knows the gradient of one loss, not of each row"
    if call.hidden.dtype == torch.float16:
        return "rounds gradients before they are scaled, where float16 needs the scale of the loss"
    return None if call.hidden.shape.numel() else "takes at least one row"


@kernel("fused_linear_cross_entropy", "gradients in the forward pass, as Liger Kernel", refuses=_not_ahead)
def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Three products in the place of four: gradients are formed in the forward pass, and scaled in backward."""
    check_head(hidden, weight, target, bias, class_weight, label_smoothing, logit_softcap, reduction, chunk_rows)
    options: dict[str, Any] = {
        "class_weight": class_weight,
        "ignore_index": ignore_index,
        "label_smoothing": label_smoothing,
        "logit_scale": logit_scale,
        "logit_softcap": logit_softcap,
    }
    rows = rows_of_chunk(chunk_rows, weight)
    flat, index = hidden.reshape(-1, hidden.shape[-1]), target.reshape(-1).long()
    if flat.shape[0] <= rows:  # one chunk: the logits are no more than a chunk may be
        logits = F.linear(flat, weight, bias)
        return dispatched_cross_entropy(logits.view(*target.shape, -1), target, reduction=reduction, **options)
    if not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))):
        parts = [
            dispatched_cross_entropy(F.linear(given, weight, bias), wanted, reduction="none", **options)[0]
            for given, wanted in zip(flat.split(rows), index.split(rows), strict=True)
        ]
        loss = torch.cat(parts)
        return reduced(loss, torch.zeros_like(loss), index, class_weight, ignore_index, reduction)
    share = _shares(index, class_weight, ignore_index, reduction).to(torch.promote_types(hidden.dtype, torch.float32))
    total: torch.Tensor = _GradientsAhead.apply(flat, weight, bias, index, share, rows, options)
    return total, torch.zeros_like(total, requires_grad=False)


def _shares(index: torch.Tensor, class_weight: torch.Tensor | None, ignore_index: int, reduction: str) -> torch.Tensor:
    """What the loss of each row counts for in the sum or the mean [N]."""
    if reduction == "sum":
        return torch.ones_like(index)
    is_counted = index != ignore_index
    if class_weight is None:
        number = is_counted.sum()
    else:
        wide = torch.promote_types(class_weight.dtype, torch.float32)
        weights = class_weight.detach().to(wide)[torch.where(is_counted, index, 0)]
        number = (weights * is_counted).sum()
    return (1.0 / number).expand(index.shape)
