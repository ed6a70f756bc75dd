"""Megatron's fused activations by the operators glu, activation and dropout_add.

Letters: T tokens, F width of the MLP; x [T, F], or [T, 2F] with the gate first; bias as x or one row of it;
weights [T, 1] = router probabilities. Tokens may stand on two axes, [S, B].

Megatron fuses these with torch.compile on CUDA and not at all elsewhere, in the dtype of x. The operators compute in
float32 and round once. What they do not compute goes to Megatron's own function: inputs stored in FP8 or offloaded, a
clamp before the bias, and shapes that these functions do not take.

An MLP whose config does not ask for fusion (bias_activation_fusion) keeps its own code: there the user chose it, and
its activation is any function. Where the config asks for TransformerEngine's activations, these are not called.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam, telling
from llm_adapt.patching import Row

__all__ = [
    "bias_dropout_add",
    "bias_geglu",
    "bias_gelu",
    "bias_swiglu",
    "rows",
    "weighted_quick_geglu",
    "weighted_squared_relu",
    "weighted_swiglu",
]

Function = Callable[..., torch.Tensor]
Told = Callable[[], None]

_BODIES = {
    "bias_swiglu_impl": {"0.12": "c9f0733ba9c8", "0.13 to 0.19": "99d8433e1740"},
    "weighted_bias_swiglu_impl": {"0.12 to 0.19": "235bf5731056"},
    "bias_geglu_impl": {"0.12 to 0.19": "0c72872df379"},
    "weighted_bias_quick_geglu_impl": {"0.15 to 0.19": "0888446b5efa"},
    "weighted_squared_relu_impl": {"0.14 to 0.19": "4f4ba1849061"},
    "_bias_dropout_add_func": {"0.12": "623656826f39", "0.13 to 0.16": "6b5c089f3fba", "0.17 to 0.19": "2a838b7431d6"},
}


def rows(context: Context) -> list[Row]:
    """One row for each fused function; none with ops="off"."""
    if not context.serves_operators:
        return []
    table: list[tuple[str, Callable[[Function, Told], Function], str]] = [
        ("bias_swiglu:bias_swiglu_impl", bias_swiglu, "operator glu; inputs stored in FP8 or offloaded stay"),
        ("bias_swiglu:weighted_bias_swiglu_impl", weighted_swiglu, "operator glu; inputs stored in FP8 stay"),
        ("bias_geglu:bias_geglu_impl", bias_geglu, "operator glu, gelu in its tanh form"),
        (
            "bias_geglu:weighted_bias_quick_geglu_impl",
            weighted_quick_geglu,
            "operator glu; inputs stored in FP8, and a clamp with a bias, stay",
        ),
        ("bias_gelu:bias_gelu_impl", bias_gelu, "operator activation, gelu in its tanh form"),
        ("weighted_squared_relu:weighted_squared_relu_impl", weighted_squared_relu, "operator activation"),
        (
            "bias_dropout:_bias_dropout_add_func",
            bias_dropout_add,
            "operator dropout_add, drawing from the generator in force; another dtype of the residual stays",
        ),
    ]
    return [
        seam(f"megatron.core.fusions.fused_{target}", telling(context, target, new), reason, bodies=_BODIES.get(name))
        for target, new, reason in table
        for name in (target.partition(":")[2],)
    ]


def bias_swiglu(original: Function, told: Told) -> Function:
    """`bias_swiglu_impl`: silu(gate + bias) * (linear + bias)."""
    from llm_adapt.ops.glu import glu

    @functools.wraps(original)
    def bias_swiglu_impl(
        input: torch.Tensor,
        bias: torch.Tensor | None,
        fp8_input_store: bool = False,
        cpu_offload_input: bool = False,
    ) -> torch.Tensor:
        if fp8_input_store or cpu_offload_input or not _fits(input, bias):
            told()
            offload = {"cpu_offload_input": cpu_offload_input} if cpu_offload_input else {}  # unknown to 0.12
            return original(input, bias, fp8_input_store, **offload)
        return _in_rows(input, lambda x: glu(x, bias=bias))

    return bias_swiglu_impl


def weighted_swiglu(original: Function, told: Told) -> Function:
    """`weighted_bias_swiglu_impl`: silu(gate) * linear * weights; a bias is refused by the original."""
    from llm_adapt.ops.glu import glu

    @functools.wraps(original)
    def weighted_bias_swiglu_impl(
        input: torch.Tensor,
        bias: torch.Tensor | None,
        weights: torch.Tensor,
        fp8_input_store: bool = False,
    ) -> torch.Tensor:
        if fp8_input_store or bias is not None or not _fits(input, None, weights):
            told()
            return original(input, bias, weights, fp8_input_store)
        return _in_rows(input, lambda x: glu(x, weights=weights))

    return weighted_bias_swiglu_impl


def bias_geglu(original: Function, told: Told) -> Function:
    """`bias_geglu_impl`: gelu(gate + bias) * (linear + bias), gelu in its tanh form."""
    from llm_adapt.ops.glu import glu

    @functools.wraps(original)
    def bias_geglu_impl(input: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if not _fits(input, bias):
            told()
            return original(input, bias)
        return _in_rows(input, lambda x: glu(x, bias=bias, activation="gelu_tanh"))

    return bias_geglu_impl


def weighted_quick_geglu(original: Function, told: Told) -> Function:
    """`weighted_bias_quick_geglu_impl`: quick_gelu(gate + bias) * (linear + bias + offset) * weights.

    Megatron clamps before it adds the bias, and the operator after, so with both the original is called.
    """
    from llm_adapt.ops.glu import glu

    @functools.wraps(original)
    def weighted_bias_quick_geglu_impl(
        input: torch.Tensor,
        bias: torch.Tensor | None,
        weights: torch.Tensor,
        fp8_input_store: bool = False,
        linear_offset: float = 0.0,
        clamp_value: float | None = None,
    ) -> torch.Tensor:
        is_clamped_first = clamp_value is not None and (bias is not None or not clamp_value > 0)
        if fp8_input_store or is_clamped_first or not _fits(input, bias, weights):
            told()
            return original(input, bias, weights, fp8_input_store, linear_offset, clamp_value)

        def quick_geglu(x: torch.Tensor) -> torch.Tensor:
            options = {"activation": "quick_gelu", "limit": clamp_value, "up_offset": linear_offset}
            return glu(x, bias=bias, weights=weights, **options)  # type: ignore[arg-type]

        return _in_rows(input, quick_geglu)

    return weighted_bias_quick_geglu_impl


def bias_gelu(original: Function, told: Told) -> Function:
    """`bias_gelu_impl`: gelu(x + bias), gelu in its tanh form."""
    from llm_adapt.ops.activation import activation

    # Not functools.wraps: the original is a method of a class that is not replaced.
    def bias_gelu_impl(input: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        if bias is None or bias.dtype != input.dtype or not _is_bias(bias, input.shape):
            told()
            return original(input, bias)
        return activation(input, bias, function="gelu_tanh")

    return bias_gelu_impl


def weighted_squared_relu(original: Function, told: Told) -> Function:
    """`weighted_squared_relu_impl`: relu(x)^2 * weights."""
    from llm_adapt.ops.activation import activation

    @functools.wraps(original)
    def weighted_squared_relu_impl(input: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        if not _fits(input, None, weights):
            told()
            return original(input, weights)
        return _in_rows(input, lambda x: activation(x, weights=weights, function="relu_squared"))

    return weighted_squared_relu_impl


def bias_dropout_add(original: Function, told: Told) -> Function:
    """`_bias_dropout_add_func`: residual + dropout(x + bias), the dropout only in training.

    What is dropped is drawn as torch's dropout draws it: from the device's generator in the state that Megatron has
    put it in, its tracker's with sequence parallelism and the default one without. So the ranks that hold copies of x
    drop the same of it, and recompute, which puts that state back, drops the same again.

    Megatron's own code rounds after each step, and in evaluation writes into x, which nothing reads afterwards.
    Versions differ in which of two dtypes the result has; one of them is asked only where the two are the same.
    """
    from llm_adapt.ops.dropout_add import dropout_add

    @functools.wraps(original)
    def _bias_dropout_add_func(
        x_with_bias: tuple[torch.Tensor, torch.Tensor | None], residual: torch.Tensor, prob: float, training: bool
    ) -> torch.Tensor:
        x, bias = x_with_bias
        fits = x.shape == residual.shape and x.dtype == residual.dtype
        if not fits or (bias is not None and not (bias.dtype == x.dtype and _is_bias(bias, x.shape))):
            told()
            return original(x_with_bias, residual, prob, training)
        return dropout_add(x, residual, bias, p=prob if training else 0.0)

    return _bias_dropout_add_func


def _fits(x: torch.Tensor, bias: torch.Tensor | None, weights: torch.Tensor | None = None) -> bool:
    """Whether the shapes are those that Megatron's function takes, which sees rows, and the operator too."""
    if x.ndim not in (2, 3):
        return False
    sizes = torch.Size((x.shape[:-1].numel(), x.shape[-1]))
    if bias is not None and not (bias.dtype == x.dtype and _is_bias(bias, sizes)):
        return False
    return weights is None or tuple(weights.shape) == (sizes[0], 1)


def _is_bias(bias: torch.Tensor, sizes: torch.Size) -> bool:
    """Whether it has one number a column, and adding it to a tensor of these sizes keeps them."""
    if not 0 < bias.ndim <= len(sizes) or bias.shape[-1] != sizes[-1]:
        return False
    return all(a in (1, b) for a, b in zip(bias.shape, sizes[-bias.ndim :], strict=True))


def _in_rows(x: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Apply to [T, ...], which is how Megatron's functions see bias and weights."""
    if x.ndim == 2:
        return function(x)
    y = function(x.reshape(-1, x.shape[-1]))
    return y.view(*x.shape[:-1], y.shape[-1])
