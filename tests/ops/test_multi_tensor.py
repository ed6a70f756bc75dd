"""multi_tensor_l2norm, multi_tensor_scale and clip_grads: against torch and Megatron-Core, and their guards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.utils import local_multi_tensor_applier, local_multi_tensor_scale

from llm_adapt.ops.clip_grads import clip_grads
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.multi_tensor_l2norm import multi_tensor_l2norm, shrink_lists
from llm_adapt.ops.multi_tensor_scale import multi_tensor_scale

LIBRARIES = pytest.mark.parametrize("library", ["reference", "torch_native"])
shapes = st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=5)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


def draw(sizes: list[list[int]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """A list of tensors that are the same at each run."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for shape in sizes]


def close(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Every tensor of the lists agrees, as far as two roundings allow."""
    for ours, theirs in zip(found, expected, strict=True):
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}[ours.dtype]
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=1e-6)


@LIBRARIES
@settings(max_examples=25, deadline=None)
@given(sizes=shapes, dtype=dtypes)
def test_the_norm_is_that_of_all_elements(library: str, sizes: list[list[int]], dtype: torch.dtype) -> None:
    """The norm is that of the tensors laid end to end in double, and each norm that of its tensor."""
    tensors = draw(sizes, dtype)
    with using(Policy(choose={"multi_tensor_l2norm": library})):
        norm = multi_tensor_l2norm(tensors)
    flat = torch.cat([tensor.double().reshape(-1) for tensor in tensors])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(flat.norm().item(), rel=1e-5)
    if dtype == torch.float32:
        torch.testing.assert_close(norm, torch.nn.utils.get_total_norm(tensors))
    total, each = multi_tensor_l2norm(tensors, per_tensor=True)
    assert total.item() == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(each.double(), torch.stack([tensor.double().norm() for tensor in tensors]))


def test_squares_of_16_bits_do_not_overflow() -> None:
    """The squares of float16 tensors are summed in float32; nothing has norm 0, and nan is not hidden."""
    assert multi_tensor_l2norm([torch.full((4,), 300.0).half()]).item() == 600
    assert multi_tensor_l2norm([]).item() == 0
    assert multi_tensor_l2norm([], per_tensor=True)[1].shape == (0,)
    assert multi_tensor_l2norm([torch.ones(2), torch.tensor([math.nan])]).isnan()


@LIBRARIES
@settings(max_examples=25, deadline=None)
@given(sizes=shapes, dtype=dtypes, same=st.booleans())
def test_it_scales_as_megatron_core(library: str, sizes: list[list[int]], dtype: torch.dtype, same: bool) -> None:
    """Outputs are those of multi_tensor_scale, in a second list or in the same one."""
    tensors, expected = draw(sizes, dtype), draw(sizes, dtype)
    outputs = tensors if same else draw(sizes, dtype, seed=1)
    local_multi_tensor_applier(local_multi_tensor_scale, None, [expected, expected], 0.3)
    with using(Policy(choose={"multi_tensor_scale": library})):
        assert multi_tensor_scale(tensors, outputs, scale=0.3) is None
    close(outputs, expected)
    if not same:
        assert all(torch.equal(a, b) for a, b in zip(tensors, draw(sizes, dtype), strict=True))


@LIBRARIES
def test_overflow_is_told_and_passed_on(library: str) -> None:
    """found_inf becomes 1 for inf or nan in any tensor, and stays as it is for none; both scales are used."""
    for value, found in ((1.0, 0.0), (math.inf, 1.0), (math.nan, 1.0)):
        tensors, flag = [torch.ones(3), torch.tensor([2.0, value])], torch.zeros(1)
        with using(Policy(choose={"multi_tensor_scale": library})):
            multi_tensor_scale(tensors, tensors, torch.tensor(2.0), flag, 3.0)
            assert flag.item() == found
            multi_tensor_scale([torch.ones(1)], [torch.ones(1)], found_inf=flag)
        assert flag.item() == found
        torch.testing.assert_close(tensors[1], torch.tensor([12.0, value * 6]), equal_nan=True)


def test_outputs_may_be_of_another_dtype() -> None:
    """Gradients of 16 bits are scaled into float32 ones, rounded nowhere between."""
    tensors, outputs = [torch.tensor([1.0 / 3]).bfloat16()], [torch.zeros(1)]
    multi_tensor_scale(tensors, outputs, scale=1.1)
    assert outputs[0].item() == pytest.approx(tensors[0].item() * 1.1, rel=1e-6)
    flag = torch.zeros(1, dtype=torch.int32)
    multi_tensor_scale([torch.tensor([math.inf])], outputs, found_inf=flag)
    assert flag.item() == 1


@LIBRARIES
@pytest.mark.parametrize("foreach", [False, True])
@settings(max_examples=20, deadline=None)
@given(
    sizes=shapes, dtype=dtypes, max_norm=st.sampled_from([0.5, 2.0, 1e4]), norm_type=st.sampled_from([1, 2, math.inf])
)
def test_it_clips_as_torch_does(
    library: str, foreach: bool, sizes: list[list[int]], dtype: torch.dtype, max_norm: float, norm_type: float
) -> None:
    """Gradients and norm are those of torch.nn.utils.clip_grad_norm_, whose norm of 16 bits is rounded to 16 bits."""
    sizes = [shape for shape in sizes if 0 not in shape] or [[2]]  # of an empty tensor torch finds no largest element
    if library == "torch_native" and norm_type != 2:
        return  # it refuses
    params = [torch.nn.Parameter(item) for item in draw(sizes, dtype)]
    for param, grad in zip(params, draw(sizes, dtype, seed=1), strict=True):
        param.grad = grad
    expected = torch.nn.utils.clip_grad_norm_(params, max_norm, norm_type, foreach=foreach)
    grads = draw(sizes, dtype, seed=1)
    with using(Policy(choose={"clip_grads": library})):
        norm = clip_grads(grads, max_norm=max_norm, norm_type=float(norm_type))
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2.0**-6, torch.float16: 2.0**-9}[dtype]
    assert norm.item() == pytest.approx(expected.item(), rel=tolerance)
    for ours, param in zip(grads, params, strict=True):
        torch.testing.assert_close(ours, param.grad, rtol=tolerance, atol=1e-3 if dtype != torch.float32 else 1e-6)


@LIBRARIES
def test_a_norm_that_is_known_is_used(library: str) -> None:
    """total_norm, as summed over ranks, decides in place of these gradients' own, and is returned."""
    grads, known = draw([[3, 4], [5]]), torch.tensor(8.0)
    with using(Policy(choose={"clip_grads": library})):
        norm = clip_grads(grads, known, max_norm=2.0)
    assert norm.item() == 8
    close(grads, [item * (2 / (8 + 1e-6)) for item in draw([[3, 4], [5]])])


def test_every_option_of_clipping_changes_it() -> None:
    """No option is without effect; a norm within the bound changes nothing."""
    changes: list[dict[str, Any]] = [
        {"max_norm": 0.2},
        {"norm_type": 1.0},
        {"norm_type": math.inf},
        {"eps": 1.0},
        {"total_norm": torch.tensor(99.0)},
    ]
    base = draw([[8]])
    clip_grads(base, max_norm=0.5)
    for change in changes:
        grads = draw([[8]])
        clip_grads(grads, **({"max_norm": 0.5} | change))
        assert not torch.equal(grads[0], base[0]), change
    within = draw([[8]])
    clip_grads(within, max_norm=1e3)
    assert torch.equal(within[0], draw([[8]])[0])
    assert clip_grads([]).item() == 0


def test_a_proof_of_large_lists_is_made_small() -> None:
    """shrink takes tensors from both ends of the lists, and a part of each."""
    small = shrink_lists({"tensors": [torch.full((100, 100), float(i)) for i in range(20)], "scale": 2.0})
    assert [int(item[0]) for item in small["tensors"]] == [0, 1, 2, 3, 16, 17, 18, 19]
    assert small["tensors"][0].shape == (4096,)
    assert small["scale"] == 2.0


def test_what_does_not_fit_is_refused() -> None:
    """Lists of other lengths or shapes, and norms that are none, are errors."""
    with pytest.raises(ValueError, match="same shapes"):
        multi_tensor_scale(draw([[2], [3]]), draw([[2]]))
    with pytest.raises(ValueError, match="same shapes"):
        multi_tensor_scale(draw([[2]]), draw([[3]]))
    with pytest.raises(ValueError, match="must be positive"):
        clip_grads(draw([[2]]), norm_type=0.0)
    with pytest.raises(ValueError, match="leave one out"):
        clip_grads(draw([[2]]), torch.tensor(1.0), norm_type=1.0)
