"""Megatron's fused activations by the operators, against Megatron's own in this process."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import activations
from llm_adapt.report import Report
from llm_adapt.settings import resolve
from tests.frameworks.megatron.real_megatron import (
    agree,
    calling,
    gradients,
    on_one_rank,
    reseed,
    served,
)

DTYPES = (torch.float32, torch.bfloat16)
FUSIONS = "megatron.core.fusions.fused_"


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


def function(module: str, name: str) -> Callable[..., torch.Tensor]:
    """A fused function as it is bound now."""
    return getattr(importlib.import_module(FUSIONS + module), name)  # type: ignore[no-any-return]


def draw(seed: int, *sizes: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


GATED = {
    "swiglu": ("bias_swiglu", "bias_swiglu_impl"),
    "geglu": ("bias_geglu", "bias_geglu_impl"),
}
WEIGHTED = {
    "swiglu": ("bias_swiglu", "weighted_bias_swiglu_impl", False, {}),
    "quick_geglu": ("bias_geglu", "weighted_bias_quick_geglu_impl", True, {"linear_offset": 1.0}),
    "clamped": ("bias_geglu", "weighted_bias_quick_geglu_impl", False, {"linear_offset": 1.0, "clamp_value": 0.7}),
}


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(list(GATED)),
    rows=st.sampled_from([(5,), (3, 2), (1,), (0,)]),
    width=st.integers(1, 9),
    has_bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_gated_units_are_megatrons(
    kind: str, rows: tuple[int, ...], width: int, has_bias: bool, dtype: torch.dtype, seed: int
) -> None:
    """SwiGLU and GeGLU, with a bias and without: results and gradients of Megatron's functions, by the op glu."""
    x = draw(seed, *rows, 2 * width, dtype=dtype)
    bias = draw(seed + 1, 2 * width, dtype=dtype) if has_bias else None
    expected = gradients(function(*GATED[kind]), x, bias)
    with served("activations"), calling("glu"):
        found = gradients(function(*GATED[kind]), x, bias)
    agree(found, expected, dtype)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(list(WEIGHTED)),
    rows=st.sampled_from([(6,), (3, 2)]),
    has_bias=st.booleans(),
    weights_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
def test_units_weighted_by_the_router_are_megatrons(
    kind: str, rows: tuple[int, ...], has_bias: bool, weights_dtype: torch.dtype, dtype: torch.dtype, seed: int
) -> None:
    """With one probability a token, results and the gradients of x, bias and probabilities are Megatron's."""
    module, name, takes_bias, options = WEIGHTED[kind]
    x, weights = draw(seed, *rows, 10, dtype=dtype), draw(seed + 1, 6, 1, dtype=weights_dtype)
    bias = draw(seed + 2, 6, 10, dtype=dtype) if has_bias and takes_bias else None

    def call(x: torch.Tensor, weights: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return function(module, name)(x, bias, weights, **options)

    tensors = (x, weights) if bias is None else (x, weights, bias)
    expected = gradients(call, *tensors)
    with served("activations"), calling("glu"):
        found = gradients(call, *tensors)
    # Megatron rounds the upstream gradient to the dtype of the probabilities.
    agree(found, expected, torch.bfloat16 if torch.bfloat16 in (dtype, weights_dtype) else torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(6,), (3, 2)])
def test_ungated_activations_are_megatrons(rows: tuple[int, ...], dtype: torch.dtype) -> None:
    """Bias-GeLU and the weighted squared ReLU: results and gradients of Megatron's functions, by the op activation."""
    x, bias, weights = draw(1, *rows, 8, dtype=dtype), draw(2, 8, dtype=dtype), draw(3, 6, 1, dtype=dtype)
    gelu, relu = ("bias_gelu", "bias_gelu_impl"), ("weighted_squared_relu", "weighted_squared_relu_impl")
    expected = gradients(function(*gelu), x, bias), gradients(function(*relu), x, weights)
    with served("activations"), calling("activation", 2):
        found = gradients(function(*gelu), x, bias), gradients(function(*relu), x, weights)
    for ours, theirs in zip(found, expected, strict=True):
        agree(ours, theirs, dtype)


def test_copies_of_the_names_are_served_and_come_back() -> None:
    """MLP holds copies by `from ... import`: they are replaced as well, and after undo all are Megatron's own."""
    mlp = importlib.import_module("megatron.core.transformer.mlp")
    names = ("bias_swiglu_impl", "bias_geglu_impl", "bias_gelu_impl", "weighted_bias_swiglu_impl")
    before = {name: id(getattr(mlp, name)) for name in names}
    with served("activations") as outcomes:
        status = {outcome.row.target.partition(":")[2]: outcome.status for outcome in outcomes}
        assert {status[name] for name in names} == {"applied"}
        assert not [name for name in names if id(getattr(mlp, name)) == before[name]]
    assert {name: id(getattr(mlp, name)) for name in names} == before


