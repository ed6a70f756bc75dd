"""Megatron's vocabulary-parallel cross entropy by llm_adapt.parallel.vocab_cross_entropy.

logits [..., S] = this rank's columns of the vocabulary; target [...] = indices into the whole vocabulary.

Both of Megatron's own functions are served. Where a config asks for TransformerEngine's (cross_entropy_fusion_impl),
Megatron calls that one, or ends with an error where it is not installed.

Differences that a caller can see: logits are not overwritten, and the gradient of the fused function has the precision
of the logits, where Megatron rounds it to bfloat16. A target outside the vocabulary has no defined loss in either; its
gradient is the softmax in both, and a loss mask removes it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row

__all__ = ["fused_loss", "loss", "rows"]

Function = Callable[..., torch.Tensor]

# No target has this index: Megatron ignores none, its loss mask does.
_NONE = -(2**63)


def rows(context: Context) -> list[Row]:
    """Both functions; none with ops="off"."""
    if not context.serves_operators:
        return []
    reason = "operator softmax_partials, and two collectives instead of three"
    fused = "operator softmax_partials; the gradient is not rounded to bfloat16 for other logits"
    return [
        seam(
            "megatron.core.tensor_parallel.cross_entropy:vocab_parallel_cross_entropy",
            loss,
            reason,
            bodies={"0.12 to 0.18": "728c997629b6", "0.19": "ec36f69ba41d"},
        ),
        seam(
            "megatron.core.fusions.fused_cross_entropy:fused_vocab_parallel_cross_entropy",
            fused_loss,
            fused,
            bodies={"0.12 to 0.19": "5623039fab72"},
        ),
    ]


def loss(original: Function) -> Function:
    """`vocab_parallel_cross_entropy`: label smoothing is over this rank's columns, as Megatron computes it."""
    from llm_adapt.parallel.vocab_cross_entropy import vocab_parallel_cross_entropy as compute

    default_group: Callable[[], Any] = original.__globals__["get_tensor_model_parallel_group"]  # type: ignore[attr-defined]

    @functools.wraps(original)
    def vocab_parallel_cross_entropy(
        vocab_parallel_logits: torch.Tensor, target: torch.Tensor, label_smoothing: float = 0.0, tp_group: Any = None
    ) -> torch.Tensor:
        return compute(
            vocab_parallel_logits,
            target,
            default_group() if tp_group is None else tp_group,
            ignore_index=_NONE,
            label_smoothing=label_smoothing,
            smoothing_over="partition",
        )[0]

    return vocab_parallel_cross_entropy


def fused_loss(original: Function) -> Function:
    """`fused_vocab_parallel_cross_entropy`, which has no label smoothing."""
    from llm_adapt.parallel.vocab_cross_entropy import vocab_parallel_cross_entropy as compute

    @functools.wraps(original)
    def fused_vocab_parallel_cross_entropy(
        vocab_parallel_logits: torch.Tensor, target: torch.Tensor, tp_group: Any
    ) -> torch.Tensor:
        return compute(vocab_parallel_logits, target, tp_group, ignore_index=_NONE)[0]

    return fused_vocab_parallel_cross_entropy
