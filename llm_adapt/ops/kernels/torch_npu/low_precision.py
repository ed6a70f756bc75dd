"""int8 of torch_npu, for inference: npu_dynamic_quant by token, and npu_quant_matmul. K, N columns before and after.

npu_quant_matmul gives int8 unless it is told a dtype. The bias is added here: what it is added to there, sums or
scaled sums, depends on its dtype.
"""

from __future__ import annotations

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["linear_int8", "quantize_int8"]

_HALVES = (torch.float16, torch.bfloat16)


def _refuses(call: Call) -> str | None:
    if call.x.dtype not in _HALVES:
        return "takes x of float16 and bfloat16"
    if call.smooth_scale and call.smooth_scale.dtype != call.x.dtype:
        return "takes smooth_scale of the dtype of x"
    return None


def _linear_refuses(call: Call) -> str | None:
    if max(call.weight.shape) > 65535:
        return "takes at most 65535 columns"
    return _refuses(call)


@npu_kernel("quantize_int8", "npu_dynamic_quant", refuses=_refuses, has_backward=False)
def quantize_int8(x: torch.Tensor, smooth_scale: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """npu_dynamic_quant by token."""
    q, scale = torch_npu.npu_dynamic_quant(x, smooth_scales=smooth_scale)
    return q, scale


@npu_kernel("linear_int8", "npu_dynamic_quant", "npu_quant_matmul", refuses=_linear_refuses, has_backward=False)
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """npu_dynamic_quant, npu_quant_matmul with the scale of each token, then the bias."""
    q, scale = torch_npu.npu_dynamic_quant(x.reshape(-1, x.shape[-1]), smooth_scales=smooth_scale)
    y: torch.Tensor = torch_npu.npu_quant_matmul(
        q, weight.t(), weight_scale.float(), pertoken_scale=scale, output_dtype=x.dtype
    ).reshape(*x.shape[:-1], weight.shape[0])
    return y if bias is None else (y + bias).to(x.dtype)
