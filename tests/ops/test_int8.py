"""quantize_int8, dequantize_int8 and linear_int8: against torch's quantisation of tokens, and their guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.ao.quantization.fx import _decomposed  # noqa: F401 - declares torch.ops.quantized_decomposed

from llm_adapt.ops.dequantize_int8 import dequantize_int8
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.linear_int8 import _shrink, linear_int8
from llm_adapt.ops.quantize_int8 import quantize_int8

dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
leads = st.lists(st.integers(0, 4), max_size=2)


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(lead=leads, columns=st.integers(1, 70), dtype=dtypes)
def test_rows_are_rounded_as_torch_rounds_tokens(lead: list[int], columns: int, dtype: torch.dtype) -> None:
    """Scales are those of torch's choose_qparams_per_token; numbers too, but where a product and a quotient differ."""
    x = draw(*lead, columns, dtype=dtype)
    q, scale = quantize_int8(x)
    assert (q.dtype, scale.dtype) == (torch.int8, torch.float32)
    expected, zero = torch.ops.quantized_decomposed.choose_qparams_per_token(x.float(), torch.int8)
    torch.testing.assert_close(scale, expected.squeeze(-1).float())
    theirs = torch.ops.quantized_decomposed.quantize_per_token(x.float(), expected, zero, -128, 127, torch.int8)
    assert ((q.int() - theirs.int()).abs() <= 1).all()
    assert (q != theirs).float().mean() <= 0.05 or not q.numel()


@settings(max_examples=40, deadline=None)
@given(lead=leads, columns=st.integers(1, 70), dtype=dtypes)
def test_a_number_is_off_by_half_a_step_at_most(lead: list[int], columns: int, dtype: torch.dtype) -> None:
    """Back in floating point, each number is within half a scale, and the largest of a row is itself."""
    x = draw(*lead, columns, dtype=dtype)
    q, scale = quantize_int8(x)
    back = dequantize_int8(q, scale)
    assert ((back - x.float()).abs() <= scale.unsqueeze(-1) * 0.50001).all()
    assert (q.abs().amax(-1) == 127).all() or not q.numel()


def test_halves_are_rounded_to_even_and_zeros_stay() -> None:
    """q is the nearest integer, of halves the even one; a row of zeros has scale 0."""
    q, scale = quantize_int8(torch.tensor([[127.0, 0.5, 1.5, -2.5, -127.0], [0.0] * 5]))
    assert q.tolist() == [[127, 0, 2, -2, -127], [0] * 5]
    assert scale.tolist() == [1, 0]


def test_columns_are_smoothed_first() -> None:
    """smooth_scale multiplies the columns, as if x had been multiplied."""
    x, smooth = draw(3, 8), draw(8, seed=1).abs()
    for found, expected in zip(quantize_int8(x, smooth), quantize_int8(x * smooth), strict=True):
        assert torch.equal(found, expected)
    assert not torch.equal(quantize_int8(x, smooth)[0], quantize_int8(x)[0])


@pytest.mark.parametrize("library", ["reference", "torch_native"])
@settings(max_examples=25, deadline=None)
@given(
    lead=leads,
    inner=st.sampled_from([1, 7, 64, 1500]),
    outer=st.integers(1, 9),
    dtype=dtypes,
    has_bias=st.booleans(),
    smoothed=st.booleans(),
)
def test_the_product_is_that_of_the_integers(
    library: str, lead: list[int], inner: int, outer: int, dtype: torch.dtype, has_bias: bool, smoothed: bool
) -> None:
    """y is the exact product of the integers, scaled: also where sums pass what float32 can count."""
    if library == "torch_native" and inner == 1:
        return  # it refuses
    x = draw(*lead, inner, dtype=dtype)
    weight, weight_scale = quantize_int8(draw(outer, inner, seed=1).abs() + 1)
    bias = draw(outer, dtype=dtype, seed=2) if has_bias else None
    smooth = draw(inner, seed=3).abs() if smoothed else None
    with using(Policy(choose={"linear_int8": library})):
        found = linear_int8(x, weight, weight_scale, bias, smooth)
    q, scale = quantize_int8(x, smooth)
    expected = (q.double() @ weight.double().t()) * scale.double().unsqueeze(-1) * weight_scale.double()
    expected = expected if bias is None else expected + bias.double()
    assert found.dtype == dtype
    rtol = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=1e-5)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_sums_beyond_2_to_the_24_are_exact(library: str) -> None:
    """Large sums that cancel leave the small one: float32 alone would have lost its last digits on the way."""
    x, weight = torch.full((1, 180_001), 127.0), torch.full((1, 180_001), 127, dtype=torch.int8)
    weight[0, 60_000:] = -63
    weight[0, -1] = 1
    with using(Policy(choose={"linear_int8": library})):
        found = linear_int8(x, weight, torch.ones(1))
    assert found.item() == int((x.long() * weight.long()).sum())


