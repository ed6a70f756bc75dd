"""grouped_gemm: against a product for each expert, torch's own and that of transformers, and its guards."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.moe import _grouped_mm_fallback

from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.grouped_gemm import _shrink, grouped_gemm

TOLERANCE = {
    torch.float64: {"rtol": 1e-10, "atol": 1e-10},
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.bfloat16: {"rtol": 2.0**-6, "atol": 2.0**-4},
}


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_slices(
    x: torch.Tensor, weight: torch.Tensor, counts: list[int], bias: torch.Tensor | None = None, transposed: bool = False
) -> torch.Tensor:
    """The rows of each expert by a product of their own; zeros for the rest."""
    parts, start = [], 0
    for index, count in enumerate(counts):
        matrix = weight[index].t() if transposed else weight[index]
        product = x[start : start + count] @ matrix
        parts.append(product if bias is None else product + bias[index])
        start += count
    return torch.cat([*parts, torch.zeros(x.shape[0] - start, parts[0].shape[1], dtype=x.dtype)])


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Gradients of the inputs for one fixed gradient of the output."""
    upstream = draw(*output.shape, dtype=output.dtype, seed=9)
    return torch.autograd.grad(output, inputs, upstream, retain_graph=True)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    rest=st.integers(0, 5),
    inner=st.integers(1, 17),
    outer=st.integers(1, 17),
    dtype=st.sampled_from(list(TOLERANCE)),
    transposed=st.booleans(),
    has_bias=st.booleans(),
)
def test_each_expert_multiplies_its_own_rows(
    library: str,
    counts: list[int],
    rest: int,
    inner: int,
    outer: int,
    dtype: torch.dtype,
    transposed: bool,
    has_bias: bool,
) -> None:
    """Rows, the gradient of x, that of each weight and of each bias are those of a product for each expert."""
    if library == "torch_native" and dtype == torch.float64:
        return  # it refuses
    experts, rows = len(counts), sum(counts) + rest
    x = draw(rows, inner, dtype=dtype).requires_grad_()
    weight = draw(experts, *((outer, inner) if transposed else (inner, outer)), dtype=dtype, seed=1).requires_grad_()
    bias = draw(experts, outer, dtype=dtype, seed=2).requires_grad_() if has_bias else None
    with using(Policy(choose={"grouped_gemm": library})):
        found = grouped_gemm(x, weight, torch.tensor(counts), bias, transposed)
    expected = by_slices(x, weight, counts, bias, transposed)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, **TOLERANCE[dtype])
    inputs = (x, weight) if bias is None else (x, weight, bias)
    torch.testing.assert_close(gradients(found, *inputs), gradients(expected, *inputs), **TOLERANCE[dtype])


def test_it_is_the_product_of_transformers() -> None:
    """The fallback of transformers' grouped_mm experts gives the same rows."""
    x, weight, counts = draw(12, 6), draw(3, 6, 4), torch.tensor([4, 0, 8])
    expected = _grouped_mm_fallback(x, weight, counts.cumsum(0))
    torch.testing.assert_close(grouped_gemm(x, weight, counts), expected)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_an_expert_without_rows_has_a_gradient_of_zero(library: str) -> None:
    """Not none and not what was there: zeros, also where no expert has rows."""
    for counts in ([3, 0, 2], [0, 0, 0]):
        weight = draw(3, 4, 8).requires_grad_()
        x = draw(sum(counts), 4).requires_grad_()
        with using(Policy(choose={"grouped_gemm": library})):
            y = grouped_gemm(x, weight, torch.tensor(counts))
        assert y.shape == (sum(counts), 8)
        gradient = torch.autograd.grad(y.sum(), weight)[0]
        assert torch.equal(gradient[1], torch.zeros(4, 8))


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_rows_of_no_expert_may_hold_anything(library: str) -> None:
    """nan beyond the sum gives rows of 0, and reaches no gradient."""
    x = draw(6, 4)
    x[4:] = float("nan")
    x, weight = x.requires_grad_(), draw(2, 4, 4).requires_grad_()
    with using(Policy(choose={"grouped_gemm": library})):
        y = grouped_gemm(x, weight, torch.tensor([1, 3]))
    assert torch.equal(y[4:], torch.zeros(2, 4))
    dx, dweight = torch.autograd.grad(y.sum(), (x, weight))
    assert torch.equal(dx[4:], torch.zeros(2, 4))
    assert torch.isfinite(dweight).all()


def test_a_proof_of_a_large_call_is_made_small() -> None:
    """shrink keeps the form: fewer experts, rows and columns, with rows of no expert where there were some."""
    counts = torch.tensor([100, 0, 7, *[50] * 9])
    arguments = {"x": draw(600, 300), "weight": draw(12, 280, 300), "tokens_per_expert": counts}
    small = _shrink(arguments | {"bias": draw(12, 280), "transposed": True})
    assert small["tokens_per_expert"].tolist() == [32, 0, 7, 32, 32, 32, 32, 32]
    assert small["x"].shape == (199 + 4, 256)
    assert small["weight"].shape == (8, 256, 256)
    assert grouped_gemm(**small).shape == (203, 256)


def test_flags_change_the_result() -> None:
    """A square weight is multiplied from the side that was asked, and the bias is added."""
    x, weight, counts = draw(5, 4), draw(2, 4, 4), torch.tensor([2, 3])
    plain = grouped_gemm(x, weight, counts)
    assert not torch.equal(plain, grouped_gemm(x, weight, counts, transposed=True))
    assert not torch.equal(plain, grouped_gemm(x, weight, counts, torch.ones(2, 4)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 4)}, ValueError, "expected"),
        ({"weight": torch.zeros(4, 5)}, ValueError, "expected"),
        ({"weight": torch.zeros(2, 5, 4)}, ValueError, "do not fit"),
        ({"transposed": True}, ValueError, "do not fit"),
        ({"tokens_per_expert": torch.zeros(3).long()}, ValueError, "do not fit"),
        ({"bias": torch.zeros(2, 4)}, ValueError, "bias"),
        ({"tokens_per_expert": torch.zeros(2)}, TypeError, "integers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], error: type[Exception], message: str) -> None:
    """A wrong shape or dtype is an error that names it."""
    arguments = {"x": torch.zeros(3, 4), "weight": torch.zeros(2, 4, 5), "tokens_per_expert": torch.tensor([1, 2])}
    with pytest.raises(error, match=message):
        grouped_gemm(**(arguments | change))
