"""RMSNorm of a sum. x, residual [..., H] = hidden states, weight [H]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch

from llm_adapt.ops.dispatch import HIDDEN_SIZES, fused_op
from llm_adapt.ops.rms_norm import FLOATS, FORMS, Form, check_norm, normalised, result_of, shrink_rows, weighted

__all__ = ["add_rms_norm"]

ResultDtype: TypeAlias = Literal["sum", "x", "weight", "promoted"]
RESULT_DTYPES = ("sum", "x", "weight", "promoted")


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 8, 64), "residual": draw(2, 8, 64), "weight": draw(64)}
    yield {"x": draw(3, 65), "residual": draw(3, 65), "weight": draw(65), "eps": 1e-5, "form": "cast_first"}
    yield {"x": draw(16, 1, 128), "residual": draw(16, 1, 128), "weight": draw(128), "form": "one_plus"}
    yield {"x": draw(16, 32), "residual": draw(16, 32), "weight": draw(32), "form": "one_plus_rounded"}
    yield {"x": draw(5, 48), "residual": draw(5, 48)}
    yield {"x": draw(0, 16), "residual": draw(0, 16), "weight": draw(16)}
    yield {"x": draw(6, 4, 8).transpose(0, 1), "residual": draw(4, 6, 8), "weight": draw(8)}
    yield {"x": draw(7, 40), "residual": draw(7, 40).float(), "weight": draw(40).float()}
    yield {"x": draw(7, 40), "residual": draw(7, 40).float(), "weight": draw(40), "result_dtype": "promoted"}
    yield {"x": draw(7, 40), "residual": draw(7, 40).float(), "weight": draw(40), "result_dtype": "weight"}
    yield {"x": draw(7, 40), "residual": draw(7, 40).float(), "weight": draw(40), "result_dtype": "x"}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x, residual = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "residual": residual, "weight": torch.rand(shape[-1], generator=generator).to(dtype)}


@fused_op(inputs=_inputs, shrink=shrink_rows, example=_example, sizes=HIDDEN_SIZES)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: ResultDtype = "sum",
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, h): h = x + residual, y = rms_norm(h, weight, eps, form).

    form: as of rms_norm, with h in the place of x.
    result_dtype: the dtype of y: "sum" = that of h; "x" = that of x, which may be narrower than the residual
    (Megatron's fp32_residual_connection); "weight" = that of weight; "promoted" = that of h * weight in torch.

    Shapes: x [..., H], residual [..., H], weight [H] or None -> y [..., H], h [..., H].
    Dtypes: float16, bfloat16, float32 and float64, each tensor its own. h has the dtype that x + residual has in
    torch and is rounded to it before it is normalised, in float32 (float64 for float64 h).
    Raises: as rms_norm; ValueError for x and residual of different shapes: none is broadcast.
    Source: the two lines of modeling_llama.py in transformers 5 (residual + hidden_states, then the norm);
    Zhang and Sennrich 2019, equation 4.
    """
    if residual.shape != x.shape:
        raise ValueError(
            f"add_rms_norm: x has shape {tuple(x.shape)} and residual {tuple(residual.shape)}; pass equal shapes."
        )
    if residual.dtype not in FLOATS:
        raise TypeError(f"add_rms_norm: residual is {residual.dtype}; pass float16, bfloat16, float32 or float64.")
    options = {"form": (form, FORMS), "result_dtype": (result_dtype, RESULT_DTYPES)}
    check_norm("add_rms_norm", x, options, weight=weight)
    h = x + residual
    dtype = x.dtype if result_dtype == "x" else result_of(result_dtype, h.dtype, weight)
    return weighted(normalised(h, eps), weight, form, h.dtype).to(dtype), h
