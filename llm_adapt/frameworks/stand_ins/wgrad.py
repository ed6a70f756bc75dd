"""fused_weight_gradient_mlp_cuda: the weight gradient of a linear layer, added to the parameter's main_grad.

x [..., I] = input of the layer, dy [..., O] = gradient of its output, main_grad [O, I].
"""

from __future__ import annotations

from types import ModuleType

import torch

__all__ = ["modules", "wgrad_gemm_accum_fp16", "wgrad_gemm_accum_fp32"]


def wgrad_gemm_accum_fp32(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += dy^T x, accumulated in float32, in place, by the operator wgrad_accumulate.

    Shapes: total_input [..., I], grad_output [..., O], main_grad [O, I].
    Dtypes: inputs float32, float16 or bfloat16; main_grad float32; products and sums in float32.
    Raises: TypeError when main_grad is not float32; ValueError for shapes that do not fit.
    Source: NVIDIA apex, csrc/megatron/fused_weight_gradient_dense_cuda.cu (contract).
    """
    from llm_adapt.ops.wgrad_accumulate import wgrad_accumulate

    if main_grad.dtype != torch.float32:
        raise TypeError(f"main_grad of float32 was expected; found {main_grad.dtype}. Use wgrad_gemm_accum_fp16.")
    x, dy = _rows(total_input), _rows(grad_output)
    # On the CPU torch adds to float32 inside the product for float32 alone, which is faster than to add after it.
    if x.dtype != dy.dtype or x.device.type == "cpu":
        x, dy = x.float(), dy.float()
    wgrad_accumulate(x, dy, main_grad)


def wgrad_gemm_accum_fp16(total_input: torch.Tensor, grad_output: torch.Tensor, main_grad: torch.Tensor) -> None:
    """main_grad += dy^T x in the 16-bit dtype that all three share, in place.

    Shapes and source as for `wgrad_gemm_accum_fp32`.
    Raises: TypeError when the dtypes differ; ValueError for shapes that do not fit.
    """
    from llm_adapt.ops.wgrad_accumulate import wgrad_accumulate

    if not main_grad.dtype == total_input.dtype == grad_output.dtype:
        raise TypeError(f"One dtype was expected; found {total_input.dtype}, {grad_output.dtype}, {main_grad.dtype}.")
    wgrad_accumulate(_rows(total_input), _rows(grad_output), main_grad)


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.reshape(-1, x.shape[-1])


def modules() -> dict[str, ModuleType]:
    """The package as one module."""
    package = ModuleType("fused_weight_gradient_mlp_cuda", __doc__)
    package.wgrad_gemm_accum_fp32 = wgrad_gemm_accum_fp32  # type: ignore[attr-defined]
    package.wgrad_gemm_accum_fp16 = wgrad_gemm_accum_fp16  # type: ignore[attr-defined]
    return {"fused_weight_gradient_mlp_cuda": package}
