"""Cross entropy of logits that are split along the vocabulary over the ranks of a process group.

logits [..., S] = this rank's columns, of P ranks' P S = V; target [...] = indices into the whole vocabulary.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.distributed as dist

from llm_adapt.ops.softmax_partials import softmax_partials

__all__ = ["vocab_parallel_cross_entropy"]


class _Sum(torch.autograd.Function):
    """Sum over the ranks. Each rank computes the whole loss from it, so the gradient of its own part is the sum's."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        total = part.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, dist.ReduceOp.SUM, group)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, None]:
        return upstream, None


def vocab_parallel_cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    group: dist.ProcessGroup | None = None,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    smoothing_over: Literal["vocabulary", "partition"] = "vocabulary",
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss = (1 - s) (lse - c_t) + s (lse - mean(c)) + z_loss lse^2 of each row, and the last term alone.

    c, lse and t as in llm_adapt.ops.cross_entropy; s = e K / (K - 1) with e = label_smoothing: the probability e is
    spread over the other K - 1 classes, as Megatron does, and not over all K, as torch does. Rows whose target is
    ignore_index are 0.

    smoothing_over: "vocabulary": K = V, the loss is the same on every rank. "partition": K = S and the mean is over
    this rank's columns, as Megatron-Core 0.16.1 computes it: every rank has another loss. Without label smoothing, or
    on one rank, they are the same.

    Two collectives: a maximum of one number a row, and a sum of two (three with smoothing over the vocabulary). The
    backward pass has none.

    Shapes: logits [..., S], target [...] -> two of [...], the same on every rank.
    Dtypes: computed in float32 (float64 for float64 logits), and so are the results.
    Raises: as llm_adapt.ops.softmax_partials; ValueError for label_smoothing outside [0, 1), unknown smoothing_over,
    or smoothing over one class.
    Source: Shoeybi et al. 2019 (Megatron-LM), section 3; megatron.core.tensor_parallel.cross_entropy 0.16.1.
    """
    if smoothing_over not in ("vocabulary", "partition"):
        raise ValueError(f"smoothing_over={smoothing_over!r} was asked; there are vocabulary, partition.")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing={label_smoothing} was given; it must lie in [0, 1).")
    width = logits.shape[-1]
    classes = width * (dist.get_world_size(group) if smoothing_over == "vocabulary" else 1)
    if label_smoothing and classes < 2:
        raise ValueError(f"label_smoothing={label_smoothing} was given for {classes} class; there is no other one.")

    start = dist.get_rank(group) * width
    parts = softmax_partials(logits, target, start, logit_scale, logit_softcap, with_total=label_smoothing > 0)
    largest = parts[0].detach().clone()
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    is_shared = label_smoothing > 0 and smoothing_over == "vocabulary"
    summed = [torch.exp(parts[0] - largest), parts[1], *(parts[2:] if is_shared else ())]
    sums = _Sum.apply(torch.stack(summed), group)

    lse = largest + torch.log(sums[0])
    loss = lse - sums[1]
    if label_smoothing:
        s = label_smoothing * classes / (classes - 1)
        mean = (sums[2] if is_shared else parts[2]) / classes
        loss = (1.0 - s) * loss + s * (lse - mean)
    z = z_loss * lse.square() if z_loss else torch.zeros_like(lse)
    is_ignored = target == ignore_index
    loss, z = torch.where(is_ignored, 0.0, loss), torch.where(is_ignored, 0.0, z)
    return loss + z, z.detach().clone()
