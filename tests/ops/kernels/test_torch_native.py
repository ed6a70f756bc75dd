"""Kernels of torch that compute block by block or ahead of time, beside the references that they must equal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.dispatch.registry import all_ops
from llm_adapt.ops.kernels.torch_native import dropout, losses, low_precision, optimizer, products


def reference(name: str) -> Callable[..., Any]:
    """The specification of an op."""
    return all_ops()[name].reference


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(1, 40),
    block=st.sampled_from([1, 64, 2**19]),
    exponent=st.sampled_from([-142, -126, 0, 90]),
    smooth=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_rows_are_rounded_bit_for_bit(
    rows: int, columns: int, block: int, exponent: int, smooth: bool, dtype: torch.dtype
) -> None:
    """Integers and scales are the reference's, for blocks of any size, rows of zeros and subnormal rows."""
    x = (draw(rows, columns) * 2.0**exponent).to(dtype)
    x[1::3] = 0
    scale = draw(columns, seed=1).abs() if smooth else None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(low_precision, "_BLOCK", block)
        found = low_precision.quantize_int8(x, scale)
    for ours, theirs in zip(found, reference("quantize_int8")(x, scale), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no product of bfloat16")
@pytest.mark.parametrize("accumulate", [True, False])
def test_a_float32_main_grad_takes_16_bits_of_a_product(accumulate: bool) -> None:
    """Off by 2^-16 of the product at most, where one product in bfloat16 is off by 2^-9 of it."""
    x, dy = draw(512, 96, dtype=torch.bfloat16), draw(512, 128, dtype=torch.bfloat16, seed=1)
    before = draw(128, 96, seed=2)
    found = before.clone()
    products.wgrad_accumulate(x, dy, found, accumulate)
    product = dy.double().t() @ x.double()
    error = (found.double() - (before.double() if accumulate else 0.0) - product).abs()
    assert (error <= 2.0**-16 * product.abs() + 1e-4).all()
    assert error.max() < 0.01 * (product.to(torch.bfloat16).double() - product).abs().max()


def test_norms_of_16_bits_are_those_of_all_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The norm has the precision of float32, of tensors that are longer than a part and shorter."""
    monkeypatch.setattr(optimizer, "_PART", 64)
    tensors = [draw(300, dtype=torch.bfloat16), draw(5, 7, dtype=torch.bfloat16, seed=1), torch.empty(0).bfloat16()]
    found = optimizer.multi_tensor_l2norm(tensors)
    expected = torch.cat([tensor.double().reshape(-1) for tensor in tensors]).norm()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16, torch.float16])
def test_scaling_rounds_once(given_dtype: torch.dtype, wanted: torch.dtype) -> None:
    """From any dtype to any other the numbers are the reference's, also where the lists are one list."""
    tensors = [draw(7, 9, dtype=given_dtype), draw(3, dtype=given_dtype, seed=1)]
    outputs, expected = ([torch.empty_like(t, dtype=wanted) for t in tensors] for _ in range(2))
    factor = torch.tensor(0.75)
    optimizer.multi_tensor_scale(tensors, outputs, factor, scale=0.3125)
    reference("multi_tensor_scale")(tensors, expected, factor, scale=0.3125)
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if wanted == torch.float32 else 0, atol=0)
    same = [tensor.clone() for tensor in tensors]
    optimizer.multi_tensor_scale(same, same, scale=0.5)
    assert all(torch.equal(ours, tensor * 0.5) for ours, tensor in zip(same, tensors, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 33),
    p=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_dropout_drops_what_frameworks_drop(rows: int, columns: int, p: float, dtype: torch.dtype) -> None:
    """From one state of the generator, the elements that the reference keeps, their gradients, and the state after."""
    found = {}
    for name, function in (("ours", dropout.dropout_add), ("reference", reference("dropout_add"))):
        x, residual = (draw(rows, columns, dtype=dtype, seed=seed).requires_grad_() for seed in (0, 1))
        bias = draw(columns, dtype=dtype, seed=2).requires_grad_()
        torch.manual_seed(7)
        y = function(x, residual, bias, p)
        state = torch.get_rng_state()
        found[name] = (y, *torch.autograd.grad(y, (x, residual, bias), draw(rows, columns, dtype=dtype, seed=3)), state)
    rounding = {"rtol": 2.0**-6, "atol": 2.0**-4} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    for ours, wanted in zip(found["ours"], found["reference"], strict=True):
        torch.testing.assert_close(ours, wanted, **(rounding if ours.is_floating_point() else {}))
    assert torch.equal(found["ours"][1] != 0, found["reference"][1] != 0)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(1, 9),
    chunk_rows=st.sampled_from([None, 1, 4]),
    reduction=st.sampled_from(["mean", "sum"]),
    options=st.sampled_from(
        [{}, {"label_smoothing": 0.1}, {"logit_scale": 0.5, "logit_softcap": 2.0}, {"ignore_index": 3}]
    ),
    ignored=st.sampled_from(["none", "some", "all"]),
    weighted=st.booleans(),
    wanted=st.sampled_from([("hidden",), ("weight", "bias"), ("hidden", "weight", "bias"), ()]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_gradients_ahead_are_those_of_the_loss(
    rows: int,
    chunk_rows: int | None,
    reduction: str,
    options: dict[str, Any],
    ignored: str,
    weighted: bool,
    wanted: tuple[str, ...],
    dtype: torch.dtype,
) -> None:
    """Loss and gradients are the reference's for any upstream gradient, chunk, option and choice of inputs."""
    given = {"hidden": draw(rows, 8, dtype=dtype), "weight": draw(11, 8, dtype=dtype, seed=1)}
    given["bias"] = draw(11, dtype=dtype, seed=2)
    inputs = [given[name].requires_grad_() for name in wanted]
    target = torch.arange(rows) % 11
    if ignored != "none":
        target[:: 1 if ignored == "all" else 3] = options.get("ignore_index", -100)
    more = {"reduction": reduction, "chunk_rows": chunk_rows, **options}
    if weighted:
        more["class_weight"] = draw(11, seed=3).abs() + 0.5
    found, z = losses.fused_linear_cross_entropy(given["hidden"], given["weight"], target, given["bias"], **more)
    expected, _ = reference("fused_linear_cross_entropy")(
        given["hidden"], given["weight"], target, given["bias"], **more
    )
    tolerance = {"rtol": 2.0**-5, "atol": 2.0**-5} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)
    assert not z.requires_grad
    if wanted:
        ours, theirs = (torch.autograd.grad(loss * 3.0, inputs) for loss in (found, expected))
        torch.testing.assert_close(ours, theirs, equal_nan=True, **tolerance)
