"""Megatron's functions over lists of tensors by the operators: values, flags, empty lists, and who is replaced."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core import utils
from megatron.core.distributed.fsdp.src.megatron_fsdp import mixed_precision
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import multi_tensor
from llm_adapt.patching import Plan
from llm_adapt.report import Report
from llm_adapt.settings import Settings

l2_norm = multi_tensor.l2_norm(utils.local_multi_tensor_l2_norm)
scale = multi_tensor.scale(utils.local_multi_tensor_scale)
CHUNK = 2048 * 32
shapes = st.lists(st.lists(st.integers(0, 4), max_size=3).map(tuple), max_size=6)
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def draw(sizes: list[tuple[int, ...]], dtype: torch.dtype = torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Normal numbers that are the same at each run."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator).to(dtype) for size in sizes]


def flag(value: int = 0) -> torch.Tensor:
    """The buffer that Megatron hands over."""
    return torch.full((1,), value, dtype=torch.int)


@settings(max_examples=50, deadline=None)
@given(sizes=shapes, dtype=dtypes, lists=st.integers(1, 3))
def test_the_norm_of_all_and_of_each(sizes: list[tuple[int, ...]], dtype: torch.dtype, lists: int) -> None:
    """One norm of all tensors of all lists, and each tensor's own norm, no running total (B6); 0 of none."""
    given = [draw(sizes, dtype, seed) for seed in range(lists)]
    flat = [tensor.double() for tensors in given for tensor in tensors]
    total = torch.cat([tensor.reshape(-1) for tensor in flat] or [torch.zeros(0).double()]).norm()
    norm, nothing = utils.local_multi_tensor_applier(l2_norm, flag(), given, False)
    assert nothing is None
    assert (norm.shape, norm.dtype) == ((1,), torch.float32)
    torch.testing.assert_close(norm[0].double(), total, rtol=1e-6, atol=1e-7)
    norm, norms = utils.local_multi_tensor_applier(l2_norm, flag(), given, True)
    torch.testing.assert_close(norm[0].double(), total, rtol=1e-6, atol=1e-7)
    assert norms.dtype == torch.float32
    expected = torch.stack([tensor.norm() for tensor in flat]) if flat else torch.zeros(0).double()
    torch.testing.assert_close(norms.double(), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_inf_and_nan_reach_the_norm(bad: float) -> None:
    """A norm that is not finite stops a step; it is not hidden."""
    norm, _ = l2_norm(CHUNK, flag(), [[torch.ones(3), torch.tensor([1.0, bad])]], False)
    assert not torch.isfinite(norm).any()


@settings(max_examples=50, deadline=None)
@given(
    sizes=shapes,
    dtypes=st.tuples(dtypes, dtypes),
    factor=st.sampled_from([1.0, 0.37]),
    in_place=st.booleans(),
)
def test_scaled_lists_are_megatrons(
    sizes: list[tuple[int, ...]], dtypes: tuple[torch.dtype, torch.dtype], factor: float, in_place: bool
) -> None:
    """Outputs are Megatron's for one dtype and for several, in place too, and the flag stays 0."""
    given = draw(sizes, dtypes[0])
    outputs = given if in_place else draw(sizes, dtypes[1], seed=1)
    expected = [torch.empty_like(tensor) for tensor in outputs]
    utils.local_multi_tensor_scale(CHUNK, flag(), [given, expected], factor)
    noop = flag()
    assert scale(CHUNK, noop, [given, outputs], factor) is None
    for ours, theirs in zip(outputs, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    assert noop.tolist() == [0]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_the_flag_says_that_a_tensor_is_not_finite(bad: float) -> None:
    """The flag becomes 1, other tensors are scaled all the same, and a flag that is 1 stays so."""
    tensors = [torch.ones(3), torch.tensor([2.0, bad])]
    noop = flag()
    scale(CHUNK, noop, [tensors, tensors], 0.5)
    assert noop.tolist() == [1]
    assert tensors[0].tolist() == [0.5, 0.5, 0.5]
    assert not torch.isfinite(tensors[1][1])
    scale(CHUNK, noop, [[torch.ones(2)], [torch.ones(2)]], 0.5)
    assert noop.tolist() == [1]
    floats = torch.zeros(1)
    scale(CHUNK, floats, [[torch.tensor([bad])], [torch.zeros(1)]], 0.5)
    assert floats.tolist() == [1.0]


def test_lists_of_several_dtypes_are_megatrons_own() -> None:
    """Copies between main and model parameters go to the original, which is told everything."""
    calls: list[Any] = []
    ours = multi_tensor.scale(lambda *args: calls.append(args))
    main, model, noop = draw([(3,)]), draw([(3,)], torch.bfloat16), flag()
    ours(CHUNK, noop, [main, model], 1.0)
    ours(CHUNK, noop, [[], []], 1.0)
    ours(CHUNK, noop, [main, main], torch.tensor(2.0))
    assert [call[0] for call in calls] == [CHUNK] * 3
    assert all(call[1] is noop for call in calls)
    assert calls[0][2][1] is model


def bound() -> list[Any]:
    """What Megatron's modules call."""
    return [
        clip_grads.l2_norm_impl,
        clip_grads.multi_tensor_scale_impl,
        megatron_optimizer.multi_tensor_scale_impl,
        mixed_precision.multi_tensor_scale_impl,
        utils.local_multi_tensor_l2_norm,
        utils.local_multi_tensor_scale,
    ]


def test_every_name_that_megatron_binds_is_replaced_and_put_back() -> None:
    """clip_grads, the optimizers and FSDP call the operators, although they were imported before; then no more."""
    before = bound()
    plan = Plan(multi_tensor.rows(Context(ADAPTER, Settings(), Report())))
    plan.apply()
    try:
        # The originals are held by this file's own wrappers as well.
        assert not {item.status for item in plan.outcomes()} & {"skipped", "waiting"}
        assert all(new is not old for new, old in zip(bound(), before, strict=True))
        assert bound()[1] is utils.local_multi_tensor_scale
    finally:
        assert plan.undo() == []
    assert all(now is old for now, old in zip(bound(), before, strict=True))


@pytest.mark.parametrize("package", ["transformer_engine", "apex"])
def test_nothing_is_replaced_where_a_real_package_serves(
    package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Megatron then calls TransformerEngine's or apex's functions; ops="off" leaves its own."""
    assert len(multi_tensor.rows(Context(ADAPTER, Settings(), Report()))) == 3
    assert multi_tensor.rows(Context(ADAPTER, Settings(ops="off"), Report())) == []
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert multi_tensor.rows(Context(ADAPTER, Settings(), Report())) == []
