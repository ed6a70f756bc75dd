"""Linear layer on int8 weights. K and N = columns of its input and output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.quantize_int8 import rounded_rows

__all__ = ["linear_int8"]

_EXACT = 1024  # 1024 * 127^2 < 2^24: sums of so many products are exact in float32, and in TF32


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    weight = torch.randint(-127, 128, (8, 48), generator=generator).to(torch.int8)
    scale = torch.rand(8, generator=generator) / 100
    yield {"x": draw(2, 5, 48), "weight": weight, "weight_scale": scale}
    yield {"x": draw(9, 48), "weight": weight, "weight_scale": scale, "bias": draw(8), "smooth_scale": draw(48).abs()}
    yield {"x": draw(0, 48), "weight": weight, "weight_scale": scale}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 64 rows and 256 outputs; the inputs of a row stay, which the scale is of."""
    bias = arguments["bias"]
    return arguments | {
        "x": arguments["x"].reshape(-1, arguments["x"].shape[-1])[:64],
        "weight": arguments["weight"][:256],
        "weight_scale": arguments["weight_scale"][:256],
        "bias": None if bias is None else bias[:256],
    }


@fused_op(inputs=_inputs, differentiable=(), oracle=None, shrink=_shrink)
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """y = (q @ weight^T) * scale * weight_scale + bias; q and scale of each row of x are those of `quantize_int8`.

    Shapes: x [..., K], weight [N, K] int8, weight_scale and bias [N], smooth_scale [K] -> y [..., N].
    Dtypes: the product of integers is exact; it is scaled, and the bias added, in float32; y has the dtype of x.
        For inference: no gradient.
    Raises: ValueError for shapes that do not fit; TypeError when weight is not int8.
    Source: torch_npu 2.13 npu_dynamic_quant with npu_quant_matmul(pertoken_scale=...).
    """
    if weight.dtype != torch.int8:
        raise TypeError(f"linear_int8: weight of int8 was expected; found {weight.dtype}. Use quantize_int8.")
    if weight.ndim != 2 or x.shape[-1:] != weight.shape[1:] or weight_scale.shape != weight.shape[:1]:
        raise ValueError(
            f"linear_int8: x [..., K], weight [N, K] and weight_scale [N] were expected; found {tuple(x.shape)}, "
            f"{tuple(weight.shape)} and {tuple(weight_scale.shape)}."
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_int8: bias must be of shape {tuple(weight.shape[:1])}; found {tuple(bias.shape)}.")
    with torch.no_grad():
        q, scale = rounded_rows(x, smooth_scale)
        y = _exact_product(q, weight).float() * (scale.unsqueeze(-1) * weight_scale.float())
        return (y if bias is None else y + bias.float()).to(x.dtype)


def _exact_product(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """q @ weight^T in int32, on any device that multiplies float32: few have a product of integers."""
    total = torch.zeros(*q.shape[:-1], weight.shape[0], dtype=torch.int32, device=q.device)
    for start in range(0, q.shape[-1], _EXACT):
        part = slice(start, start + _EXACT)
        total = total + (q[..., part].float() @ weight[:, part].float().t()).to(torch.int32)
    return total
