"""Cross entropy in Triton. Rows of V logits; c = the scaled and capped logit, lse = log(sum(exp(c))), t = target.

The forward reads a row once, in blocks: the sum of exp(c - m) is rescaled whenever a block raises the maximum m. The
backward reads it once more and writes the gradient: no probabilities are kept.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.cross_entropy import check_losses, reduced
from llm_adapt.ops.kernels.triton.library import block_of, launch, rows_of, triton_kernel

__all__ = ["cross_entropy"]

_STAGES = 3  # blocks of the forward that are read ahead, and the one in hand


@triton.jit
def _tanh(x):
    """Not every Triton has tanh. Near 0 its series, where 1 - exp(-2|x|) would cancel."""
    e = tl.exp(-2.0 * tl.abs(x))
    far = (1.0 - e) / (1.0 + e)
    square = x * x
    near = x * (1.0 + square * (-1.0 / 3.0 + square * (2.0 / 15.0 - square * (17.0 / 315.0))))
    return tl.where(square < 0.01, near, tl.where(x < 0.0, -far, far))


@triton.jit
def _capped(value, scale, cap, HAS_CAP: tl.constexpr):
    c = value.to(tl.float32) * scale
    if HAS_CAP:
        c = cap * _tanh(c / cap)
    return c


@triton.jit
def _added(largest, exponentials, c):
    """The largest logit and the sum of exp(c - largest), with one more block."""
    new = tl.maximum(largest, tl.max(c, 0))
    # Where all logits so far are -inf, as those of padding are, -inf - -inf would be NaN.
    shift = tl.where(new == -float("inf"), 0.0, new)
    return new, exponentials * tl.exp(largest - shift) + tl.sum(tl.exp(c - shift), 0)


@triton.jit
def _weighted(c, class_weight, at, columns, HAS_WEIGHT: tl.constexpr):
    """The sum of w c over a block."""
    w = tl.where(at < columns, 1.0, 0.0)
    if HAS_WEIGHT:
        w = tl.load(class_weight + at, mask=at < columns, other=0.0).to(tl.float32)
    return tl.sum(w * c, 0)


@triton.jit
def _forward(
    logits,
    target,
    class_weight,
    class_weight_sum,
    loss,
    lse,
    rows,
    columns,
    stride,
    ignored,
    smoothing,
    scale,
    cap,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_CAP: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        index = tl.load(target + row).to(tl.int64)
        counts = index != ignored
        largest, exponentials, total = -float("inf"), 0.0, 0.0
        to_read = tl.where(counts, columns, 0)  # an ignored row is not read
        full = to_read - to_read % BLOCK  # full blocks first, without a mask, and the next ones on their way
        for start in tl.range(0, full, BLOCK, num_stages=STAGES):
            at = start + tl.arange(0, BLOCK)
            c = _capped(tl.load(logits + row * stride + at), scale, cap, HAS_CAP)
            if HAS_SMOOTHING:
                total += _weighted(c, class_weight, at, columns, HAS_WEIGHT)
            largest, exponentials = _added(largest, exponentials, c)
        for start in range(full, to_read, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + at, mask=at < columns, other=0.0)
            c = _capped(value, scale, cap, HAS_CAP)
            if HAS_SMOOTHING:
                total += _weighted(c, class_weight, at, columns, HAS_WEIGHT)
            largest, exponentials = _added(largest, exponentials, tl.where(at < columns, c, -float("inf")))
        is_class = counts & (index >= 0) & (index < columns)
        found = largest + tl.log(tl.where(counts, exponentials, 1.0))
        # A target beyond the vocabulary gives NaN: a kernel cannot raise.
        c = _capped(tl.load(logits + row * stride + index, mask=is_class, other=float("nan")), scale, cap, HAS_CAP)
        result = found - c
        if HAS_WEIGHT:
            result = result * tl.load(class_weight + index, mask=is_class, other=0.0).to(tl.float32)
        if HAS_SMOOTHING:
            whole = columns * 1.0
            if HAS_WEIGHT:
                whole = tl.load(class_weight_sum)
            result = (1.0 - smoothing) * result + smoothing * (found * whole - total) / columns
        tl.store(loss + row, tl.where(counts, result, 0.0))
        tl.store(lse + row, tl.where(counts, found, 0.0))


@triton.jit
def _backward(
    logits,
    target,
    class_weight,
    class_weight_sum,
    lse,
    dloss,
    dlse,
    dlogits,
    rows,
    columns,
    stride,
    ignored,
    smoothing,
    scale,
    cap,
    HAS_WEIGHT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_CAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        index = tl.load(target + row).to(tl.int64)
        counts = index != ignored
        is_class = (index >= 0) & (index < columns)
        found, g = tl.load(lse + row), tl.load(dloss + row)
        hit = tl.where(is_class, g, float("nan"))  # factor of lse - c_t
        if HAS_WEIGHT:
            hit = hit * tl.load(class_weight + index, mask=is_class & counts, other=0.0).to(tl.float32)
        if HAS_SMOOTHING:
            whole = columns * 1.0
            if HAS_WEIGHT:
                whole = tl.load(class_weight_sum)
            spread = g * smoothing / columns  # factor of the sum of w (lse - c)
            hit = hit * (1.0 - smoothing)
        of_lse = tl.load(dlse + row)
        to_read = tl.where(counts, columns, 0)  # an ignored row is not read
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(logits + row * stride + at, mask=at < to_read, other=0.0)
            c = _capped(value, scale, cap, HAS_CAP)
            p = tl.exp(c - found)
            dc = hit * tl.where(at == index, p - 1.0, p) + of_lse * p
            if HAS_SMOOTHING:
                w = 1.0
                if HAS_WEIGHT:
                    w = tl.load(class_weight + at, mask=at < columns, other=0.0).to(tl.float32)
                dc += spread * (whole * p - w)
            dc = dc * scale
            if HAS_CAP:
                dc = dc * (1.0 - (c / cap) * (c / cap))
            dc = tl.where(counts, dc, 0.0)
            tl.store(dlogits + row * columns + at, dc.to(dlogits.dtype.element_ty), mask=at < columns)


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    logit_softcap: float | None


def _constants(logits: torch.Tensor, class_weight: torch.Tensor | None, options: _Options) -> dict[str, Any]:
    block = block_of(logits.shape[1])
    return {
        "ignored": options.ignore_index,
        "smoothing": float(options.label_smoothing),
        "scale": float(options.logit_scale),
        "cap": 1.0 if options.logit_softcap is None else float(options.logit_softcap),
        "HAS_WEIGHT": class_weight is not None,
        "HAS_SMOOTHING": options.label_smoothing != 0.0,
        "HAS_CAP": options.logit_softcap is not None,
        "BLOCK": block,
        "block": block,
        "each": 32,
    }


def _weights(class_weight: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The weights side by side, and their sum."""
    return (None, None) if class_weight is None else (class_weight.contiguous(), class_weight.float().sum())