def test_a_proof_of_a_large_call_is_made_small() -> None:
    """shrink keeps whole rows of x, fewer of them, and fewer outputs."""
    weight = torch.ones(300, 40, dtype=torch.int8)
    arguments = {"x": draw(4, 50, 40), "weight": weight, "weight_scale": torch.ones(300), "bias": torch.ones(300)}
    small = _shrink(arguments)
    assert [tuple(small[name].shape) for name in ("x", "weight", "weight_scale", "bias")] == [
        (64, 40),
        (256, 40),
        (256,),
        (256,),
    ]


def test_no_gradient_is_pretended() -> None:
    """Nothing that comes out asks for a gradient, whatever went in."""
    x = draw(3, 8).requires_grad_()
    weight, weight_scale = quantize_int8(draw(4, 8))
    assert not linear_int8(x, weight, weight_scale).requires_grad
    assert not quantize_int8(x)[1].requires_grad


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: quantize_int8(torch.tensor(1.0)), ValueError, "at least one column"),
        (lambda: quantize_int8(torch.zeros(2, 0)), ValueError, "at least one column"),
        (lambda: quantize_int8(torch.zeros(2, 4), torch.ones(3)), ValueError, "smooth_scale"),
        (lambda: dequantize_int8(torch.zeros(2, 4), torch.ones(2)), TypeError, "int8"),
        (lambda: dequantize_int8(torch.zeros(2, 4).to(torch.int8), torch.ones(4)), ValueError, "one for each row"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, error: type[Exception], message: str) -> None:
    """A wrong shape or dtype is an error that says which."""
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.zeros(4, 8)}, TypeError, "int8"),
        ({"x": torch.zeros(3, 7)}, ValueError, "weight_scale"),
        ({"weight_scale": torch.ones(8)}, ValueError, "weight_scale"),
        ({"bias": torch.ones(8)}, ValueError, "bias"),
        ({"smooth_scale": torch.ones(4)}, ValueError, "smooth_scale"),
    ],
    ids=str,
)
def test_the_linear_layer_refuses_what_does_not_fit(
    change: dict[str, Any], error: type[Exception], message: str
) -> None:
    """A wrong shape or dtype is an error that says which."""
    arguments = {"x": torch.zeros(3, 8), "weight": torch.zeros(4, 8, dtype=torch.int8), "weight_scale": torch.ones(4)}
    with pytest.raises(error, match=message):
        linear_int8(**(arguments | change))


@pytest.mark.parametrize("columns", [64, 5000])
def test_scales_that_are_trained_are_taken_as_numbers(columns: int) -> None:
    """linear_int8 has no gradient: a smooth_scale, weight_scale or bias that asks for one changes nothing."""
    x, weight = draw(40, columns), torch.randint(-9, 9, (8, columns)).to(torch.int8)
    given = {"weight_scale": torch.rand(8), "smooth_scale": torch.rand(columns) + 0.5, "bias": torch.rand(8)}
    with using(Policy(order=("torch_native",))):
        expected = linear_int8(x, weight, **given)  # type: ignore[arg-type]
        asked = {name: tensor.clone().requires_grad_() for name, tensor in given.items()}
        found = linear_int8(x.clone().requires_grad_(), weight, **asked)  # type: ignore[arg-type]
    assert torch.equal(found, expected)
    assert not found.requires_grad
