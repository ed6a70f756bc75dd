"""Cross entropy of logits split over two ranks along the vocabulary; run by test_vocab_cross_entropy.py."""

from __future__ import annotations

import re

import pytest
import torch
import torch.distributed as dist
from on_ranks import check, main
from torch.nn import functional as F

from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.parallel.vocab_cross_entropy import vocab_parallel_cross_entropy

CLASSES = 18


def whole(*sizes: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, targets and an upstream gradient, the same on every rank."""
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(*sizes, CLASSES, generator=generator, dtype=torch.float64)
    target = torch.randint(CLASSES, sizes, generator=generator)
    return logits.to(dtype), target, torch.randn(sizes, generator=generator, dtype=torch.float64)


def shard(logits: torch.Tensor, rank: int, size: int) -> torch.Tensor:
    """This rank's columns, as a leaf of its own."""
    width = CLASSES // size
    return logits[..., rank * width : (rank + 1) * width].clone().requires_grad_()


@check
def as_the_whole(rank: int, size: int) -> None:
    """Loss, z-loss and each rank's gradient are those of the plain cross entropy of all columns, with all options."""
    for options in (
        {},
        {"z_loss": 0.01},
        {"logit_scale": 0.5, "logit_softcap": 2.0},
        {"label_smoothing": 0.1, "z_loss": 0.01, "ignore_index": 3},
        {"label_smoothing": 0.1, "logit_scale": 0.5, "logit_softcap": 2.0},
    ):
        for sizes in ((7,), (2, 3), (0,)):
            logits, target, upstream = whole(*sizes)
            mine, all_of_it = shard(logits, rank, size), logits.clone().requires_grad_()
            # Megatron spreads the smoothing over the other V - 1 classes, torch over all V.
            plain = dict(options, label_smoothing=options.get("label_smoothing", 0.0) * CLASSES / (CLASSES - 1))
            expected, z_expected = cross_entropy(all_of_it, target, reduction="none", **plain)
            found, z_found = vocab_parallel_cross_entropy(mine, target, dist.group.WORLD, **options)
            torch.testing.assert_close(found, expected)
            torch.testing.assert_close(z_found, z_expected)
            found.backward(upstream)
            expected.backward(upstream)
            width = CLASSES // size
            torch.testing.assert_close(mine.grad, all_of_it.grad[..., rank * width : (rank + 1) * width])


@check
def as_torch(rank: int, size: int) -> None:
    """Of 16-bit logits, the loss is torch's of the same numbers in float32; the gradient has their dtype."""
    logits, target, _ = whole(2, 5, dtype=torch.bfloat16)
    mine = shard(logits, rank, size)
    found, _ = vocab_parallel_cross_entropy(mine, target)
    torch.testing.assert_close(
        found.flatten(), F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none")
    )
    found.sum().backward()
    assert found.dtype == torch.float32
    assert mine.grad.dtype == torch.bfloat16


@check
def as_megatron(rank: int, size: int) -> None:
    """Loss and gradient are those of Megatron's vocab_parallel_cross_entropy, and of its fused form."""
    from megatron.core import parallel_state
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.cross_entropy import vocab_parallel_cross_entropy as theirs

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=size)
    group = parallel_state.get_tensor_model_parallel_group()
    logits, target, upstream = whole(5, 3, dtype=torch.float32)
    upstream = upstream.float()
    for smoothing in (0.0, 0.1):
        one, other = shard(logits, rank, size), shard(logits, rank, size)
        expected = theirs(one, target, smoothing)
        found, _ = vocab_parallel_cross_entropy(
            other, target, group, label_smoothing=smoothing, smoothing_over="partition"
        )
        torch.testing.assert_close(found, expected)
        found.backward(upstream)
        expected.backward(upstream)
        torch.testing.assert_close(other.grad, one.grad)
    with torch.compiler.set_stance("force_eager"):
        one, other = shard(logits, rank, size), shard(logits, rank, size)
        expected = fused_vocab_parallel_cross_entropy(one, target, group)
        expected.backward(upstream)
    found, _ = vocab_parallel_cross_entropy(other, target, group)
    found.backward(upstream)
    torch.testing.assert_close(found, expected)
    # Megatron's fused form rounds the gradient to bfloat16, whatever the logits are.
    torch.testing.assert_close(other.grad, one.grad, rtol=2.0**-8, atol=1e-6)


@check
def smoothing_of_megatron_differs_between_ranks(rank: int, size: int) -> None:
    """With smoothing_over="partition" each rank has a loss of its own, as in Megatron; over the vocabulary, one."""
    logits, target, _ = whole(5)
    for over, is_one in (("vocabulary", True), ("partition", False)):
        found, _ = vocab_parallel_cross_entropy(
            shard(logits, rank, size), target, label_smoothing=0.2, smoothing_over=over
        )
        losses = [torch.empty_like(found) for _ in range(size)]
        dist.all_gather(losses, found.detach())
        assert torch.allclose(losses[0], losses[1]) == is_one


@check
def large_logits(rank: int, size: int) -> None:
    """A shard far below the other one, or wholly at minus infinity, gives no NaN in loss and gradient."""
    for low in (-1e30, -torch.inf):
        logits = torch.zeros(2, CLASSES)
        logits[:, CLASSES // size :] = low
        mine = shard(logits, rank, size)
        found, _ = vocab_parallel_cross_entropy(mine, torch.tensor([0, 1]))
        torch.testing.assert_close(found, torch.full((2,), CLASSES / size).log())
        found.sum().backward()
        assert torch.isfinite(mine.grad).all()
        assert mine.grad.any() == (rank == 0)


@check
def bad_arguments(rank: int, size: int) -> None:
    """Unknown names and numbers that make no sense are errors on every rank, before any communication."""
    logits, target, _ = whole(4)
    for options, text in (
        ({"smoothing_over": "shard"}, "smoothing_over='shard' was asked"),
        ({"label_smoothing": 1.0}, "must lie in [0, 1)"),
        ({"logit_softcap": -1.0}, "must be positive"),
    ):
        with pytest.raises(ValueError, match=re.escape(text)):
            vocab_parallel_cross_entropy(logits, target, **options)
    with pytest.raises(ValueError, match="no other one"):
        vocab_parallel_cross_entropy(logits[:, :1], target, label_smoothing=0.1, smoothing_over="partition")
    with pytest.raises(TypeError, match="give indices"):
        vocab_parallel_cross_entropy(logits, target.double())


if __name__ == "__main__":
    main()