class _CrossEntropy(Function):
    @staticmethod
    def forward(
        logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, options: _Options
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Loss and lse of each row, both 0 where the target is ignored."""
        rows = rows_of(logits)
        loss, lse = (logits.new_empty(target.shape, dtype=torch.float32) for _ in range(2))
        tensors = rows, target.reshape(-1), *_weights(class_weight), loss, lse
        constants = _constants(rows, class_weight, options)
        launch(_forward, rows.shape[0], *tensors, *rows.shape, rows.stride(0), STAGES=_STAGES, **constants)
        return loss, lse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, ctx.options = inputs
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor, dlse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        logits, target, class_weight, lse = ctx.saved_tensors
        rows = rows_of(logits)
        dlogits = logits.new_empty(logits.shape)
        gradients = dloss.reshape(-1).contiguous(), dlse.reshape(-1).contiguous()
        tensors = rows, target.reshape(-1), *_weights(class_weight), lse, *gradients, dlogits
        constants = _constants(rows, class_weight, ctx.options)
        launch(_backward, rows.shape[0], *tensors, *rows.shape, rows.stride(0), **constants)
        return dlogits, None, None, None


@triton_kernel("cross_entropy", "our own; Milakov and Gimelshein 2018 (online softmax)")
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
    """One kernel forward and one backward over the logits; z-loss and reduction are a few operations on the rows.

    A target beyond the vocabulary gives NaN, which the reference refuses: a kernel cannot raise.
    """
    check_losses("cross_entropy", target, tuple(logits.shape), class_weight, label_smoothing, logit_softcap, reduction)
    options = _Options(ignore_index, label_smoothing, logit_scale, logit_softcap)
    loss, lse = _CrossEntropy.apply(logits, target, class_weight, options)
    z = torch.where(target == ignore_index, 0.0, z_loss * lse.square()) if z_loss else torch.zeros_like(lse)
    return reduced(loss, z, target, class_weight, ignore_index, reduction)
