"""fp8 back to wider floating point. M and K = rows and columns, 128 = side of a block."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.dispatch import fused_op
from llm_adapt.ops.quantize_fp8 import FORMATS, times_scale

__all__ = ["dequantize_fp8"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator)

    yield {"q": draw(2, 8, 64).to(torch.float8_e4m3fn), "scale_inv": torch.tensor(0.3)}
    yield {"q": draw(5, 33).to(torch.float8_e5m2), "scale_inv": torch.tensor(0.3), "dtype": dtype}
    yield {"q": draw(3, 200).to(torch.float8_e4m3fn), "scale_inv": draw(3, 2), "block": "1x128", "dtype": torch.float16}
    yield {"q": draw(130, 140).to(torch.float8_e4m3fn), "scale_inv": draw(2, 2), "block": "128x128"}
    yield {"q": draw(0, 16).to(torch.float8_e4m3fn), "scale_inv": torch.tensor(0.3)}


@fused_op(inputs=_inputs, differentiable=(), oracle=None)
def dequantize_fp8(
    q: torch.Tensor,
    scale_inv: torch.Tensor,
    block: Literal["tensor", "1x128", "128x128"] = "tensor",
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """x = q * scale_inv of the tensor, or of the block.

    Shapes: q [..., K], scale_inv [], [..., ceil(K / 128)] or [ceil(M / 128), ceil(K / 128)] -> x as q.
    Dtypes: the product in float32, rounded once to dtype; no gradient.
    Raises: ValueError for shapes that do not fit; TypeError when q is not fp8.
    Source: the inverse of `quantize_fp8`.
    """
    if q.dtype not in FORMATS.values():
        raise TypeError(f"dequantize_fp8: q of float8_e4m3fn or float8_e5m2 was expected; found {q.dtype}.")
    if block == "tensor":
        expected, found = torch.Size([1]), torch.Size([scale_inv.numel()])
    elif block in ("1x128", "128x128"):
        rows = q.shape[:-1] if block == "1x128" else torch.Size([-(-q.shape[0] // 128)])
        expected, found = torch.Size([*rows, -(-q.shape[-1] // 128)]), scale_inv.shape
    else:
        raise ValueError(f"dequantize_fp8: block={block!r} is unknown; give 'tensor', '1x128' or '128x128'.")
    if found != expected or (block == "128x128" and q.ndim != 2):
        raise ValueError(
            f"dequantize_fp8: q {tuple(q.shape)} and scale_inv {tuple(scale_inv.shape)} do not fit block={block!r}."
        )
    with torch.no_grad():
        return times_scale(q.float(), scale_inv.float(), block).to(dtype)
