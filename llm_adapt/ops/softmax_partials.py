"""What a shard of the vocabulary gives to a cross entropy. logits [..., S] = columns start .. start + S of all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.activation import fewer_rows
from llm_adapt.ops.cross_entropy import capped, check_losses
from llm_adapt.ops.dispatch import fused_op

__all__ = ["softmax_partials"]


class _LogSumExp(torch.autograd.Function):
    """torch.logsumexp, whose gradient is 0 and not NaN where a shard holds nothing but minus infinity."""

    generate_vmap_rule = True

    @staticmethod
    def forward(c: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(c, -1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs, output)

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:
        c, lse = ctx.saved_tensors
        return upstream[..., None] * torch.exp(c - torch.where(lse == -torch.inf, 0.0, lse)[..., None])


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def case(classes: int, *sizes: int) -> dict[str, Any]:
        logits = torch.randn(*sizes, classes, generator=generator).to(dtype)
        return {"logits": logits, "target": torch.randint(-1, 4 * classes, sizes, generator=generator)}

    yield case(33, 12)
    yield case(16, 3, 5) | {"start": 32, "with_total": True}
    yield case(16, 12) | {"start": 16, "logit_scale": 0.5, "logit_softcap": 1.5}
    yield case(16, 12) | {"start": 8, "logit_scale": 2.0, "logit_softcap": 1.5, "with_total": True}
    yield case(16, 0)


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    return fewer_rows(arguments, "logits", target=0)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    logits = torch.randn(shape, generator=generator).to(dtype)
    return {"logits": logits, "target": torch.randint(2 * shape[-1], shape[:-1], generator=generator)}


@fused_op(
    inputs=_inputs,
    differentiable=("logits",),
    shrink=_shrink,
    example=_example,
    sizes={"Llama 3 on 8 ranks": (8192, 16032)},
)
def softmax_partials(
    logits: torch.Tensor,
    target: torch.Tensor,
    start: int = 0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    with_total: bool = False,
) -> tuple[torch.Tensor, ...]:
    """lse = log(sum_i exp(c_i)), picked = c_target or 0 where another shard has it, and with_total sum_i c_i.

    c = softcap tanh(logit_scale logits / softcap), or without softcap logit_scale logits. lse is the largest logit m
    and the sum of exp(c - m) in one number, m + log(sum), whose gradient is the shard's softmax. Over shards,
    log(sum(exp(lse))), sum(picked) and sum(total) are those of the whole vocabulary. No communication.
    A shard whose logits are all minus infinity, such as one of padding alone, has lse minus infinity and gradient 0.

    Shapes: logits [..., S], target [...] = indices into the whole vocabulary -> two or three of [...].
    Dtypes: computed in float32 (float64 for float64 logits), and so are the results.
    Raises: ValueError for shapes that do not fit or softcap <= 0; TypeError for a target that is no index.
    Source: Shoeybi et al. 2019 (Megatron-LM), section 3; Milakov and Gimelshein 2018.
    """
    check_losses("softmax_partials", target, tuple(logits.shape), None, 0.0, logit_softcap, "none")
    c = capped(logits, logit_scale, logit_softcap)
    index = target.long() - start
    is_elsewhere = (index < 0) | (index >= c.shape[-1])
    picked = c.gather(-1, torch.where(is_elsewhere, 0, index)[..., None]).squeeze(-1)
    found = _LogSumExp.apply(c), torch.where(is_elsewhere, 0.0, picked)
    return (*found, c.sum(-1)) if with_total else found
