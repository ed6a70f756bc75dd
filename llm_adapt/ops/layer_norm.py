"""LayerNorm. x [..., H] = hidden states, weight [H], bias [H]."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch

from llm_adapt.ops.dispatch import HIDDEN_SIZES, fused_op
from llm_adapt.ops.rms_norm import RESULT_DTYPES, ResultDtype, check_norm, result_of, shrink_rows, weighted

__all__ = ["layer_norm"]

Form: TypeAlias = Literal["standard", "one_plus", "one_plus_rounded"]
FORMS = ("standard", "one_plus", "one_plus_rounded")


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 8, 64), "weight": draw(64), "bias": draw(64)}
    yield {"x": draw(3, 65), "weight": draw(65), "eps": 1e-6}
    yield {"x": draw(16, 1, 128), "weight": draw(128), "bias": draw(128), "form": "one_plus"}
    yield {"x": draw(16, 32), "weight": draw(32), "bias": draw(32), "form": "one_plus_rounded"}
    yield {"x": draw(5, 48)}
    yield {"x": draw(5, 48), "bias": draw(48)}
    yield {"x": draw(0, 16), "weight": draw(16), "bias": draw(16)}
    yield {"x": draw(2, 3, 4, 8).transpose(1, 2), "weight": draw(8)}
    yield {"x": draw(7, 40), "weight": draw(40).float(), "bias": draw(40).float()}
    yield {"x": draw(7, 40), "weight": draw(40).float(), "bias": draw(40).float(), "result_dtype": "promoted"}
    yield {"x": draw(7, 40).float(), "weight": draw(40), "bias": draw(40), "result_dtype": "weight"}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x = torch.randn(shape, generator=generator).to(dtype)
    weight, bias = (torch.rand(shape[-1], generator=generator).to(dtype) for _ in range(2))
    return {"x": x, "weight": weight, "bias": bias}


@fused_op(inputs=_inputs, shrink=shrink_rows, example=_example, sizes=HIDDEN_SIZES)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    form: Form = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """y = (x - mean(x)) / sqrt(mean((x - mean(x))^2) + eps) * w + bias over the last axis.

    form: "standard": w = weight. "one_plus": w = 1 + weight in float32 (zero-centered gamma in TransformerEngine).
    "one_plus_rounded": w = 1 + weight in the dtype of weight (zero-centered gamma in Megatron-Core, LayerNorm1P of
    Nemotron in transformers).
    result_dtype: the dtype of y: "x" = that of x; "weight" = that of weight (apex's MixedFusedLayerNorm);
    "promoted" = that of their product in torch.

    Shapes: x [..., H], weight [H] or None, bias [H] or None -> y [..., H].
    Dtypes: float16, bfloat16, float32 and float64, each tensor its own. Computed in float32 (float64 for float64 x),
    rounded once, to result_dtype.
    Raises: TypeError for other dtypes; ValueError for a weight or bias of another size, an unknown option, and a form
    or a result_dtype that speaks of a weight where there is none.
    Source: Ba, Kiros and Hinton 2016, equation 4; torch.nn.LayerNorm of torch 2.13; Megatron-Core 0.16.1
    fusions/fused_layer_norm.py; transformers 5 modeling_nemotron.py.
    """
    options = {"form": (form, FORMS), "result_dtype": (result_dtype, RESULT_DTYPES)}
    check_norm("layer_norm", x, options, weight=weight, bias=bias)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = wide - wide.mean(-1, keepdim=True)
    y = centered * torch.rsqrt(centered.square().mean(-1, keepdim=True) + eps)
    y = weighted(y, weight, form, x.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(result_of(result_dtype, x.dtype, weight))
