"""RMSNorm. x [..., H] = hidden states, weight [H].

Also what the other norms share with it: the forms of a weight, and the dtype of a result.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import torch

from llm_adapt.ops.dispatch import HIDDEN_SIZES, fused_op

__all__ = ["rms_norm"]

Form: TypeAlias = Literal["standard", "cast_first", "one_plus", "one_plus_rounded"]
ResultDtype: TypeAlias = Literal["x", "weight", "promoted"]
FORMS = ("standard", "cast_first", "one_plus", "one_plus_rounded")
RESULT_DTYPES = ("x", "weight", "promoted")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_FEW = 2**18  # elements of x that a proof of a large call keeps


def shrink_rows(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with fewer rows. The axis that is normalised keeps its size: kernels differ by it."""
    rows = ["x", *(name for name in ("residual",) if name in arguments)]
    sizes = list(arguments["x"].shape)
    # Bounded by the number of axes: an axis of one row cannot be narrowed again.
    while len(sizes) > 1 and (longest := max(sizes[:-1])) > 1 and torch.Size(sizes).numel() > _FEW:
        sizes[sizes.index(longest)] = (longest + 1) // 2
    return arguments | {name: _corner(arguments[name], sizes) for name in rows}


def _corner(tensor: torch.Tensor, sizes: list[int]) -> torch.Tensor:
    part = tensor[tuple(slice(size) for size in sizes)]
    return part.contiguous() if tensor.is_contiguous() else part


def check_norm(op: str, x: torch.Tensor, options: Mapping[str, tuple[str, tuple[str, ...]]], **vectors: Any) -> None:
    """Raise for arguments that the norm does not take.

    Args:
        options: form and result_dtype -> the value asked for, and those that there are, the default first.
        vectors: weight, and bias where the norm has one.
    """
    for option, (value, known) in options.items():
        if value not in known:
            raise ValueError(f"{op}: {option}={value!r} was asked; pass one of {', '.join(known)}.")
        if vectors["weight"] is None and value not in (known[0], "x"):
            raise ValueError(f"{op}: {option}={value!r} speaks of weight, and there is none; pass weight.")
    if x.dtype not in FLOATS:
        raise TypeError(f"{op}: x is {x.dtype}; pass float16, bfloat16, float32 or float64.")
    if x.ndim == 0:
        raise ValueError(f"{op}: x is a scalar; pass at least one axis, the last of which is normalised.")
    for name, vector in vectors.items():
        if vector is None:
            continue
        if vector.dtype not in FLOATS:
            raise TypeError(f"{op}: {name} is {vector.dtype}; pass float16, bfloat16, float32 or float64.")
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} has shape {tuple(vector.shape)} and x {tuple(x.shape)}; pass a {name} of the size of "
                "the last axis of x. To normalise several axes, flatten them in all of the tensors."
            )


def result_of(result_dtype: str, x: torch.dtype, weight: torch.Tensor | None) -> torch.dtype:
    """The dtype that a result_dtype stands for, x being the dtype of what is normalised."""
    if weight is None or result_dtype in ("x", "sum"):
        return x
    return weight.dtype if result_dtype == "weight" else torch.promote_types(x, weight.dtype)


def weighted(y: torch.Tensor, weight: torch.Tensor | None, form: str, narrow: torch.dtype) -> torch.Tensor:
    """y * weight as the form says; narrow is the dtype that "cast_first" rounds y to."""
    if weight is None:
        return y
    if form == "cast_first":
        return weight * y.to(narrow)
    if form == "one_plus_rounded":
        return y * (weight + 1).to(y.dtype)
    w = weight.to(y.dtype)
    return y * (w + 1) if form == "one_plus" else y * w


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps), in float32 or wider."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    yield {"x": draw(2, 8, 64), "weight": draw(64)}
    yield {"x": draw(3, 65), "weight": draw(65), "eps": 1e-5, "form": "cast_first"}
    yield {"x": draw(16, 1, 128), "weight": draw(128), "form": "one_plus"}
    yield {"x": draw(16, 32), "weight": draw(32), "form": "one_plus_rounded"}
    yield {"x": draw(5, 48)}
    yield {"x": draw(0, 16), "weight": draw(16)}
    yield {"x": draw(2, 3, 4, 8).transpose(1, 2), "weight": draw(8)}
    yield {"x": draw(7, 40), "weight": draw(40).float()}
    yield {"x": draw(7, 40), "weight": draw(40).float(), "result_dtype": "promoted"}
    yield {"x": draw(7, 40).float(), "weight": draw(40), "form": "one_plus", "result_dtype": "weight"}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x = torch.randn(shape, generator=generator).to(dtype)
    return {"x": x, "weight": torch.rand(shape[-1], generator=generator).to(dtype)}


@fused_op(inputs=_inputs, shrink=shrink_rows, example=_example, sizes=HIDDEN_SIZES)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Form = "standard",
    result_dtype: ResultDtype = "x",
) -> torch.Tensor:
    """y = x / sqrt(mean(x^2) + eps) * w over the last axis.

    form: "standard": w = weight, rounded once (torch.nn.RMSNorm; GPT-OSS in transformers).
    "cast_first": the normalised x is rounded to the dtype of x before it is multiplied (Llama in transformers).
    "one_plus": w = 1 + weight in float32, rounded once (Gemma in transformers; zero-centered gamma in
    TransformerEngine). "one_plus_rounded": w = 1 + weight in the dtype of weight (zero-centered gamma where
    Megatron-Core adds it).
    result_dtype: the dtype of y: "x" = that of x; "weight" = that of weight (apex's mixed norms); "promoted" = that
    of their product in torch (Llama in transformers with a float32 weight).

    Shapes: x [..., H], weight [H] or None -> y [..., H].
    Dtypes: float16, bfloat16, float32 and float64, x and weight each its own. Computed in float32 (float64 for
    float64 x), rounded where form says and to result_dtype.
    Raises: TypeError for other dtypes; ValueError for a weight of another size, an unknown option, and a form or a
    result_dtype that speaks of a weight where there is none.
    Source: Zhang and Sennrich 2019, equation 4; transformers 5 modeling_llama.py, modeling_gemma.py and
    modeling_gpt_oss.py; Megatron-Core 0.16.1 fusions/fused_layer_norm.py.
    """
    check_norm("rms_norm", x, {"form": (form, FORMS), "result_dtype": (result_dtype, RESULT_DTYPES)}, weight=weight)
    return weighted(normalised(x, eps), weight, form, x.dtype).to(result_of(result_dtype, x.dtype, weight))
