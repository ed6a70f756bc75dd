"""torch's matrix products. Source: torch 2.13 of each function named."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.grouped_gemm import row_experts
from llm_adapt.ops.kernels.torch_native.low_precision import quantized_rows
from llm_adapt.ops.quantize_int8 import rounded_rows

__all__ = ["grouped_gemm", "linear_int8", "wgrad_accumulate"]

_LEAST = 2**22  # multiplications of a product that is worth two


def _not_for_grouped_mm(call: Call) -> str | None:
    if call.x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return "torch.nn.functional.grouped_mm takes float32, float16 and bfloat16"
    if call.x.dtype != call.weight.dtype:
        return "x and weight must have one dtype"
    if call.is_compiling and call.x.dtype != torch.bfloat16:
        return "is traced by torch.compile for bfloat16 only (its meta function in torch 2.13)"
    return None


@kernel("grouped_gemm", "torch.nn.functional.grouped_mm", refuses=_not_for_grouped_mm, compilable=True)
def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """F.grouped_mm between two masks: it leaves the rows beyond the sum unset, in y and in the gradient of x.

    Columns are padded to 16 bytes, of which its strides must be multiples. Workaround: grouped-mm-unset-rows
    """
    if not x.shape[0]:
        return x @ (weight.sum(0).t() if transposed else weight.sum(0))  # empty, with gradients of 0
    matrices = weight.transpose(1, 2) if transposed else weight
    inner, outer = (-size % (16 // x.element_size()) for size in matrices.shape[1:])
    if inner or outer:
        x, matrices = F.pad(x, (0, inner)), F.pad(matrices, (0, outer, 0, inner))
    columns = weight.shape[1 if transposed else 2]
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    if bias is None and _are_all_there(tokens_per_expert, x.shape[0]):
        y = F.grouped_mm(x, matrices, offs=ends)[:, :columns]
        if y.requires_grad:
            y.register_hook(torch.Tensor.contiguous)  # the gradient of a sum has strides of 0, which it refuses
        return y
    expert = row_experts(tokens_per_expert, x.shape[0]).unsqueeze(1)
    is_row = expert < weight.shape[0]
    y = F.grouped_mm(torch.where(is_row, x, 0), matrices, offs=ends)[:, :columns]
    if bias is not None:
        y = y + bias[expert.squeeze(1).clamp(max=weight.shape[0] - 1)]
    return torch.where(is_row, y, 0)


def _are_all_there(tokens_per_expert: torch.Tensor, rows: int) -> bool:
    """Whether every row is known to belong to an expert: counts on a device are not waited for."""
    if tokens_per_expert.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return int(tokens_per_expert.sum()) == rows


def _not_for_int_mm(call: Call) -> str | None:
    if call.device not in ("cpu", "cuda"):
        return "torch._int_mm has kernels on the CPU and on CUDA"
    if call.x.shape[-1] == 1:  # Workaround: int-mm-one-column
        return "torch._int_mm of torch 2.13 is wrong for one column on the CPU"
    rows = call.x.shape[:-1].numel()
    if call.device == "cuda" and (rows <= 16 or any(size % 8 for size in call.weight.shape)):
        return "torch._int_mm takes more than 16 rows, and columns in eights"
    return None


@kernel("linear_int8", "torch._int_mm of torch 2.13", refuses=_not_for_int_mm)
def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None = None,
    smooth_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """The product of integers in one kernel."""
    x, weight_scale = x.detach(), weight_scale.detach()  # less costly than no_grad
    is_blocked = x.device.type == "cpu" and x.dtype != torch.float64
    smooth_scale = None if smooth_scale is None else smooth_scale.detach()
    q, scale = (quantized_rows if is_blocked else rounded_rows)(x, smooth_scale)
    product = torch._int_mm(q.reshape(-1, q.shape[-1]), weight.t()).view(*q.shape[:-1], weight.shape[0])
    y = product.float().mul_(scale.unsqueeze(-1)).mul_(weight_scale.float())
    return (y if bias is None else y.add_(bias.detach().float())).to(x.dtype)


def _not_for_addmm(call: Call) -> str | None:
    # baddbmm and addmm round what they return to the dtype of their inputs; only CUDA's can keep float32.
    if call.main_grad.dtype == call.x.dtype:
        return None
    if call.device != "cpu" or call.x.dtype != torch.bfloat16 or call.is_compiling:
        return "addmm_ takes a main_grad of the dtype of x"
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no product of bfloat16"
    if call.x.shape.numel() * call.dy.shape[-1] < _LEAST:
        return f"takes two products of bfloat16 from {_LEAST} multiplications on"
    return None


@kernel("wgrad_accumulate", "torch.Tensor.addmm_", refuses=_not_for_addmm, compilable=True)
def wgrad_accumulate(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor, accumulate: bool = True) -> None:
    """addmm_: the product is added inside the matrix product.

    A float32 main_grad on the CPU: the product rounded to bfloat16, then the product less that, again rounded; the
    sum of both has 16 bits, for two fast products in the place of one in float32.
    """
    with torch.no_grad():
        columns, rows = dy.reshape(-1, dy.shape[-1]).t(), x.reshape(-1, x.shape[-1])
        if main_grad.dtype == x.dtype:
            main_grad.addmm_(columns, rows, beta=1 if accumulate else 0)
            return
        product = columns @ rows
        main_grad.add_(product) if accumulate else main_grad.copy_(product)
        main_grad.add_(product.neg_().addmm_(columns, rows))
