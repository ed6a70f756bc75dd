"""Cross entropy of logits. logits [..., V], target [...] = indices into V, class_weight [V], N = number of targets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.activation import fewer_rows
from llm_adapt.ops.dispatch import fused_op

__all__ = ["capped", "check_losses", "cross_entropy", "reduced", "row_losses"]


def capped(logits: torch.Tensor, logit_scale: float, logit_softcap: float | None) -> torch.Tensor:
    """c = softcap tanh(scale logits / softcap), in float32 at least."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if logit_scale != 1.0:
        wide = wide * logit_scale
    return wide if logit_softcap is None else logit_softcap * torch.tanh(wide / logit_softcap)


def row_losses(
    c: torch.Tensor,
    lse: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    label_smoothing: float,
) -> torch.Tensor:
    """The loss of each row, without z-loss, 0 for ignored rows; lse = log(sum(exp(c)))."""
    index = target.long()
    is_ignored = index == ignore_index
    # An ignored index may lie outside the vocabulary; any other that does is the error of gather.
    index = torch.where(is_ignored, 0, index)
    loss = lse - c.gather(-1, index[..., None]).squeeze(-1)
    if class_weight is not None:
        loss = loss * class_weight.detach().to(c.dtype)[index]
    if label_smoothing:
        if class_weight is None:
            others = lse - c.mean(-1)
        else:
            w = class_weight.detach().to(c.dtype)
            others = (lse * w.sum() - c @ w) / c.shape[-1]
        loss = (1.0 - label_smoothing) * loss + label_smoothing * others
    return torch.where(is_ignored, 0.0, loss)


def reduced(
    loss: torch.Tensor,
    z: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    ignore_index: int,
    reduction: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss + z, z) of rows, reduced. The mean is over the rows that count, weighted by class for the loss."""
    z = z.expand_as(loss)
    if reduction == "none":
        return loss + z, z.detach().clone()
    total, z_total = loss.sum(), z.sum()
    if reduction == "mean":
        index = target.long()
        counts = (index != ignore_index).to(loss.dtype)
        number = counts.sum()
        if class_weight is None:
            total = total / number
        else:
            weights = class_weight.detach().to(loss.dtype)[torch.where(index == ignore_index, 0, index)]
            total = total / (weights * counts).sum()
        z_total = z_total / number.clamp(min=1)  # without a z-loss it is 0, also where all rows are ignored
    return total + z_total, z_total.detach().clone()


def check_losses(
    op: str,
    target: torch.Tensor,
    sizes: tuple[int, ...],
    class_weight: torch.Tensor | None,
    label_smoothing: float,
    logit_softcap: float | None,
    reduction: str,
) -> None:
    """Raise ValueError or TypeError for arguments that give no loss; sizes = [..., V] of the logits."""
    if target.is_floating_point() or target.dtype == torch.bool:
        raise TypeError(f"{op}: target is {target.dtype}; give indices, such as torch.int64.")
    if tuple(target.shape) != tuple(sizes[:-1]):
        raise ValueError(f"{op}: target has shape {tuple(target.shape)}; {tuple(sizes[:-1])} was expected: one a row.")
    if class_weight is not None and tuple(class_weight.shape) != (sizes[-1],):
        raise ValueError(f"{op}: class_weight has shape {tuple(class_weight.shape)}; ({sizes[-1]},) was expected.")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"{op}: label_smoothing={label_smoothing} was given; it must lie in [0, 1].")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"{op}: logit_softcap={logit_softcap} was given; it must be positive, or None for none.")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{op}: reduction={reduction!r} was asked; there are none, mean, sum.")


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def targets(classes: int, *sizes: int, ignored: int = -100) -> torch.Tensor:
        found = torch.randint(classes, sizes, generator=generator)
        found.view(-1)[1::4] = ignored
        return found

    for reduction in ("mean", "sum", "none"):
        yield {"logits": draw(12, 33), "target": targets(33, 12), "reduction": reduction}
        yield {"logits": draw(12, 33), "target": targets(33, 12), "reduction": reduction, "label_smoothing": 0.1}
        weighted = {"class_weight": draw(33).abs() + 0.5, "label_smoothing": 0.2, "z_loss": 0.01}
        yield {"logits": draw(12, 33), "target": targets(33, 12), "reduction": reduction} | weighted
    yield {"logits": draw(12, 33), "target": targets(33, 12), "class_weight": draw(33).abs() + 0.5}
    yield {"logits": draw(2, 5, 64), "target": targets(64, 2, 5, ignored=7), "ignore_index": 7, "z_loss": 1e-2}
    yield {"logits": draw(2, 9, 33), "target": targets(33, 2, 9, ignored=5), "ignore_index": 5}
    yield {"logits": draw(9, 64) * 8, "target": targets(64, 9), "logit_softcap": 3.0, "logit_scale": 0.5}
    yield {"logits": draw(0, 16), "target": targets(16, 0), "reduction": "sum"}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    return fewer_rows(arguments, "logits", target=0)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    logits = torch.randn(shape, generator=generator).to(dtype)
    return {"logits": logits, "target": torch.randint(shape[-1], shape[:-1], generator=generator)}


@fused_op(
    inputs=_inputs,
    differentiable=("logits",),
    shrink=_shrink,
    example=_example,
    sizes={"Llama 2": (4096, 32000), "Llama 3": (2048, 128256)},
)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """loss = (1 - e) w_t (lse - c_t) + e / V sum_i w_i (lse - c_i) + z_loss lse^2, and the last term alone.

    c = softcap tanh(logit_scale logits / softcap), or without softcap logit_scale logits; lse = log(sum(exp(c)));
    t = target, w = class_weight or 1, e = label_smoothing. Rows whose target is ignore_index are 0.
    reduction: "mean": over the rows that are not ignored, weighted by w_t (as torch); the z-loss not weighted. It is
    NaN when all are ignored, as torch's is. The second result is for logs: no gradient flows through it.

    Shapes: logits [..., V] (the classes last), target [...], class_weight [V] -> two of [...] or scalars.
    Dtypes: computed in float32 (float64 for float64 logits), and so are the results.
    Raises: ValueError for shapes that do not fit, label_smoothing outside [0, 1], softcap <= 0, unknown reduction;
    TypeError for a target that is no index.
    Source: torch.nn.functional.cross_entropy 2.13; z-loss: Chowdhery et al. 2022 (PaLM), section 5; softcap: Gemma 2.
    """
    check_losses("cross_entropy", target, tuple(logits.shape), class_weight, label_smoothing, logit_softcap, reduction)
    c = capped(logits, logit_scale, logit_softcap)
    lse = torch.logsumexp(c, -1)
    loss = row_losses(c, lse, target, class_weight, ignore_index, label_smoothing)
    z = torch.where(target == ignore_index, 0.0, z_loss * lse.square()) if z_loss else torch.zeros_like(lse)
    return reduced(loss, z, target, class_weight, ignore_index, reduction)
