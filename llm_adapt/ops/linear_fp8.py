"""Linear layer in fp8, emulated. M = rows of x, K and N = columns of its input and output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.autograd import Function
from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.quantize_fp8 import spread, to_fp8

__all__ = ["linear_fp8"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 5, 48), "weight": draw(16, 48)}
    scales = {"x_scale": torch.tensor(32.0), "weight_scale": torch.tensor(64.0), "dy_scale": torch.tensor(128.0)}
    yield {"x": draw(9, 48), "weight": draw(16, 48), "bias": draw(16), **scales, "gradient_format": "e4m3"}
    yield {"x": draw(140, 136), "weight": draw(16, 136), "recipe": "block", "gradient_format": "e4m3"}
    yield {"x": draw(9, 136), "weight": draw(130, 136), "recipe": "block", "power_of_two": True}
    yield {"x": draw(0, 16), "weight": draw(16, 16)}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 256 rows and columns: whole blocks."""
    bias = arguments["bias"]
    return arguments | {
        "x": arguments["x"].reshape(-1, arguments["x"].shape[-1])[:256, :256].contiguous(),
        "weight": arguments["weight"][:256, :256].contiguous(),
        "bias": None if bias is None else bias[:256],
    }


# oracle=None: every operand is rounded, to another number where its last bit differs.
@fused_op(inputs=_inputs, differentiable=("x", "weight", "bias"), oracle=None, shrink=_shrink)
def linear_fp8(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    x_scale: torch.Tensor | None = None,
    weight_scale: torch.Tensor | None = None,
    dy_scale: torch.Tensor | None = None,
    recipe: Literal["tensor", "block"] = "tensor",
    gradient_format: Literal["e4m3", "e5m2"] = "e5m2",
    power_of_two: bool = False,
) -> torch.Tensor:
    """y = fp8(x) @ fp8(weight)^T / (scale of x * scale of weight) + bias; both operands of every product are e4m3.

    Backward: dx = fp8(dy) @ fp8(weight), dweight = fp8(dy)^T @ fp8(x), likewise, where dy is of gradient_format; the
    roundings are passed straight through. dbias = sum of dy, which is not rounded for it.
    recipe: "tensor": one scale for a tensor, x_scale, weight_scale and dy_scale (delayed scaling), or of its own amax
        where none is given. "block": 1 x 128 along the summed axis for x and dy, quantised anew for dweight along the
        rows; 128 x 128 for the weight.
    power_of_two: as of `quantize_fp8`, for the scales that are computed here.

    Shapes: x [..., K], weight [N, K], bias [N], scales [] or [1] -> y [..., N].
    Dtypes: products and sums in float32: "tensor" of the fp8 numbers, then scaled; "block" of the scaled numbers. y and
        gradients are rounded once to the dtype of x, weight and bias.
    Raises: ValueError for shapes and options that do not fit.
    Source: TransformerEngine 2 recipes DelayedScaling, Float8CurrentScaling and Float8BlockScaling; DeepSeek-V3 2024,
        section 3.3.
    """
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:]:
        raise ValueError(
            f"linear_fp8: x [..., K] and weight [N, K] were expected; found {tuple(x.shape)} and {tuple(weight.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_fp8: bias must be of shape {tuple(weight.shape[:1])}; found {tuple(bias.shape)}.")
    if recipe not in ("tensor", "block") or gradient_format not in ("e4m3", "e5m2"):
        raise ValueError(
            f"linear_fp8: recipe={recipe!r}, gradient_format={gradient_format!r} was asked; give 'tensor' or 'block', "
            "and 'e4m3' or 'e5m2'."
        )
    scales = (x_scale, weight_scale, dy_scale)
    if recipe == "block" and any(scale is not None for scale in scales):
        raise ValueError("linear_fp8: the scales of recipe='block' are found by amax; leave out those of tensors.")
    if power_of_two and all(scale is not None for scale in scales):
        raise ValueError("linear_fp8: all scales were given, and none is computed; leave power_of_two=False.")
    rows = x.reshape(-1, x.shape[-1])
    y: torch.Tensor = _Product.apply(rows, weight, *scales, recipe, gradient_format, power_of_two)
    y = y if bias is None else y + bias.float()
    return y.to(x.dtype).view(*x.shape[:-1], weight.shape[0])


class _Operand:
    """A matrix in fp8, with the axis that a product sums along last.

    Attributes:
        values: the fp8 numbers as float32, with recipe "block" times their scale.
        scale_inv: of all numbers; 1 with recipe "block".
    """

    def __init__(
        self,
        matrix: torch.Tensor,
        scale: torch.Tensor | None,
        recipe: str,
        power_of_two: bool,
        block: str = "1x128",
        form: str = "e4m3",
    ) -> None:
        block = block if recipe == "block" else "tensor"
        q, inverse, _ = to_fp8(matrix, scale, form, block, power_of_two and scale is None)
        is_block = recipe == "block"
        self.values = q.float() * spread(inverse, matrix.shape, block) if is_block else q.float()
        self.scale_inv = inverse.new_ones(()) if is_block else inverse

    def t(self) -> _Operand:
        """Transposed."""
        other = _Operand.__new__(_Operand)
        other.values, other.scale_inv = self.values.t(), self.scale_inv
        return other

    def times(self, other: _Operand) -> torch.Tensor:
        """self @ other^T in float32."""
        return (self.values @ other.values.t()) * (self.scale_inv * other.scale_inv)


class _Product(Function):
    """x @ weight^T of fp8 operands; the operands are quantised again in the backward pass, not kept."""

    @staticmethod
    def forward(
        x: torch.Tensor,
        weight: torch.Tensor,
        x_scale: torch.Tensor | None,
        weight_scale: torch.Tensor | None,
        dy_scale: torch.Tensor | None,
        recipe: str,
        gradient_format: str,
        power_of_two: bool,
    ) -> torch.Tensor:
        """y [M, N] in float32."""
        left = _Operand(x, x_scale, recipe, power_of_two)
        return left.times(_Operand(weight, weight_scale, recipe, power_of_two, "128x128"))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        """Keep the inputs as they are."""
        ctx.save_for_backward(*inputs[:5])
        ctx.options = inputs[5:]

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """dx and dweight, of dy in fp8."""
        (dy,) = gradients
        x, weight, x_scale, weight_scale, dy_scale = ctx.saved_tensors
        recipe, form, power_of_two = ctx.options
        right = _Operand(weight, weight_scale, recipe, power_of_two, "128x128")
        dx = _Operand(dy, dy_scale, recipe, power_of_two, form=form).times(right.t())
        # Along the rows of x: other blocks than above, and the same numbers where there is one scale.
        left = _Operand(dy.t(), dy_scale, recipe, power_of_two, form=form)
        dweight = left.times(_Operand(x.t(), x_scale, recipe, power_of_two))
        return dx.to(x.dtype), dweight.to(weight.dtype), None, None, None, None, None, None
