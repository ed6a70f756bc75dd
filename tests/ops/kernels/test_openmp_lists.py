"""Norms of lists of 16-bit tensors: float32 digits, the same bits for any number of threads, nan and inf not hidden."""

from __future__ import annotations

import math

import pytest
import torch

from llm_adapt.ops.dispatch.registry import all_ops, load_library

pytestmark = pytest.mark.skipif(bool(all_ops() and load_library("openmp")), reason="the openmp kernels cannot be built")


def norm(tensors: list[torch.Tensor]) -> float:
    """The norm of our kernel."""
    return float(all_ops()["multi_tensor_l2norm"].kernels["openmp"].function(tensors))


def drawn(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [0, 1, 1023, 1025, 300_001])
def test_the_norm_has_the_digits_of_float32(count: int, dtype: torch.dtype) -> None:
    """Of any length, where torch's own norm has those of 16 bits; with one thread and with two."""
    tensors = [drawn(count, dtype=dtype), drawn(7, 3, dtype=torch.float32)]
    expected = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(norm(tensors))
    finally:
        torch.set_num_threads(before)
    assert found[0] == found[1] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows(value: float) -> None:
    """One such element makes the norm such a number."""
    tensor = drawn(5000)
    tensor[4321] = value
    assert str(norm([tensor])) == str(value)


def test_clipping_scales_in_place_by_the_exact_norm() -> None:
    """Gradients become those of norm max_norm, each rounded once; below it they stay."""
    clip = all_ops()["clip_grads"].kernels["openmp"].function
    grads = [drawn(1000), drawn(33)]
    expected = all_ops()["clip_grads"].reference([grad.clone() for grad in grads], max_norm=1.0)
    copies = [grad.clone() for grad in grads]
    assert float(clip(copies, max_norm=1.0)) == pytest.approx(float(expected), rel=1e-6)
    assert norm(copies) == pytest.approx(1.0, rel=1e-2)
    assert norm([grad.clone() for grad in grads]) > 1.0
    untouched = [grad.clone() for grad in grads]
    clip(untouched, max_norm=1e6)
    assert all(torch.equal(a, b) for a, b in zip(untouched, grads, strict=True))
