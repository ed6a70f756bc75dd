"""Cross entropy of a linear layer, without its logits. hidden [N, H], weight [V, H], bias [V], target [N]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

from llm_adapt.ops.activation import fewer_rows
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.cross_entropy import capped, check_losses, reduced, row_losses
from llm_adapt.ops.dispatch import Tolerance, fused_op

__all__ = ["fused_linear_cross_entropy"]

_MOST_LOGITS = 2**26  # of one chunk: 256 MiB of float32, and enough rows to keep a matrix unit busy


class _Options(NamedTuple):
    ignore_index: int
    label_smoothing: float
    logit_scale: float
    logit_softcap: float | None
    chunk_rows: int


def _chunks(num_rows: int, chunk_rows: int) -> list[slice]:
    """Slices of the rows; of no rows, one slice."""
    return [slice(start, start + chunk_rows) for start in range(0, max(1, num_rows), chunk_rows)]


class _ChunkedLosses(Function):
    """Loss and lse of each row. Saved: the inputs and one number a row; logits are computed again for gradients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        options: tuple[Any, ...],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        o = _Options(*options)
        losses, normalisers = [], []
        for rows in _chunks(hidden.shape[0], o.chunk_rows):
            c = capped(F.linear(hidden[rows], weight, bias), o.logit_scale, o.logit_softcap)
            lse = torch.logsumexp(c, -1)
            losses.append(row_losses(c, lse, target[rows], class_weight, o.ignore_index, o.label_smoothing))
            normalisers.append(lse)
        return torch.cat(losses), torch.cat(normalisers)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        *tensors, options = inputs
        ctx.options = options
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor, upstream_lse: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, bias, target, class_weight, lse = ctx.saved_tensors
        o, wide = _Options(*ctx.options), lse.dtype
        wants_hidden, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        weight_grad: torch.Tensor | None = None
        bias_grad: torch.Tensor | None = None
        hidden_grads = []
        for rows in _chunks(hidden.shape[0], o.chunk_rows):
            c = capped(F.linear(hidden[rows], weight, bias), o.logit_scale, o.logit_softcap)
            grad = _logit_gradient(c, lse[rows], target[rows], class_weight, upstream[rows], upstream_lse[rows], o)
            grad = grad.to(hidden.dtype)
            if wants_hidden:
                hidden_grads.append(grad @ weight)
            if wants_weight:
                weight_grad = _added(weight_grad, grad.t() @ hidden[rows], wide)
            if wants_bias:
                bias_grad = _added(bias_grad, grad.sum(0, dtype=wide), wide)
        return (
            torch.cat(hidden_grads) if wants_hidden else None,
            None if weight_grad is None else weight_grad.to(weight.dtype),
            None if bias_grad is None else bias_grad.to(bias.dtype),
            None,
            None,
            None,
        )


def _added(total: torch.Tensor | None, part: torch.Tensor, wide: torch.dtype) -> torch.Tensor:
    """The sum over the chunks, in float32: in bfloat16, a chunk would round away what the ones before it gave."""
    return part.to(wide) if total is None else total.add_(part)


def _logit_gradient(
    c: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    upstream: torch.Tensor,
    upstream_lse: torch.Tensor,
    o: _Options,
) -> torch.Tensor:
    """d(sum(upstream loss + upstream_lse lse)) / d logits, for the loss as row_losses defines it."""
    index = target.long()
    is_ignored = index == o.ignore_index
    index = torch.where(is_ignored, 0, index)
    upstream = torch.where(is_ignored, 0.0, upstream)
    e, classes = o.label_smoothing, c.shape[-1]
    if class_weight is None:
        of_target, of_all = upstream * (1.0 - e), upstream * (e / classes)
        of_lse, of_others = upstream + upstream_lse, of_all[:, None]
    else:
        w = class_weight.to(c.dtype)
        of_target, of_all = upstream * (1.0 - e) * w[index], upstream * (e / classes)
        of_lse, of_others = of_target + of_all * w.sum() + upstream_lse, of_all[:, None] * w
    grad = torch.exp(c - lse[:, None]) * of_lse[:, None]
    grad = grad.scatter_add(-1, index[:, None], -of_target[:, None])
    if e:
        grad = grad - of_others
    if o.logit_softcap is not None:
        grad = grad * (1.0 - (c / o.logit_softcap).square())
    return grad if o.logit_scale == 1.0 else grad * o.logit_scale


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def case(rows: int, width: int, classes: int, ignored: int = -100) -> dict[str, Any]:
        hidden = torch.randn(rows, width, generator=generator).to(dtype)
        weight = (torch.randn(classes, width, generator=generator) * width**-0.5).to(dtype)
        target = torch.randint(classes, (rows,), generator=generator)
        target[1::4] = ignored
        return {"hidden": hidden, "weight": weight, "target": target}

    def draw(size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator).to(dtype)

    yield case(12, 16, 33)
    yield case(13, 16, 33) | {"bias": draw(33), "chunk_rows": 4}
    yield case(13, 17, 33) | {"chunk_rows": 5, "label_smoothing": 0.1, "reduction": "sum", "z_loss": 0.01}
    yield case(13, 16, 33) | {"chunk_rows": 5, "class_weight": draw(33).abs() + 0.5, "label_smoothing": 0.2}
    yield case(13, 16, 40, 3) | {"ignore_index": 3, "logit_softcap": 2.0, "logit_scale": 0.5, "reduction": "none"}
    yield case(0, 16, 33) | {"reduction": "sum", "bias": draw(33)}