def fallbacks() -> dict[str, tuple[str, str, tuple[Any, ...]]]:
    """Calls that no operator computes: module, function, arguments."""
    x, bias, weights = draw(1, 6, 8, dtype=torch.float32), draw(2, 8, dtype=torch.float32), torch.ones(6, 1)
    gelu = ("bias_geglu", "weighted_bias_quick_geglu_impl")
    return {
        "swiglu of an input stored in FP8": ("bias_swiglu", "bias_swiglu_impl", (x, bias, True)),
        "weighted swiglu of an input stored in FP8": (
            "bias_swiglu",
            "weighted_bias_swiglu_impl",
            (x, None, weights, True),
        ),
        "quick geglu of an input stored in FP8": (*gelu, (x, None, weights, True)),
        "a clamp before a bias": (*gelu, (x, bias, weights, False, 1.0, 0.5)),
        "a wider bias": ("bias_swiglu", "bias_swiglu_impl", (x.bfloat16(), bias)),
        "a bias that is a column": ("bias_geglu", "bias_geglu_impl", (x, torch.randn(6, 1))),
        "a residual of another dtype": ("bias_dropout", "_bias_dropout_add_func", ((x.bfloat16(), None), x, 0.0, True)),
        "a wider bias of dropout": (
            "bias_dropout",
            "_bias_dropout_add_func",
            ((x.bfloat16(), bias), x.bfloat16(), 0.0, True),
        ),
    }


@pytest.mark.parametrize("case", fallbacks())
def test_what_no_operator_computes_is_left_to_megatron(case: str) -> None:
    """The original is called with every argument, and its result is exactly what Megatron gives."""
    module, name, arguments = fallbacks()[case]
    expected = function(module, name)(*arguments)
    with served("activations"), calling("glu", 0), calling("dropout_add", 0):
        found = function(module, name)(*arguments)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


def test_an_input_stored_in_fp8_has_the_gradient_of_what_is_stored() -> None:
    """fp8_input_store is not dropped: the gradient is that of the rounded input, as Megatron's is."""
    x = draw(1, 6, 8, dtype=torch.float32)

    def call(x: torch.Tensor) -> torch.Tensor:
        return function("bias_swiglu", "bias_swiglu_impl")(x, None, True)

    expected = gradients(call, x)
    with served("activations"):
        found = gradients(call, x)
    assert torch.equal(found[1], expected[1])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [(torch.ones(2, 2, 2, 4), None), (torch.ones(2, 4), torch.ones(4), torch.ones(2, 1))],
    ids=["four axes", "a bias of the weighted one"],
)
def test_what_megatron_refuses_is_still_refused(arguments: tuple[Any, ...]) -> None:
    """Four axes, and a bias of the weighted SwiGLU, end with Megatron's own error."""
    name = "bias_swiglu_impl" if len(arguments) == 2 else "weighted_bias_swiglu_impl"
    with served("activations"), pytest.raises((AssertionError, NotImplementedError)):
        function("bias_swiglu", name)(*arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_dropout_drops_what_megatron_drops(dtype: torch.dtype, has_bias: bool, training: bool) -> None:
    """From one state of the generator, the op drops the same elements as Megatron's code, and leaves the same state."""
    x, residual = draw(1, 4, 2, 32, dtype=dtype), draw(2, 4, 2, 32, dtype=dtype)
    bias = draw(3, 32, dtype=dtype) if has_bias else None

    def call(x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        reseed(9)
        return function("bias_dropout", "get_bias_dropout_add")(training, True)((x, bias), residual, 0.3)  # type: ignore[operator]

    tensors = (x, residual) if bias is None else (x, residual, bias)
    with torch.compiler.set_stance("force_eager"):  # compiled, Megatron's function draws other numbers
        expected = gradients(call, *tensors)
    state = torch.get_rng_state()
    with served("activations"), calling("dropout_add"):
        found = gradients(call, *tensors)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[1] == 0, expected[1] == 0)  # type: ignore[operator]
    agree(found, expected, dtype)


def test_recompute_drops_the_same() -> None:
    """Under Megatron's checkpoint the gradient is 1 / (1 - p) where the output kept x, and 0 where it did not."""
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    x = torch.ones(8, 64, requires_grad=True)
    with served("activations"):
        reseed(4)

        def block(x: torch.Tensor) -> torch.Tensor:
            return function("bias_dropout", "bias_dropout_add_unfused")(True)((x, None), torch.zeros_like(x), 0.5)  # type: ignore[operator]

        y = random.checkpoint(block, False, x)
        torch.rand(100)
        y.sum().backward()
    assert torch.equal(x.grad, y.detach())  # type: ignore[arg-type]
    assert 0.3 < float((y == 0).float().mean()) < 0.7


def test_the_compiler_traces_through() -> None:
    """torch.compile takes a served function in one graph."""
    x, bias = draw(1, 6, 8, dtype=torch.float32), draw(2, 8, dtype=torch.float32)
    weights = torch.rand(6, 1)
    with served("activations"):
        swiglu, relu = function(*GATED["swiglu"]), function("weighted_squared_relu", "weighted_squared_relu_impl")
        gelu, add = function("bias_gelu", "bias_gelu_impl"), function("bias_dropout", "_bias_dropout_add_func")

        def call(x: torch.Tensor) -> torch.Tensor:
            return add((gelu(swiglu(x, bias), bias[:4]), None), x[:, :4], 0.0, True)

        def weighted(x: torch.Tensor) -> torch.Tensor:
            return relu(x, weights)

        for traced in (call, weighted):
            compiled = torch.compile(traced, fullgraph=True, backend="eager")
            torch.testing.assert_close(compiled(x), traced(x))


def test_what_is_left_to_megatron_is_told_once() -> None:
    """The first call that an operator does not compute leaves a line in the report; the others only run."""
    context = Context(ADAPTER, resolve({}, device="cpu"), Report())
    (row,) = [row for row in activations.rows(context) if row.target.endswith("bias_gelu_impl")]
    new = row.new(lambda x, bias: "Megatron's own")  # type: ignore[union-attr]
    assert [new(torch.ones(2), None) for _ in range(2)] == ["Megatron's own"] * 2
    (line,) = context.report.lines
    assert (line.subject, line.choice) == ("megatron bias_gelu_impl", "Megatron's own")
