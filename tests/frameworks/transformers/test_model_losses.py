"""The losses of transformers through cross_entropy: the same numbers, gradients and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

import transformers.loss.loss_utils as loss_utils
from model_steps import applied, distance, model_of, served, step

from llm_adapt.frameworks.transformers import losses
from llm_adapt.ops.dispatch.receipt import receipt

NAMES = ("fixed_cross_entropy", "ForCausalLMLoss", "ForMaskedLMLoss")
ORIGINAL = {name: getattr(loss_utils, name) for name in NAMES}  # inside served() this dict has the replacements too
NUMBERS = {"none": None, "int": 7, "tensor": torch.tensor(7), "float": torch.tensor(6.5)}


def calls() -> int:
    """How often the op was called."""
    return sum(row["calls"] for row in receipt() if row["op"] == "cross_entropy")


def with_gradient(loss: Any, logits: torch.Tensor, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
    """A loss, and its gradient of the logits."""
    leaf = logits.clone().requires_grad_()
    found = loss(leaf, *args, **kwargs)
    (gradient,) = torch.autograd.grad(found.sum(), leaf)
    return {"loss": found.detach(), "gradient": gradient}


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    """Values and dtypes."""
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance, equal_nan=True)


def some(rows: int, classes: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and targets of which a third is ignored."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(classes, (rows,), generator=generator)
    target[::3] = -100
    return 3 * torch.randn(rows, classes, generator=generator).to(dtype), target


@pytest.fixture
def in_place() -> Iterator[None]:
    """The rows are in place for the whole test."""
    with served(losses.rows):
        yield


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(3, 9),
    classes=st.integers(1, 40),
    number=st.sampled_from(list(NUMBERS)),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    ignored=st.sampled_from([-100, 0]),
    seed=st.integers(0, 99),
)
def test_fixed_cross_entropy_is_the_original(
    in_place: None, rows: int, classes: int, number: str, dtype: torch.dtype, ignored: int, seed: int
) -> None:
    """Mean and sum over a number of items, every dtype, ignored targets, unknown arguments: one result and gradient."""
    logits, target = some(rows, classes, dtype, seed)
    target[target == -100] = ignored
    arguments = (logits, target, NUMBERS[number], ignored)
    ours: Any = loss_utils.fixed_cross_entropy
    expected = with_gradient(ours.__wrapped__, *arguments, some_unknown=1)
    before = calls()
    found = with_gradient(ours, *arguments, some_unknown=1)
    assert calls() == before + 1
    # 16 bits: the original rounds the log-probabilities, the op rounds the loss.
    same(found, expected, {2: 0.03, 4: 1e-6, 8: 1e-12}[dtype.itemsize])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ForCausalLMLoss", "ForMaskedLMLoss"])
def test_losses_of_language_models_are_the_original(name: str, dtype: torch.dtype) -> None:
    """16-bit logits that are not copied to float32 give the float32 loss and the 16-bit gradient of those that are."""
    logits, target = some(24, 19, dtype)
    logits, labels = logits.view(2, 12, 19), target.view(2, 12)
    expected = [with_gradient(ORIGINAL[name], logits, labels, 19, number) for number in NUMBERS.values()]
    with served(losses.rows):
        ours = getattr(loss_utils, name)
        found = [with_gradient(ours, logits, labels, 19, num_items_in_batch=number) for number in NUMBERS.values()]
        assert calls() == len(NUMBERS)
    for one, other in zip(found, expected, strict=True):
        assert (one["loss"].dtype, one["gradient"].dtype) == (torch.float32, dtype)
        same(one, other, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shifted_labels_and_another_ignored_index(dtype: torch.dtype) -> None:
    """shift_labels are taken as they are, without labels; ignore_index reaches the op; a slice of logits is taken."""
    logits, target = some(24, 19, dtype)
    logits, shifted = logits.view(2, 12, 19)[:, -5:], target.clamp(min=0).view(2, 12)[:, -5:]
    arguments = {"vocab_size": 19, "ignore_index": 0, "shift_labels": shifted.contiguous()}
    expected = with_gradient(ORIGINAL["ForCausalLMLoss"], logits, None, **arguments)
    with served(losses.rows):
        same(with_gradient(loss_utils.ForCausalLMLoss, logits, None, **arguments), expected, 1e-6)


def test_all_ignored_is_nan_as_before() -> None:
    """The mean over no target is NaN, the sum over a number of items 0."""
    logits, target = torch.randn(4, 5), torch.full((4,), -100)
    with served(losses.rows):
        assert bool(loss_utils.fixed_cross_entropy(logits, target).isnan())
        assert float(loss_utils.fixed_cross_entropy(logits, target, 3)) == 0.0


IMAGES = (torch.randn(2, 5, 3, 3), torch.randint(5, (2, 3, 3)))
PROBABILITIES = (torch.randn(4, 5), torch.softmax(torch.randn(4, 5), -1))


@pytest.mark.parametrize(("source", "target"), [IMAGES, PROBABILITIES], ids=["classes of pixels", "probabilities"])
def test_what_the_op_does_not_take_goes_to_the_original(source: torch.Tensor, target: torch.Tensor) -> None:
    """Classes on another axis and targets that are probabilities have the original result, and a line in the report."""
    expected = with_gradient(ORIGINAL["fixed_cross_entropy"], source, target)
    with served(losses.rows) as report:
        same(with_gradient(loss_utils.fixed_cross_entropy, source, target), expected, 0.0)
        assert calls() == 0
        assert [line.choice for line in report.lines if "fixed_cross_entropy" in line.subject] == ["its own code"]


def test_errors_are_those_of_the_original() -> None:
    """A target of 32 bits raises what it raises without us; one beyond the classes raises too."""
    logits, target = torch.randn(2, 3), torch.tensor([0, 1], dtype=torch.int32)
    with served(losses.rows):
        with pytest.raises(RuntimeError, match="Long"):
            loss_utils.fixed_cross_entropy(logits, target)
        with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
            loss_utils.fixed_cross_entropy(logits, torch.tensor([0, 7]))


def test_16_bits_under_autocast_have_the_dtype_that_autocast_chooses() -> None:
    """A classifier's 16-bit logits inside autocast go to the original, and its dtype comes back."""
    logits, target = some(6, 5, torch.bfloat16)
    with torch.autocast("cpu"):
        expected = ORIGINAL["fixed_cross_entropy"](logits, target)
        with served(losses.rows):
            found = loss_utils.fixed_cross_entropy(logits, target)
            assert calls() == 0
    assert (found.dtype, float(found)) == (expected.dtype, float(expected))