_FEW_CLASSES = 512


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """Fewer rows and classes; targets are counted round the classes that are left, and ignored ones stay ignored."""
    found = fewer_rows(arguments, "hidden", target=0)
    left = min(_FEW_CLASSES, found["weight"].shape[0])
    target = found["target"]
    is_ignored = target == arguments["ignore_index"]
    found["target"] = torch.where(is_ignored, target, target % left)
    for name in ("weight", "bias", "class_weight"):
        if found[name] is not None:
            found[name] = found[name][:left]
    return found


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    width = shape[-1]
    weight = torch.randn(4 * width, width, generator=generator) * width**-0.5
    target = torch.randint(4 * width, shape[:-1], generator=generator)
    return {"hidden": torch.randn(shape, generator=generator).to(dtype), "weight": weight.to(dtype), "target": target}


@fused_op(
    inputs=_inputs,
    autocast=("hidden", "weight", "bias"),
    shrink=_shrink,
    example=_example,
    sizes={"2048 wide": (4096, 2048)},
    differentiable=("hidden", "weight", "bias"),
    hints=frozenset({"chunk_rows"}),
    tolerance=Tolerance(
        {torch.float16: 8 * 2.0**-11, torch.bfloat16: 8 * 2.0**-8},
        why="16-bit logits are rounded, and so is their gradient: two roundings more than the defaults allow",
    ),
)
def fused_linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
    chunk_rows: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cross_entropy(hidden weight^T + bias, target, ...), with no more than chunk_rows rows of logits at a time.

    The options and results are those of cross_entropy. chunk_rows: None = about 2^26 logits. Gradients are computed
    in the backward pass from logits that are computed again, so any upstream gradient is right, for one matrix
    product more (4 in place of 3). Memory: the inputs, one number a row, one chunk of logits, and in the backward
    pass the weight's gradient in float32.

    Shapes: hidden [..., H], weight [V, H], target [...], bias [V], class_weight [V] -> two of [...] or scalars.
    Dtypes: logits in the dtype of hidden, as a linear layer gives them; then as cross_entropy; results in float32.
    Raises: as cross_entropy; ValueError for chunk_rows < 1, a weight or bias of another shape; TypeError for tensors
    of several dtypes.
    Source: Hsu et al. 2024 (Liger Kernel), section 3.2; Wijmans et al. 2024 (Cut Your Losses in Large-Vocabulary
    Language Models).
    """
    check_head(hidden, weight, target, bias, class_weight, label_smoothing, logit_softcap, reduction, chunk_rows)
    rows = rows_of_chunk(chunk_rows, weight)
    options = _Options(ignore_index, label_smoothing, logit_scale, logit_softcap, rows)
    flat = hidden.reshape(-1, hidden.shape[-1])
    loss, lse = _ChunkedLosses.apply(flat, weight, bias, target.reshape(-1), class_weight, tuple(options))
    loss, lse = loss.view(target.shape), lse.view(target.shape)
    z = torch.where(target == ignore_index, 0.0, z_loss * lse.square()) if z_loss else torch.zeros_like(loss)
    return reduced(loss, z, target, class_weight, ignore_index, reduction)


def rows_of_chunk(chunk_rows: int | None, weight: torch.Tensor) -> int:
    """Rows of logits at a time; for kernels as well."""
    return chunk_rows or max(1, _MOST_LOGITS // max(1, weight.shape[0]))


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    bias: torch.Tensor | None,
    class_weight: torch.Tensor | None,
    label_smoothing: float,
    logit_softcap: float | None,
    reduction: str,
    chunk_rows: int | None,
) -> None:
    """Refuse shapes, dtypes and options that give no loss; for kernels as well."""
    name, sizes = "fused_linear_cross_entropy", (*hidden.shape[:-1], weight.shape[0])
    check_losses(name, target, sizes, class_weight, label_smoothing, logit_softcap, reduction)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(f"{name}: weight has shape {tuple(weight.shape)}; (V, {hidden.shape[-1]}) was expected.")
    if weight.dtype != hidden.dtype or (bias is not None and bias.dtype != hidden.dtype):
        raise TypeError(f"{name}: hidden is {hidden.dtype}, weight {weight.dtype}; cast them and bias to one dtype.")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"{name}: bias has shape {tuple(bias.shape)}; ({weight.shape[0]},) was expected.")
    if chunk_rows is not None and chunk_rows < 1:
        raise ValueError(f"{name}: chunk_rows={chunk_rows} was given; it must be at least 1, or None.")
