"""RMSNorm in Triton, alone and of a sum. Rows of H columns; h = x or x + residual, r = 1 / sqrt(mean(h^2) + eps).

With g = dy w: dh = r (g - h r mean(g h) r), and dw = sum of dy h r over the rows. The backward computes r again. dw is
summed over rows by each program, then over programs: no atomics, so the same bits each time on one kind of device.
"""
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

from typing import Any

import torch
import triton
import triton.language as tl
from torch.autograd.function import once_differentiable

from llm_adapt.ops.add_rms_norm import RESULT_DTYPES as SUM_RESULT_DTYPES
from llm_adapt.ops.add_rms_norm import ResultDtype as SumResultDtype
from llm_adapt.ops.autograd import Function
from llm_adapt.ops.kernels.triton.library import block_of, launch, programs_at_once, rows_of, triton_kernel
from llm_adapt.ops.kernels.triton.row_sums import added_up, sums_of_products
from llm_adapt.ops.rms_norm import FORMS, RESULT_DTYPES, Form, ResultDtype, check_norm, result_of

__all__ = ["add_rms_norm", "rms_norm"]

_SOURCE = "our own; Zhang and Sennrich 2019, equation 4"
_STAGES = 4  # rows of the backward that are read ahead, and the one in hand


@triton.jit
def _weight_at(weight, at, is_column, FORM: tl.constexpr):
    """The factor of these columns in float32."""
    w = tl.load(weight + at, mask=is_column, other=0.0)
    if FORM == "one_plus_rounded":
        w = (w.to(tl.float32) + 1.0).to(weight.dtype.element_ty)
    w = w.to(tl.float32)
    if FORM == "one_plus":
        w = w + 1.0
    return w


