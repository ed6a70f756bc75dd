"""Megatron's cross entropy by the operator softmax_partials: on one rank here, and on two."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frameworks.megatron import dense_parallel_checks
from tests.frameworks.megatron.real_megatron import agree, calling, gradients, model, on_one_rank, served, step
from tests.parallel.on_ranks import CHECKS, outcomes

NAMES = [name for name, function in CHECKS.items() if function.__module__ == dense_parallel_checks.__name__]


@pytest.fixture(scope="module")
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


def loss(name: str) -> Callable[..., torch.Tensor]:
    """A loss function as its callers find it now."""
    if name == "fused":
        module = importlib.import_module("megatron.core.fusions.fused_cross_entropy")
        group = importlib.import_module("megatron.core.parallel_state").get_tensor_model_parallel_group()
        return lambda logits, target: module.fused_vocab_parallel_cross_entropy(logits, target, group)
    return importlib.import_module("megatron.core.tensor_parallel").vocab_parallel_cross_entropy  # type: ignore[no-any-return]


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(["plain", "fused"]),
    sizes=st.sampled_from([(5, 2), (1, 1), (7, 1)]),
    smoothing=st.sampled_from([0.0, 0.1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_loss_and_gradient_are_megatrons(
    megatron: None, name: str, sizes: tuple[int, int], smoothing: float, dtype: torch.dtype, seed: int
) -> None:
    """Both functions, with label smoothing where there is one: float32 losses, and gradients in the logits' dtype."""
    generator = torch.Generator().manual_seed(seed)
    logits = (3 * torch.randn(*sizes, 12, generator=generator)).to(dtype)
    target = torch.randint(12, sizes, generator=generator)
    options: tuple[Any, ...] = (smoothing,) if name == "plain" else ()

    def call(x: torch.Tensor) -> torch.Tensor:
        return loss(name)(x * 1.0, target, *options)  # Megatron writes into float32 logits

    expected = gradients(call, logits)
    with served("losses"), calling("softmax_partials"):
        found = gradients(call, logits)
    agree(found[0], expected[0], torch.float32)
    agree(found[1], expected[1], torch.bfloat16 if name == "fused" else dtype)


@pytest.mark.parametrize("name", ["plain", "fused"])
def test_logits_are_left_as_they_were(megatron: None, name: str) -> None:
    """Megatron overwrites float32 logits; served, they stay."""
    logits = torch.randn(4, 2, 12)
    before = logits.clone()
    with served("losses"):
        loss(name)(logits, torch.zeros(4, 2, dtype=torch.long))
    assert torch.equal(logits, before)


@pytest.mark.parametrize("target", [-1, -100, 99])
def test_a_masked_target_counts_for_nothing(megatron: None, target: int) -> None:
    """Targets outside the vocabulary, whose losses a mask removes, change no gradient; alone they have the softmax."""
    logits, targets = torch.randn(4, 1, 12), torch.tensor([[3], [target], [5], [target]])
    mask = torch.tensor([[1.0], [0.0], [1.0], [0.0]])

    def masked(x: torch.Tensor) -> torch.Tensor:
        return loss("plain")(x * 1.0, targets) * mask

    def unmasked(x: torch.Tensor) -> torch.Tensor:
        return loss("plain")(x * 1.0, targets)

    expected, expected_alone = gradients(masked, logits), gradients(unmasked, logits)
    with served("losses"):
        found, found_alone = gradients(masked, logits), gradients(unmasked, logits)
    agree(found, expected, torch.float32)
    agree(found_alone[1], expected_alone[1], torch.float32)


def test_columns_of_minus_infinity_are_no_nan(megatron: None) -> None:
    """Columns of padding have probability 0 and gradient 0; nothing becomes NaN."""
    logits = torch.randn(4, 1, 12)
    logits[..., 9:] = -torch.inf
    with served("losses"):
        found, dx = gradients(lambda x: loss("plain")(x, torch.tensor([[0], [1], [2], [3]])), logits)
    assert found is not None
    assert dx is not None
    assert bool(torch.isfinite(found).all())
    assert not dx[..., 9:].any()
    assert bool(torch.isfinite(dx).all())


def test_smoothing_outside_its_range_is_refused(megatron: None) -> None:
    """label_smoothing is in [0, 1), as Megatron's docstring says."""
    with served("losses"), pytest.raises(ValueError, match="label_smoothing=1.0"):
        loss("plain")(torch.randn(4, 1, 12), torch.zeros(4, 1, dtype=torch.long), 1.0)


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_model_calls_it(megatron: None, is_fused: bool) -> None:
    """GPTModel's loss is the operator's, whichever of the two its config asks for."""
    fusion = {"cross_entropy_loss_fusion": True, "cross_entropy_fusion_impl": "native"} if is_fused else {}
    expected = step(model("LayerNorm", **fusion))
    with served("losses"), calling("softmax_partials"):
        found = step(model("LayerNorm", **fusion))
    agree(found[0], expected[0], torch.float32)
    # Megatron rounds the gradient of the fused loss to bfloat16.
    agree(found[1], expected[1], torch.bfloat16 if is_fused else torch.float32)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check on both ranks."""
    return outcomes(Path(dense_parallel_checks.__file__), 2, tmp_path_factory.mktemp("dense"), ["--ops", "off"])


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(found: dict[str, str], name: str) -> None:
    """Each check of dense_parallel_checks.py holds on both ranks; its docstring says what it is."""
    assert found[name] == "", found[name]
