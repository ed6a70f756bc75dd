"""Cross entropy against torch, transformers, and Megatron-Core on one rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.dispatch.registry import load_library

reference = cross_entropy.op.reference


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def targets(classes: int, *sizes: int, ignored: int | None = -100) -> torch.Tensor:
    """Indices, every fourth of them ignored."""
    found = torch.randint(classes, sizes, generator=torch.Generator().manual_seed(1))
    if ignored is not None:
        found.view(-1)[::4] = ignored
    return found


def same(theirs: Callable[..., torch.Tensor], tensors: dict[str, torch.Tensor], **options: Any) -> None:
    """Their function and the reference have one loss and one gradient of the logits."""
    expected = run_op(cross_entropy.op, theirs, tensors)
    found = run_op(cross_entropy.op, lambda **given: reference(**given, **options)[0], tensors)
    assert found.keys() == expected.keys() == {"output", "gradient of logits"}
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)


@given(
    rows=st.integers(0, 6),
    classes=st.integers(1, 9),
    ignored=st.sampled_from([-100, -1, 0, 200]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    weighted=st.booleans(),
    is_int32=st.booleans(),
)
def test_it_is_torchs(
    rows: int, classes: int, ignored: int, smoothing: float, reduction: str, weighted: bool, is_int32: bool
) -> None:
    """With every option that torch has, of any size, also empty and all ignored, it is F.cross_entropy."""
    weight = {"class_weight": draw(classes, seed=2).abs() + 0.1} if weighted else {}
    target = targets(classes, rows, ignored=ignored)
    options = {"ignore_index": ignored, "label_smoothing": smoothing, "reduction": reduction}

    def theirs(logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None = None) -> torch.Tensor:
        return F.cross_entropy(logits, target.long(), class_weight, **options)

    same(theirs, {"logits": draw(rows, classes), "target": target.int() if is_int32 else target} | weight, **options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_transformers(dtype: torch.dtype) -> None:
    """For 16-bit logits it is the loss of transformers, in float32, with its shift done by the caller."""
    from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy

    logits, labels = draw(2, 5, 17).to(dtype), targets(17, 2, 5)
    shifted = F.pad(labels, (0, 1), value=-100)[..., 1:]
    loss, _ = reference(logits, shifted)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, ForCausalLMLoss(logits, labels, 17))
    total, _ = reference(logits, shifted, reduction="sum")
    torch.testing.assert_close(total / 7, ForCausalLMLoss(logits, labels, 17, num_items_in_batch=7))
    flat = logits.float().view(-1, 17), labels.view(-1)
    torch.testing.assert_close(reference(*flat)[0], fixed_cross_entropy(*flat))


def test_softcap_of_gemma2() -> None:
    """logit_softcap is the final_logit_softcapping of gemma2 in transformers."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    sizes = {"num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8, "vocab_size": 17, "head_dim": 4}
    config = Gemma2Config(**sizes, num_attention_heads=2, num_key_value_heads=1, final_logit_softcapping=0.05)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).double().eval()
    ids = targets(17, 2, 6, ignored=None)
    found = model(input_ids=ids, labels=ids, output_hidden_states=True)
    logits = model.lm_head(found.hidden_states[-1])
    assert logits.abs().max() > 0.02
    loss, _ = reference(logits[:, :-1], ids[:, 1:], logit_softcap=0.05)
    torch.testing.assert_close(loss, found.loss.double())


def test_z_loss_and_scale() -> None:
    """The loss holds z_loss lse^2 of the scaled logits; the second result is that part, without a gradient."""
    logits, target = draw(8, 9).requires_grad_(), targets(9, 8)
    counts = target != -100
    lse = torch.logsumexp(0.5 * logits, -1)
    for reduction, expected in (
        ("none", torch.where(counts, 0.01 * lse**2, 0.0)),
        ("sum", (0.01 * lse**2)[counts].sum()),
        ("mean", (0.01 * lse**2)[counts].mean()),
    ):
        options = {"logit_scale": 0.5, "reduction": reduction}
        loss, z = reference(logits, target, z_loss=0.01, **options)
        torch.testing.assert_close(z, expected)
        torch.testing.assert_close(loss, F.cross_entropy(0.5 * logits, target, reduction=reduction) + expected)
        assert loss.requires_grad
        assert not z.requires_grad
        without, zero = reference(logits, target, **options)
        torch.testing.assert_close(without, loss - z)
        assert not zero.any()