@triton.jit
def _sum_at(x, residual, h, at, is_column, HAS_RESIDUAL: tl.constexpr):
    """h of these columns as it is stored, in float32."""
    value = tl.load(x + at, mask=is_column, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        value = value + tl.load(residual + at, mask=is_column, other=0.0).to(tl.float32)
        value = value.to(h.dtype.element_ty).to(tl.float32)
    return value


@triton.jit
def _write(value, r, weight, y, h, at, is_column, FORM: tl.constexpr, HAS_RESIDUAL: tl.constexpr):
    """Norm these columns of h, and store them; y and h point to their rows."""
    if HAS_RESIDUAL:
        tl.store(h + at, value.to(h.dtype.element_ty), mask=is_column)
    value = value * r
    if FORM == "cast_first":
        value = value.to(h.dtype.element_ty).to(tl.float32)
    if FORM != "none":
        value = value * _weight_at(weight, at, is_column, FORM)
    tl.store(y + at, value.to(y.dtype.element_ty), mask=is_column)


@triton.jit
def _forward(
    x,
    residual,
    weight,
    y,
    h,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    FORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows that one block holds, several at a time where they are short."""
    at = tl.arange(0, BLOCK)[None, :]
    for first in range(tl.program_id(0).to(tl.int64) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)[:, None]
        is_there = (row < rows) & (at < columns)
        residual_row = residual
        if HAS_RESIDUAL:
            residual_row = residual + row * residual_stride
        value = _sum_at(x + row * x_stride, residual_row, h, at, is_there, HAS_RESIDUAL)
        r = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)[:, None]
        _write(value, r, weight, y + row * columns, h + row * columns, at, is_there, FORM, HAS_RESIDUAL)


@triton.jit
def _forward_of_long(
    x,
    residual,
    weight,
    y,
    h,
    rows,
    columns,
    x_stride,
    residual_stride,
    eps,
    FORM: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows of several blocks, read twice, one at a time."""
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        x_row, residual_row = x + row * x_stride, residual
        if HAS_RESIDUAL:
            residual_row = residual + row * residual_stride
        squares = tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = _sum_at(x_row, residual_row, h, at, at < columns, HAS_RESIDUAL)
            squares += value * value
        r = tl.rsqrt(tl.sum(squares, 0) / columns + eps)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            # h is added up again: what was just stored may not be read back without a barrier.
            value = _sum_at(x_row, residual_row, h, at, at < columns, HAS_RESIDUAL)
            _write(value, r, weight, y + row * columns, h + row * columns, at, at < columns, FORM, HAS_RESIDUAL)


@triton.jit
def _backward(
    h,
    weight,
    dy,
    dh,
    dx,
    parts,
    rows,
    columns,
    h_stride,
    dy_stride,
    dh_stride,
    eps,
    FORM: tl.constexpr,
    HAS_DH: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows that one block holds: each number is read once, and the next rows while these are summed."""
    at = tl.arange(0, BLOCK)[None, :]
    is_column = at < columns
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if FORM != "none":
        w = _weight_at(weight, at, is_column, FORM)
    begin, step = tl.program_id(0).to(tl.int64) * ROWS, tl.num_programs(0) * ROWS
    for first in tl.range(begin, rows, step, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)[:, None]
        is_there = (row < rows) & is_column
        value = tl.load(h + row * h_stride + at, mask=is_there, other=0.0).to(tl.float32)
        g = tl.load(dy + row * dy_stride + at, mask=is_there, other=0.0).to(tl.float32)
        r = tl.rsqrt(tl.sum(value * value, 1) / columns + eps)[:, None]
        n = value * r
        if WANTS_WEIGHT:
            total += g * n
        if FORM != "none":
            g = g * w
        gradient = r * (g - n * (tl.sum(g * n, 1)[:, None] / columns))
        if HAS_DH:
            gradient += tl.load(dh + row * dh_stride + at, mask=is_there, other=0.0).to(tl.float32)
        tl.store(dx + row * columns + at, gradient.to(dx.dtype.element_ty), mask=is_there)
    if WANTS_WEIGHT:
        columns_at = tl.arange(0, BLOCK)
        tl.store(parts + tl.program_id(0) * columns + columns_at, tl.sum(total, 0), mask=columns_at < columns)


@triton.jit
def _backward_of_long(
    h,
    weight,
    dy,
    dh,
    dx,
    rstd,
    rows,
    columns,
    h_stride,
    dy_stride,
    dh_stride,
    eps,
    FORM: tl.constexpr,
    HAS_DH: tl.constexpr,
    WANTS_WEIGHT: tl.constexpr,
    STAGES: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Of rows of several blocks, read twice, one at a time. r is stored for the gradient of the weight."""
    for row in range(tl.program_id(0).to(tl.int64), rows, tl.num_programs(0)):
        h_row, dy_row = h + row * h_stride, dy + row * dy_stride
        squares, products = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            value = tl.load(h_row + at, mask=at < columns, other=0.0).to(tl.float32)
            g = tl.load(dy_row + at, mask=at < columns, other=0.0).to(tl.float32)
            if FORM != "none":
                g = g * _weight_at(weight, at, at < columns, FORM)
            squares += value * value
            products += value * g
        r = tl.rsqrt(tl.sum(squares, 0) / columns + eps)
        mean = tl.sum(products, 0) * r / columns
        if WANTS_WEIGHT:
            tl.store(rstd + row, r)
        for start in range(0, columns, BLOCK):
            at = start + tl.arange(0, BLOCK)
            n = tl.load(h_row + at, mask=at < columns, other=0.0).to(tl.float32) * r
            g = tl.load(dy_row + at, mask=at < columns, other=0.0).to(tl.float32)
            if FORM != "none":
                g = g * _weight_at(weight, at, at < columns, FORM)
            gradient = r * (g - n * mean)
            if HAS_DH:
                gradient += tl.load(dh + row * dh_stride + at, mask=at < columns, other=0.0).to(tl.float32)
            tl.store(dx + row * columns + at, gradient.to(dx.dtype.element_ty), mask=at < columns)


def _normed(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    form: str,
    result: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and h; h is x itself without a residual."""
    y = x.new_empty(x.shape, dtype=result)
    h, rows = x, rows_of(x)
    added = None if residual is None else rows_of(residual)
    if residual is not None:
        h = x.new_empty(x.shape, dtype=torch.promote_types(x.dtype, residual.dtype))
    tile, is_whole = _tile_of(rows)
    launch(
        _forward if is_whole else _forward_of_long,
        -(-rows.shape[0] // tile["ROWS"]),
        rows,
        added,
        None if weight is None else weight.contiguous(),
        y,
        h,
        *rows.shape,
        rows.stride(0),
        0 if added is None else added.stride(0),
        eps,
        FORM="none" if weight is None else form,
        HAS_RESIDUAL=added is not None,
        **tile,
    )
    return y, h


def _gradients(
    h: torch.Tensor,
    weight: torch.Tensor | None,
    dy: torch.Tensor,
    dh: torch.Tensor | None,
    eps: float,
    form: str,
    wants_weight: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of h, the incoming one added, and of the weight."""
    rows, dy_rows = rows_of(h), rows_of(dy)
    dh_rows = None if dh is None else rows_of(dh)
    number, columns = rows.shape
    tile, is_whole = _tile_of(rows)
    wants_weight = wants_weight and weight is not None
    dx = h.new_empty(h.shape)
    programs = min(-(-number // tile["ROWS"]), programs_at_once(h.device)) if is_whole else number
    kept = rows.new_empty((programs, columns) if is_whole else (number,), dtype=torch.float32) if wants_weight else None
    launch(
        _backward if is_whole else _backward_of_long,
        programs,
        rows,
        None if weight is None else weight.contiguous(),
        dy_rows,
        dh_rows,
        dx,
        kept,
        number,
        columns,
        rows.stride(0),
        dy_rows.stride(0),
        0 if dh_rows is None else dh_rows.stride(0),
        eps,
        FORM="none" if weight is None else form,
        HAS_DH=dh is not None,
        WANTS_WEIGHT=wants_weight,
        STAGES=_STAGES,
        **tile,
    )
    if weight is None or kept is None:
        return dx, None
    parts = kept if is_whole else sums_of_products(rows, dy_rows, kept, tile["BLOCK"])
    return dx, added_up(parts, weight.dtype)


def _tile_of(rows: torch.Tensor) -> tuple[dict[str, int], bool]:
    """What a program holds at a time, and whether that is whole rows; of a GPU more than of an NPU's vector core."""
    block = block_of(rows.shape[1], 8192 if rows.device.type == "cuda" else 4096)
    number = max(4096 // block, 1)
    return {"ROWS": number, "BLOCK": block, "block": number * block}, rows.shape[1] <= block


class _RMSNorm(Function):
    @staticmethod
    def forward(
        x: torch.Tensor, weight: torch.Tensor | None, eps: float, form: str, result: torch.dtype
    ) -> torch.Tensor:
        return _normed(x, None, weight, eps, form, result)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        x, weight, ctx.eps, ctx.form, _ = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dw = _gradients(x, weight, dy, None, ctx.eps, ctx.form, ctx.needs_input_grad[1])
        return dx, dw, None, None, None


class _AddRMSNorm(Function):
    @staticmethod
    def forward(
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor | None,
        eps: float,
        form: str,
        result: torch.dtype,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _normed(x, residual, weight, eps, form, result)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
        x, residual, weight, ctx.eps, ctx.form, _ = inputs
        ctx.dtypes = x.dtype, residual.dtype
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1], weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor | None, dh: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        h, weight = ctx.saved_tensors
        dx, dw = dh, None
        if dy is not None:
            dx, dw = _gradients(h, weight, dy, dh, ctx.eps, ctx.form, ctx.needs_input_grad[2])
        if dx is None:
            return None, None, None, None, None, None
        return dx.to(ctx.dtypes[0]), dx.to(ctx.dtypes[1]), dw, None, None, None


@triton_kernel("rms_norm", _SOURCE)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """One kernel forward; backward one, and a second for the weight where a row is longer than a block."""
    check_norm("rms_norm", x, {"form": (form, FORMS), "result_dtype": (result_dtype, RESULT_DTYPES)}, weight=weight)
    y: torch.Tensor = _RMSNorm.apply(x, weight, eps, form, result_of(result_dtype, x.dtype, weight))
    return y


@triton_kernel("add_rms_norm", _SOURCE)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: SumResultDtype = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernels of rms_norm, which add as they read; the gradient of h is added as dx is written."""
    options = {"form": (form, FORMS), "result_dtype": (result_dtype, SUM_RESULT_DTYPES)}
    check_norm("add_rms_norm", x, options, weight=weight)
    if residual.shape != x.shape:
        raise ValueError(f"add_rms_norm: x has shape {tuple(x.shape)}, residual {tuple(residual.shape)}; pass equals.")
    h_dtype = torch.promote_types(x.dtype, residual.dtype)
    result = x.dtype if result_dtype == "x" else result_of(result_dtype, h_dtype, weight)
    found: tuple[torch.Tensor, torch.Tensor] = _AddRMSNorm.apply(x, residual, weight, eps, form, result)
    return found
