"""Activations against those of torch, transformers and Megatron-Core."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llm_adapt.ops.activation import FUNCTIONS, activation
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.dispatch.registry import load_library

reference = activation.op.reference


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """Megatron's functions are compiled; here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def same(
    theirs: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], function: str, rtol: float = 1e-12
) -> None:
    """Their function and the reference have one result and one gradient of each tensor."""
    expected = run_op(activation.op, theirs, tensors)
    found = run_op(activation.op, lambda **given: reference(**given, function=function), tensors)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=rtol, atol=rtol)


@pytest.mark.parametrize(
    ("function", "theirs"),
    [
        ("gelu", F.gelu),
        ("gelu_tanh", lambda x: F.gelu(x, approximate="tanh")),
        ("silu", F.silu),
        ("relu", F.relu),
        ("sigmoid", torch.sigmoid),
    ],
)
def test_functions_of_torch(function: str, theirs: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """gelu, gelu_tanh, silu, relu and sigmoid are torch's."""
    same(lambda x: theirs(x), {"x": 3 * draw(5, 33)}, function)


@pytest.mark.parametrize(
    ("function", "name"),
    [
        ("gelu", "gelu"),
        ("gelu", "gelu_python"),
        ("gelu_tanh", "gelu_pytorch_tanh"),
        ("gelu_tanh", "gelu_new"),
        ("quick_gelu", "quick_gelu"),
        ("relu_squared", "relu2"),
        ("silu", "swish"),
    ],
)
def test_functions_of_transformers(function: str, name: str) -> None:
    """Each function is the one that transformers has under one or several names."""
    from transformers.activations import ACT2FN

    same(lambda x: ACT2FN[name](x), {"x": 3 * draw(5, 33)}, function)


def test_bias_gelu_of_megatron() -> None:
    """gelu_tanh with a bias is Megatron's bias_gelu_impl, to the eight digits of its constants."""
    from megatron.core.fusions.fused_bias_gelu import bias_gelu_impl

    tensors = {"x": draw(7, 32), "bias": draw(32, seed=1)}
    same(lambda x, bias: bias_gelu_impl(x, bias), tensors, "gelu_tanh", 1e-7)


def test_weighted_squared_relu_of_megatron() -> None:
    """relu_squared with weights is Megatron's weighted_squared_relu_impl."""
    from megatron.core.fusions.fused_weighted_squared_relu import weighted_squared_relu_impl

    tensors = {"x": draw(7, 32), "weights": draw(7, 1, seed=1)}
    same(lambda x, weights: weighted_squared_relu_impl(x, weights), tensors, "relu_squared")


def test_large_inputs_stay_finite() -> None:
    """Far from zero every function is 0, 1 or x (or its square), never NaN."""
    x = torch.tensor([-1e4, 1e4], dtype=torch.float32)
    for function in FUNCTIONS:
        found = reference(x, function=function)
        expected = {"sigmoid": [0.0, 1.0], "relu_squared": [0.0, 1e8]}.get(function, [0.0, 1e4])
        torch.testing.assert_close(found, torch.tensor(expected))


@given(
    st.lists(st.integers(0, 5), min_size=1, max_size=3),
    st.sampled_from(sorted(FUNCTIONS)),
    st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    st.booleans(),
)
def test_shapes_strides_and_dtypes(sizes: list[int], function: str, dtype: torch.dtype, has_bias: bool) -> None:
    """Of any shape, strided or not, the result is the float64 one rounded once, and inputs stay as they were."""
    x = draw(*sizes, 2).to(dtype)[..., 0]
    bias = draw(sizes[-1], seed=1).to(dtype) if has_bias else None
    before = x.clone()
    found = reference(x, bias, function=function)
    expected = reference(x.double(), None if bias is None else bias.double(), function=function)
    assert found.dtype == dtype
    assert torch.equal(x, before)
    assert found.shape == x.shape
    torch.testing.assert_close(found, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_every_flag_changes_the_result() -> None:
    """No function is another, and bias and weights are not ignored."""
    x = draw(6, 32)
    results = [reference(x, function=name) for name in FUNCTIONS]
    results += [reference(x, draw(32, seed=1)), reference(x, weights=draw(6, 1, seed=2))]
    for index, one in enumerate(results):
        assert not any(torch.equal(one, other) for other in results[:index])


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"x": draw(2, 8), "function": "swish"}, "function='swish' was asked"),
        ({"x": draw(2, 8), "bias": draw(2, 1)}, "must broadcast"),
        ({"x": draw(8), "bias": draw(2, 8)}, "must broadcast"),
        ({"x": draw(8), "bias": torch.tensor(1.0)}, "must broadcast"),
        ({"x": draw(2, 8), "weights": draw(2)}, "one a row"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], text: str) -> None:
    """Unknown functions and shapes that do not fit are errors that say what was found."""
    with pytest.raises(ValueError, match=text):
        reference(**arguments)


def test_torch_does_not_serve_what_it_has_not() -> None:
    """torch's kernel refuses quick_gelu, weights, mixed dtypes, and the exact gelu where F.gelu is not exact."""
    import dataclasses

    from llm_adapt.ops.dispatch.call import describe

    assert load_library("torch_native") == ""
    kernel = activation.op.kernels["torch_native"]

    def reason(device: str = "cpu", **arguments: Any) -> str:
        call = describe("activation", activation.op.signature, activation.op.bind(**arguments))
        tensors = {name: facts._replace(device=device) for name, facts in call.tensors.items()}
        return refusal(activation.op, kernel, dataclasses.replace(call, tensors=tensors))

    x = draw(2, 8).bfloat16()
    assert reason(x=x) == ""
    assert reason(x=x, function="quick_gelu") == "torch has no quick_gelu"
    assert reason(x=x, weights=draw(2, 1)) == "does not honour weights"
    assert "one dtype" in reason(x=x, bias=draw(8))
    assert "tanh form" in reason("npu", x=x)
    assert reason("npu", x=x, function="gelu_tanh") == ""
