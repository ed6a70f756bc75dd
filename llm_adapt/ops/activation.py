"""Activations of an ungated MLP. x [..., H], bias [H] or of the shape of x, weights [..., 1] = one factor a row."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["FUNCTIONS", "activation", "check_bias", "check_weights", "fewer_rows"]

_FEW = 2**18  # elements of the main tensor that a proof of a large call keeps


def _gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x * x * x)))


def _quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def _silu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def _relu_squared(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


# Written out, not torch.nn.functional: some devices compute the tanh form whatever F.gelu is asked for.
FUNCTIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "quick_gelu": _quick_gelu,
    "relu": torch.relu,
    "relu_squared": _relu_squared,
    "sigmoid": torch.sigmoid,
    "silu": _silu,
}


def fewer_rows(arguments: dict[str, Any], main: str, **columns: int) -> dict[str, Any]:
    """The same call with fewer rows.

    Args:
        main: the tensor whose axes before the last are narrowed, the longest first, until few elements are left.
        columns: tensor -> number of its axes, the last ones, that are no rows. Its other axes are the last axes of
            rows of the main tensor, or of size 1, and are narrowed alike.
    """
    sizes = list(arguments[main].shape)
    # Bounded by the number of axes: an axis of one row cannot be narrowed again.
    while len(sizes) > 1 and (longest := max(sizes[:-1])) > 1 and math.prod(sizes) > _FEW:
        sizes[sizes.index(longest)] = (longest + 1) // 2
    narrowed = {}
    for name, kept in ({main: 1} | columns).items():
        tensor = arguments[name]
        if tensor is not None and tensor.ndim > kept:
            part = tensor[tuple(slice(size) for size in sizes[:-1][-(tensor.ndim - kept) :])]
            narrowed[name] = part.contiguous() if tensor.is_contiguous() else part
    return arguments | narrowed


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    return fewer_rows(arguments, "x", bias=1, weights=1)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator).to(dtype)}


def check_bias(op: str, bias: torch.Tensor, sizes: torch.Size) -> None:
    """Raise ValueError unless the bias has one number a column and broadcasts to those sizes without changing them."""
    ours, theirs = tuple(bias.shape), tuple(sizes)[-bias.ndim :]
    has_columns = ours[-1:] == theirs[-1:] and 0 < bias.ndim <= len(sizes)
    if not has_columns or any(a not in (1, b) for a, b in zip(ours, theirs, strict=True)):
        raise ValueError(
            f"{op}: bias has shape {ours}; it must broadcast to {tuple(sizes)} and have its last axis. "
            "Give one number a column, or a bias of that shape."
        )


def check_weights(op: str, weights: torch.Tensor, sizes: torch.Size) -> None:
    """Raise ValueError unless there is one weight a row: [..., 1]."""
    if tuple(weights.shape) != (*sizes[:-1], 1):
        raise ValueError(
            f"{op}: weights has shape {tuple(weights.shape)}; one a row was expected, {(*sizes[:-1], 1)}. "
            "Give it a last axis of size 1."
        )


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    for function in FUNCTIONS:
        yield {"x": draw(3, 5, 32), "function": function}
        yield {"x": draw(7, 33), "bias": draw(33), "function": function}
    yield {"x": draw(7, 16), "weights": draw(7, 1), "function": "relu_squared"}
    yield {"x": draw(7, 16), "bias": draw(7, 16), "weights": draw(7, 1).float()}
    yield {"x": draw(0, 16), "bias": draw(16)}


@fused_op(inputs=_inputs, shrink=_shrink, example=_example, sizes={"GPT-3 6.7B": (1, 2048, 16384)})
def activation(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    function: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "gelu",
) -> torch.Tensor:
    """y = f(x + bias) * weights.

    function: "gelu": x/2 (1 + erf(x / sqrt 2)). "gelu_tanh": its tanh form. "quick_gelu": x sigmoid(1.702 x).
    "silu": x sigmoid(x). "relu", "relu_squared", "sigmoid". weights are router probabilities, one a row.

    Shapes: x [..., H], bias [H] or any that broadcasts to x, weights [..., 1] -> y [..., H].
    Dtypes: computed in float32 (float64 for float64 x) and rounded once; y has the dtype of x.
    Raises: ValueError for an unknown function, or a bias or weights of another shape.
    Source: Hendrycks and Gimpel 2016; So et al. 2021 (relu_squared); fused_bias_gelu and fused_weighted_squared_relu
    of Megatron-Core 0.16.1; activations.py of transformers 5.
    """
    if function not in FUNCTIONS:
        raise ValueError(f"activation: function={function!r} was asked; there are {', '.join(FUNCTIONS)}.")
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide)
    if bias is not None:
        check_bias("activation", bias, x.shape)
        y = y + bias.to(wide)
    y = FUNCTIONS[function](y)
    if weights is not None:
        check_weights("activation", weights, x.shape)
        y = y * weights.to(wide)
    return y.to(x.dtype)
