"""Weight gradient of a linear layer, added to what is there. I and O = columns of its input and output."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["wgrad_accumulate"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    wide = torch.promote_types(dtype, torch.float32)
    yield {"x": draw(4, 6, 16), "dy": draw(4, 6, 8), "main_grad": draw(8, 16, dtype=wide)}
    yield {"x": draw(33, 7), "dy": draw(33, 5), "main_grad": draw(5, 7)}
    yield {"x": draw(8, 16), "dy": draw(8, 8), "main_grad": draw(8, 16, dtype=wide), "accumulate": False}
    yield {"x": draw(0, 16), "dy": draw(0, 8), "main_grad": draw(8, 16, dtype=wide)}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    x, dy = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    wide = torch.promote_types(dtype, torch.float32)
    return {"x": x, "dy": dy, "main_grad": torch.zeros(shape[-1], shape[-1], dtype=wide)}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 256 columns of each and 1024 rows."""
    x, dy = (arguments[name].reshape(-1, arguments[name].shape[-1])[:1024, :256] for name in ("x", "dy"))
    return arguments | {"x": x, "dy": dy, "main_grad": arguments["main_grad"][:256, :256].contiguous()}


@fused_op(
    inputs=_inputs,
    differentiable=(),
    mutates=("main_grad",),
    shrink=_shrink,
    example=_example,
    sizes={"1024 wide": (4096, 1024)},
)
def wgrad_accumulate(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor, accumulate: bool = True) -> None:
    """main_grad += dy^T x, in place; with accumulate=False main_grad = dy^T x.

    Shapes: x [..., I] = input of the layer, dy [..., O] = gradient of its output, main_grad [O, I].
    Dtypes: x and dy of one dtype, main_grad float32 (float64 for float64) or the same dtype; products and sums,
        with main_grad, in float32 (float64), rounded once to the dtype of main_grad.
    Raises: TypeError for other dtypes; ValueError for shapes that do not fit.
    Source: NVIDIA apex csrc/megatron/fused_weight_gradient_dense_cuda.cu, wgrad_gemm_accum_fp32 and _fp16 (contract);
        Megatron-Core 0.16 core/tensor_parallel/layers.py.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.dtype != dy.dtype or main_grad.dtype not in (x.dtype, wide):
        raise TypeError(
            f"wgrad_accumulate: x and dy of one dtype and main_grad of it or {wide} were expected; found {x.dtype}, "
            f"{dy.dtype} and {main_grad.dtype}."
        )
    if x.shape[:-1] != dy.shape[:-1] or main_grad.shape != (dy.shape[-1], x.shape[-1]):
        raise ValueError(
            f"wgrad_accumulate: x [..., I], dy [..., O] and main_grad [O, I] were expected; found {tuple(x.shape)}, "
            f"{tuple(dy.shape)} and {tuple(main_grad.shape)}."
        )
    with torch.no_grad():
        product = dy.reshape(-1, dy.shape[-1]).t().to(wide) @ x.reshape(-1, x.shape[-1]).to(wide)
        main_grad.copy_(main_grad.to(wide) + product if accumulate else product)
