"""Gated linear units. D = width of the gate and of the linear part; x [..., 2D] holds both, or [..., D] the gate."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch

from llm_adapt.ops.activation import FUNCTIONS, check_bias, check_weights, fewer_rows
from llm_adapt.ops.dispatch import fused_op

__all__ = ["LAYOUTS", "glu", "split"]

LAYOUTS = ("halves", "halves_swapped", "interleaved")


def split(x: torch.Tensor, layout: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and linear part of a packed tensor, as views. Raises ValueError for an unknown layout."""
    if layout == "interleaved":
        return x[..., ::2], x[..., 1::2]
    if layout not in LAYOUTS:
        raise ValueError(f"glu: layout={layout!r} was asked; there are {', '.join(LAYOUTS)}.")
    first, second = x.chunk(2, -1)
    return (first, second) if layout == "halves" else (second, first)


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    for activation in FUNCTIONS:
        yield {"x": draw(2, 3, 32), "activation": activation}
        yield {"x": draw(5, 17), "up": draw(5, 17), "activation": activation}
    for layout in LAYOUTS:
        yield {"x": draw(5, 34), "bias": draw(34), "layout": layout}
        yield {"x": draw(5, 34), "layout": layout}
    gpt_oss = {"alpha": 1.702, "limit": 1.0, "up_offset": 1.0}
    yield {"x": draw(6, 32), "bias": draw(32), "layout": "interleaved"} | gpt_oss
    yield {"x": draw(6, 32), "weights": draw(6, 1).float(), "activation": "quick_gelu", "up_offset": 1.0}
    yield {"x": draw(6, 16), "up": draw(6, 16), "bias": draw(32), "weights": draw(6, 1)}
    yield {"x": draw(0, 32), "bias": draw(32)}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    return fewer_rows(arguments, "x", up=1, bias=1, weights=1)


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"x": torch.randn(shape, generator=generator).to(dtype)}


@fused_op(inputs=_inputs, shrink=_shrink, example=_example, sizes={"Llama 3 8B": (1, 4096, 28672)})
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
    alpha: float = 1.0,
    limit: float | None = None,
    up_offset: float = 0.0,
) -> torch.Tensor:
    """y = f(gate) * (up + up_offset) * weights: SwiGLU for f = silu, GeGLU for f = gelu.

    layout: of a packed x: "halves": the gate, then the linear part. "halves_swapped": the linear part first (GLU in
    torch). "interleaved": gate, linear, gate, linear ... (GPT-OSS). With `up` given, x is the gate.
    bias is added first, in the layout of x; next to a separate `up` it is [2D], the gate's first.
    limit: then gate = min(gate, limit), up = clamp(up, -limit, limit). alpha: silu(x) = x sigmoid(alpha x).
    weights: router probabilities, one a row. GPT-OSS: "interleaved", alpha=1.702, limit=7.0, up_offset=1.0.

    Shapes: x [..., 2D], or x and up [..., D]; bias [2D] or any that broadcasts to [..., 2D]; weights [..., 1]
    -> y [..., D].
    Dtypes: computed in float32 (float64 for float64 x) and rounded once; y has the dtype of x.
    Raises: ValueError for an unknown activation or layout, an odd last axis, a shape that does not fit, a layout of
    separate tensors, alpha without silu; TypeError for an `up` of another dtype.
    Source: Shazeer 2020, equations 5 and 6; GptOssExperts of transformers 5; fused_bias_swiglu and fused_bias_geglu
    of Megatron-Core 0.16.1 (whose fused clamped form clamps before it adds the bias; its unfused one is as here).
    """
    check_glu(x, up, activation, layout, alpha)
    if limit is not None and not limit > 0:
        raise ValueError(f"glu: limit={limit} was given; it must be positive, or None for no limit.")
    wide = torch.promote_types(x.dtype, torch.float32)
    gate, linear = (x, up) if up is not None else split(x, layout)
    gate, linear = gate.to(wide), linear.to(wide)
    if bias is not None:
        check_bias("glu", bias, torch.Size((*x.shape[:-1], 2 * gate.shape[-1])))
        gate_bias, linear_bias = split(bias, layout)
        gate, linear = gate + gate_bias.to(wide), linear + linear_bias.to(wide)
    if limit is not None:
        gate, linear = gate.clamp(max=limit), linear.clamp(-limit, limit)
    gate = FUNCTIONS[activation](gate) if alpha == 1.0 else gate * torch.sigmoid(alpha * gate)
    y = gate * (linear + up_offset if up_offset else linear)
    if weights is not None:
        check_weights("glu", weights, x.shape)
        y = y * weights.to(wide)
    return y.to(x.dtype)


def check_glu(x: torch.Tensor, up: torch.Tensor | None, activation: str, layout: str, alpha: float) -> None:
    """Raise for arguments that the op does not take."""
    if activation not in FUNCTIONS:
        raise ValueError(f"glu: activation={activation!r} was asked; there are {', '.join(FUNCTIONS)}.")
    if layout not in LAYOUTS:
        raise ValueError(f"glu: layout={layout!r} was asked; there are {', '.join(LAYOUTS)}.")
    if alpha != 1.0 and activation != "silu":
        raise ValueError(f"glu: alpha={alpha} was given with activation={activation!r}; alpha belongs to 'silu'.")
    if up is None:
        if x.shape[-1] % 2:
            raise ValueError(f"glu: x has a last axis of {x.shape[-1]}; both parts need an even one, or give `up`.")
        return
    if layout != "halves":
        raise ValueError(f"glu: layout={layout!r} was given with a separate `up`; leave the layout out.")
    if up.shape != x.shape:
        raise ValueError(f"glu: up has shape {tuple(up.shape)} and x {tuple(x.shape)}; they must be equal.")
    if up.dtype != x.dtype:
        raise TypeError(f"glu: up is {up.dtype} and x {x.dtype}; cast one of them.")