def test_another_fixed_cross_entropy_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's own fixed_cross_entropy, put in place after the patch, is what the model's loss calls, in float32."""
    seen = []
    logits, target = some(6, 5, torch.bfloat16)
    with served(losses.rows):
        monkeypatch.setattr(loss_utils, "fixed_cross_entropy", lambda source, *rest, **other: seen.append(source.dtype))
        loss_utils.ForCausalLMLoss(logits[None], target[None], 5)
        loss_utils.ForMaskedLMLoss(logits[None], target[None], 5)
        monkeypatch.undo()
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_model_computes_the_same(dtype: torch.dtype) -> None:
    """Loss and every gradient of a Llama, whose loss_function is looked up in the table, agree."""
    model = model_of("llama", dtype)
    expected = step(model, num_items_in_batch=11)
    with served(losses.rows) as report:
        found = step(model, num_items_in_batch=11)
        assert calls() == 1
        assert applied(report) == {f"transformers.loss.loss_utils:{name}" for name in NAMES}, report.parts["outcomes"]()
    assert distance(found, expected) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_compiled_code_has_no_break(dtype: torch.dtype) -> None:
    """torch.compile traces the loss as one graph."""
    logits, target = some(12, 9, dtype)
    with served(losses.rows):
        expected = with_gradient(loss_utils.ForCausalLMLoss, logits[None], target[None], 9, 5)
        compiled = torch.compile(loss_utils.ForCausalLMLoss, fullgraph=True, backend="eager")
        same(with_gradient(compiled, logits[None], target[None], 9, 5), expected, 1e-6)


def test_unpatching_restores_every_table() -> None:
    """Functions and LOSS_MAPPING are the very ones; meanwhile transformers.trainer sees one ForCausalLMLoss."""
    trainer = pytest.importorskip("transformers.trainer")
    functions, table = (
        {name: id(ORIGINAL[name]) for name in NAMES},
        {k: id(v) for k, v in loss_utils.LOSS_MAPPING.items()},
    )
    with served(losses.rows):
        assert [name for name in NAMES if id(getattr(loss_utils, name)) == functions[name]] == []
        assert trainer.ForCausalLMLoss is loss_utils.ForCausalLMLoss is loss_utils.LOSS_MAPPING["ForCausalLM"]
        assert trainer.LOSS_MAPPING["ForMaskedLM"] is loss_utils.ForMaskedLMLoss
    assert {name: id(getattr(loss_utils, name)) for name in NAMES} == functions
    assert {name: id(value) for name, value in loss_utils.LOSS_MAPPING.items()} == table
    assert id(trainer.ForCausalLMLoss) == functions["ForCausalLMLoss"]
