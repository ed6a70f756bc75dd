"""Bias, dropout and residual against Megatron-Core and torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.dropout_add import dropout_add

op = dropout_add.op
reference = op.reference


@pytest.fixture(autouse=True)
def eagerly() -> Iterator[None]:
    """Megatron's functions are compiled; here they run as they are written."""
    with torch.compiler.set_stance("force_eager"):
        yield


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("p", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_bias_dropout_add_of_megatron(p: float, has_bias: bool, fused: bool) -> None:
    """Without a seed it is Megatron's get_bias_dropout_add, drawn from the same stream: result and gradients."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    tensors = {"x": draw(6, 16), "residual": draw(6, 16, seed=1)}
    if has_bias:
        tensors["bias"] = draw(16, seed=2)
    theirs = get_bias_dropout_add(training=True, fused=fused)
    torch.manual_seed(5)
    expected = run_op(op, lambda x, residual, bias=None: theirs((x, bias), residual, p), tensors)
    torch.manual_seed(5)
    found = run_op(op, lambda **call: reference(**call, p=p), tensors)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_outside_training() -> None:
    """p = 0 is what Megatron computes outside training, and the inputs stay as they were."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    x, residual, bias = draw(6, 16), draw(6, 16, seed=1), draw(16, seed=2)
    before = x.clone(), residual.clone()
    found = reference(x, residual, bias)
    assert torch.equal(x, before[0])
    assert torch.equal(residual, before[1])
    theirs = get_bias_dropout_add(training=False, fused=False)
    torch.testing.assert_close(found, theirs((x.clone(), bias), residual.clone(), 0.3))


def test_the_residual_takes_the_dtype_of_x() -> None:
    """A float32 residual is rounded to the dtype of x, as Megatron does so that all stages send one dtype."""
    from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

    x, residual = draw(6, 16).bfloat16(), draw(6, 16, seed=1).float()
    found = reference(x, residual)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, get_bias_dropout_add(True, False)((x, None), residual, 0.0))


@given(st.integers(0, 5), st.integers(1, 40), st.sampled_from([0.1, 0.5, 1.0]), st.integers(-(2**63), 2**63 - 1))
def test_a_seed_drops_the_same_elements(rows: int, columns: int, p: float, seed: int) -> None:
    """With a seed the call is a function: dropped or divided by 1 - p, alike in every dtype and for strided x."""
    x, residual = draw(rows, 2 * columns)[:, ::2], draw(rows, columns, seed=1)
    state = torch.get_rng_state()
    found = reference(x, residual, p=p, seed=seed) - residual
    assert torch.equal(torch.get_rng_state(), state), "the random stream moved"
    is_kept = found != 0
    expected = torch.where(is_kept, x / (1 - p) if p < 1 else torch.zeros_like(x), 0.0)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-9)
    again = reference(x.contiguous().float(), torch.zeros(rows, columns), p=p, seed=seed)
    assert torch.equal(again != 0, is_kept)


def test_how_much_is_dropped() -> None:
    """With a seed a share p is dropped, in each row and column, and another seed drops others."""
    ones, zeros = torch.ones(512, 512), torch.zeros(512, 512)
    found = reference(ones, zeros, p=0.25, seed=1) == 0
    for share in (found.double().mean(), found.double().mean(0), found.double().mean(1)):
        # Five standard deviations of the mean of as many draws.
        draws = found.numel() // share.numel()
        assert ((share - 0.25).abs() < 5 * (0.25 * 0.75 / draws) ** 0.5).all()
    other = reference(ones, zeros, p=0.25, seed=2) == 0
    assert abs(float((found == other).double().mean()) - (0.25**2 + 0.75**2)) < 0.01


def test_gradients_with_a_seed() -> None:
    """The gradient of x and bias passes where x was kept, divided by 1 - p; the residual's passes everywhere."""
    x, residual, bias = draw(8, 8).requires_grad_(), draw(8, 8, seed=1).requires_grad_(), draw(8).requires_grad_()
    found = reference(x, residual, bias, p=0.5, seed=3)
    is_kept = (found - residual).detach() != 0
    found.sum().backward()
    torch.testing.assert_close(x.grad, 2 * is_kept.double())
    torch.testing.assert_close(bias.grad, 2 * is_kept.double().sum(0))
    torch.testing.assert_close(residual.grad, torch.ones_like(residual))


def test_every_flag_changes_the_result() -> None:
    """bias, p and seed are not ignored."""
    x, residual = draw(8, 8), draw(8, 8, seed=1)
    one, other = (reference(x, residual, p=0.5, seed=seed) for seed in (1, 2))
    results = [reference(x, residual), reference(x, residual, draw(8)), one, other, reference(x, residual, p=0.5)]
    for index, result in enumerate(results):
        assert not any(torch.equal(result, before) for before in results[:index])


def test_compiled_with_a_seed() -> None:
    """With a seed compiled code drops what eager code drops, without a graph break."""
    x, residual = draw(8, 8), draw(8, 8, seed=1)
    with torch.compiler.set_stance("default"):
        compiled = torch.compile(reference, backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x, residual, None, 0.5, 7), reference(x, residual, None, 0.5, 7))


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"p": 1.5}, "a probability lies in"),
        ({"residual": draw(1, 8)}, "must be equal"),
        ({"bias": draw(4)}, "must broadcast"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], text: str) -> None:
    """Shapes and numbers that do not fit are errors that say what was found."""
    with pytest.raises(ValueError, match=text):
        reference(**({"x": draw(2, 8), "residual": draw(2, 8)} | arguments))
