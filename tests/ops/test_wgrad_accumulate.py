"""wgrad_accumulate: against autograd and the contract of apex, its laws and its guards."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.frameworks.stand_ins.wgrad import wgrad_gemm_accum_fp16, wgrad_gemm_accum_fp32
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.wgrad_accumulate import _shrink, wgrad_accumulate


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers that are the same at each run."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("library", ["reference", "torch_native"])
@settings(max_examples=25, deadline=None)
@given(
    lead=st.lists(st.integers(0, 5), min_size=1, max_size=2),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    is_wide=st.booleans(),
)
def test_it_adds_the_gradient_of_the_weight(
    library: str, lead: list[int], inner: int, outer: int, dtype: torch.dtype, is_wide: bool
) -> None:
    """What is added is autograd's gradient of the weight of a linear layer, computed in double."""
    if library == "torch_native":
        is_wide = False  # it refuses a main_grad that is wider than x
    x, dy = draw(*lead, inner, dtype=dtype), draw(*lead, outer, dtype=dtype, seed=1)
    kept = torch.promote_types(dtype, torch.float32) if is_wide else dtype
    main_grad = draw(outer, inner, dtype=kept, seed=2)
    weight = torch.zeros(outer, inner, dtype=torch.float64, requires_grad=True)
    torch.nn.functional.linear(x.double(), weight).backward(dy.double())
    expected = (main_grad.double() + weight.grad).to(kept)
    with using(Policy(choose={"wgrad_accumulate": library})):
        assert wgrad_accumulate(x, dy, main_grad) is None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-4, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-8}[kept]
    torch.testing.assert_close(main_grad, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_keeps_the_contract_of_apex(dtype: torch.dtype) -> None:
    """The stand-ins of wgrad_gemm_accum_fp32 and _fp16 give the same sums."""
    x, dy = draw(6, 3, 5, dtype=dtype), draw(6, 3, 4, dtype=dtype, seed=1)
    for kept, function in ((torch.float32, wgrad_gemm_accum_fp32), (dtype, wgrad_gemm_accum_fp16)):
        ours, theirs = (draw(4, 5, dtype=kept, seed=2) for _ in range(2))
        wgrad_accumulate(x, dy, ours)
        function(x, dy, theirs)
        tolerance = 1e-5 if kept == torch.float32 else 2.0**-6
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def test_small_gradients_add_up() -> None:
    """A thousand gradients that bfloat16 would lose beside 1 are all there in a float32 main_grad."""
    main_grad = torch.ones(1, 1)
    x, dy = torch.full((1, 1), 2.0**-7).bfloat16(), torch.full((1, 1), 2.0**-7).bfloat16()
    for _ in range(1024):
        wgrad_accumulate(x, dy, main_grad)
    assert main_grad.item() == 1 + 1024 * 2.0**-14


@pytest.mark.parametrize("library", ["reference", "torch_native"])
def test_it_writes_where_main_grad_lies_and_nowhere_else(library: str) -> None:
    """A strided main_grad, a view of a buffer, is changed in place; without accumulate what was there is gone."""
    x, dy = draw(7, 5), draw(7, 4, seed=1)
    buffer = torch.full((2, 5, 4), float("nan"))
    with using(Policy(choose={"wgrad_accumulate": library})):
        wgrad_accumulate(x, dy, buffer[0].t(), accumulate=False)
    torch.testing.assert_close(buffer[0].t(), dy.t() @ x)
    assert buffer[1].isnan().all()


def test_inputs_that_need_gradients_leave_no_graph() -> None:
    """Inside a backward pass nothing is recorded for another one."""
    x, dy, main_grad = draw(3, 2).requires_grad_(), draw(3, 2).requires_grad_(), torch.zeros(2, 2)
    wgrad_accumulate(x, dy, main_grad)
    assert not main_grad.requires_grad


def test_a_proof_of_a_large_call_is_made_small() -> None:
    """shrink keeps at most 256 columns of each side and 1024 rows."""
    arguments = {"x": draw(3, 500, 300), "dy": draw(3, 500, 260), "main_grad": draw(260, 300), "accumulate": True}
    small = _shrink(arguments)
    assert [tuple(small[name].shape) for name in ("x", "dy", "main_grad")] == [(1024, 256), (1024, 256), (256, 256)]


@pytest.mark.parametrize(
    ("x", "dy", "main_grad", "error"),
    [
        (draw(3, 2), draw(3, 4, dtype=torch.bfloat16), draw(4, 2), TypeError),
        (draw(3, 2), draw(3, 4), draw(4, 2, dtype=torch.bfloat16), TypeError),
        (draw(3, 2).half(), draw(3, 4).half(), draw(4, 2, dtype=torch.bfloat16), TypeError),
        (draw(3, 2), draw(2, 4), draw(4, 2), ValueError),
        (draw(3, 2), draw(3, 4), draw(2, 4), ValueError),
    ],
)
def test_what_does_not_fit_is_refused(
    x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor, error: type[Exception]
) -> None:
    """Other dtypes and shapes are errors that say what was found."""
    with pytest.raises(error, match="expected; found"):
        wgrad_accumulate(x, dy, main_grad)
