"""The parts of a vocabulary-parallel cross entropy, put together on one rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.ops.softmax_partials import softmax_partials

reference = softmax_partials.op.reference


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def together(logits: torch.Tensor, target: torch.Tensor, shards: int, **options: Any) -> tuple[torch.Tensor, ...]:
    """lse, picked and total of the whole vocabulary from those of its shards."""
    width = logits.shape[-1] // shards
    parts = [
        reference(piece, target, index * width, with_total=True, **options)
        for index, piece in enumerate(logits.split(width, -1))
    ]
    lse, picked, total = (torch.stack(column) for column in zip(*parts, strict=True))
    return torch.logsumexp(lse, 0), picked.sum(0), total.sum(0)


@given(
    st.integers(0, 5), st.integers(1, 4), st.integers(1, 7), st.sampled_from([1.0, 0.5]), st.sampled_from([None, 2.0])
)
def test_the_shards_give_the_whole(rows: int, shards: int, width: int, scale: float, softcap: float | None) -> None:
    """Over any number of shards, lse - picked is the plain loss, with its gradient, and total the sum of logits."""
    logits = draw(rows, shards * width).requires_grad_()
    target = torch.randint(shards * width, (rows,), generator=torch.Generator().manual_seed(1))
    options = {"logit_scale": scale, "logit_softcap": softcap}
    lse, picked, total = together(logits, target, shards, **options)
    expected, _ = cross_entropy.op.reference(logits, target, reduction="none", **options)
    torch.testing.assert_close(lse - picked, expected)
    upstream = draw(rows, seed=2)
    found = torch.autograd.grad(lse - picked, logits, upstream, retain_graph=True)
    torch.testing.assert_close(found, torch.autograd.grad(expected, logits, upstream))
    c = logits * scale if softcap is None else softcap * torch.tanh(logits * scale / softcap)
    torch.testing.assert_close(total, c.sum(-1))


def test_lse_is_the_maximum_and_the_sum_of_megatron() -> None:
    """lse and picked are what Megatron keeps as maximum, sum of exponentials and predicted logit of a shard."""
    from megatron.core.tensor_parallel.cross_entropy import VocabParallelCrossEntropy as Theirs

    logits, target = draw(3, 5, 8).float(), torch.randint(24, (3, 5), generator=torch.Generator().manual_seed(1))
    wide, largest = Theirs.calculate_logits_max(logits.clone())
    is_elsewhere, _, predicted, sum_exp, _ = Theirs.calculate_predicted_logits(wide, target, largest, 8, 16)
    lse, picked = reference(logits, target, 8)
    assert is_elsewhere.any()
    assert not is_elsewhere.all()
    torch.testing.assert_close(lse, largest + sum_exp.log())
    torch.testing.assert_close(picked, torch.where(is_elsewhere, 0.0, predicted + largest))


def test_the_gradient_of_lse_is_the_softmax() -> None:
    """One number a row holds what the maximum and the sum hold, and its gradient is the shard's softmax."""
    logits = (1e3 * draw(4, 9)).requires_grad_()
    lse, _ = reference(logits, torch.zeros(4, dtype=torch.long), 9)
    (found,) = torch.autograd.grad(lse.sum(), logits)
    torch.testing.assert_close(found, torch.softmax(logits, -1))


def test_a_shard_of_padding() -> None:
    """A shard masked out whole has lse minus infinity, no NaN in its gradient, and leaves the loss to the others."""
    logits = torch.full((3, 4), -torch.inf, dtype=torch.float64, requires_grad=True)
    lse, picked = reference(logits, torch.zeros(3, dtype=torch.long), 4)
    assert lse.tolist() == [-torch.inf] * 3
    (torch.exp(lse - 1.0).sum() + picked.sum()).backward()
    assert logits.grad is not None
    assert not logits.grad.any()


def test_every_flag_changes_the_result() -> None:
    """start, scale and softcap change the parts, and the total comes when it is asked."""
    logits, target = draw(6, 8), torch.arange(6)
    lse, picked = reference(logits, target)
    assert not torch.equal(reference(logits, target, 4)[1], picked)
    assert not torch.allclose(reference(logits, target, logit_scale=0.5)[0], lse)
    assert not torch.allclose(reference(logits, target, logit_softcap=1.0)[0], lse)
    assert len(reference(logits, target, with_total=True)) == 3


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"target": draw(3)}, TypeError, "give indices"),
        ({"target": torch.zeros(2, dtype=torch.long)}, ValueError, "one a row"),
        ({"logit_softcap": -1.0}, ValueError, "must be positive"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Shapes, dtypes and numbers that give no loss are errors that say what was found."""
    with pytest.raises(kind, match=text):
        reference(**({"logits": draw(3, 4), "target": torch.zeros(3, dtype=torch.long)} | arguments))