def test_smoothing_of_megatron() -> None:
    """Megatron's smoothing e over the other V - 1 classes is this one with e V / (V - 1)."""
    logits, target = draw(8, 9), targets(9, 8, ignored=None)
    log_p, e = F.log_softmax(logits, -1), 0.1
    others = (log_p.sum(-1) - log_p.gather(-1, target[:, None])[:, 0]) / 8
    expected = -(1 - e) * log_p.gather(-1, target[:, None])[:, 0] - e * others
    torch.testing.assert_close(reference(logits, target, label_smoothing=e * 9 / 8, reduction="none")[0], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_logits_lose_nothing(dtype: torch.dtype) -> None:
    """16-bit logits are widened first: the loss is that of the same numbers in float64."""
    logits, target = (10 * draw(16, 33)).to(dtype), targets(33, 16)
    found, _ = reference(logits, target, label_smoothing=0.1)
    expected, _ = reference(logits.double(), target, label_smoothing=0.1)
    torch.testing.assert_close(found, expected.float(), rtol=1e-6, atol=0.0)
    assert not torch.isclose(F.cross_entropy(logits, target, label_smoothing=0.1).float(), found, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_torch_serves_in_float32(dtype: torch.dtype) -> None:
    """torch's kernel widens 16-bit logits too: the loss has the dtype and the digits of the reference's."""
    assert load_library("torch_native") == ""
    logits, target = (10 * draw(2, 8, 33)).to(dtype), targets(33, 2, 8, ignored=5)
    kernel = cross_entropy.op.kernels["torch_native"].function
    found, zero = kernel(logits, target, None, 5, 0.1, "none")
    expected, _ = reference(logits, target, None, 5, 0.1, reduction="none")
    assert found.shape == (2, 8)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(zero, torch.zeros(2, 8))


def test_large_and_infinite_logits() -> None:
    """Logits beyond exp's range and classes at minus infinity give the exact loss and finite gradients."""
    logits = torch.tensor([[1e4, -1e4, -torch.inf], [3.0, 3.0, -torch.inf]], requires_grad=True)
    loss, _ = reference(logits, torch.tensor([1, 0]), reduction="none")
    torch.testing.assert_close(
        loss, torch.tensor([2e4, 2.0]).where(torch.tensor([True, False]), torch.tensor(2.0).log())
    )
    loss.sum().backward()
    assert logits.grad is not None
    torch.testing.assert_close(logits.grad, torch.tensor([[1.0, -1.0, 0.0], [-0.5, 0.5, 0.0]]))


def test_an_index_outside_the_vocabulary_is_an_error() -> None:
    """A target that is neither a class nor ignore_index raises on the CPU, as torch's does."""
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        reference(draw(2, 4), torch.tensor([0, 4]))
    with pytest.raises((RuntimeError, IndexError), match="out of bounds"):
        reference(draw(2, 4), torch.tensor([0, -100]), ignore_index=1)


def test_every_flag_changes_the_result() -> None:
    """No option and no optional tensor is ignored."""
    logits, target = draw(8, 9), targets(9, 8)
    target[target == -100] = 4
    plain, _ = reference(logits, target)
    flags = [{"label_smoothing": 0.1}, {"z_loss": 0.01}, {"logit_scale": 0.5}, {"logit_softcap": 2.0}]
    flags += [{"ignore_index": 4}, {"reduction": "sum"}, {"class_weight": draw(9, seed=3).abs() + 0.1}]
    for flag in flags:
        assert not torch.allclose(reference(logits, target, **flag)[0], plain), flag
    assert reference(logits, target, reduction="none")[0].shape == (8,)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"target": draw(3)}, TypeError, "give indices"),
        ({"target": torch.ones(3, dtype=torch.bool)}, TypeError, "give indices"),
        ({"target": torch.zeros(4, dtype=torch.long)}, ValueError, "one a row"),
        ({"class_weight": draw(3)}, ValueError, r"\(4,\) was expected"),
        ({"label_smoothing": 1.5}, ValueError, "must lie in"),
        ({"logit_softcap": 0.0}, ValueError, "must be positive"),
        ({"reduction": "average"}, ValueError, "reduction='average' was asked"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Shapes, dtypes and numbers that give no loss are errors that say what was found."""
    given_arguments = {"logits": draw(3, 4), "target": torch.zeros(3, dtype=torch.long)} | arguments
    with pytest.raises(kind, match=text):
        reference(**given_arguments)
