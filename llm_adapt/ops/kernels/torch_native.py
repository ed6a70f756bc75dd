"""Kernels that torch itself has. Source: torch 2.13 documentation of each function named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch.nn import functional as F

from llm_adapt.ops.attention_parts.cache import CacheRequest
from llm_adapt.ops.attention_parts.sdpa import sdpa, sdpa_of_cache, why_not_sdpa
from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.glu import split
from llm_adapt.ops.grouped_gemm import row_experts
from llm_adapt.ops.quantize_int8 import rounded_rows

__all__ = [
    "activation",
    "adamw",
    "add_rms_norm",
    "clip_grads",
    "cross_entropy",
    "decode_attention",
    "glu",
    "grouped_gemm",
    "layer_norm",
    "linear_int8",
    "multi_tensor_l2norm",
    "multi_tensor_scale",
    "rms_norm",
    "wgrad_accumulate",
]


def _mixed_dtypes(call: Call) -> str | None:
    if any(tensor.dtype != call.dtype for tensor in call.tensors.values()):
        return "takes tensors of one dtype"  # CUDA's layer_norm raises, and rms_norm is a composite with a warning
    return None


def _mixed_lists(call: Call) -> str | None:
    lists = ("params[", "grads[", "exp_avg", "max_exp_avg")
    dtypes = {tensor.dtype for name, tensor in call.tensors.items() if name.startswith(lists)}
    if len(dtypes) > 1:
        return "takes parameters, gradients and moments of one dtype"
    if any(tensor.dtype != torch.float32 for name, tensor in call.tensors.items() if name.startswith("state_steps")):
        return "takes state_steps of float32"
    return None


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
}


def _other_activations(call: Call) -> str | None:
    name = call.options.get("activation") or call.options["function"]
    if name not in _ACTIVATIONS:
        return f"torch has no {name}"
    if name == "gelu" and call.device == "npu":
        return "F.gelu computes the tanh form there, whatever is asked (aclnnGelu, torch_npu 2.13)"
    return _mixed_dtypes(call)


@kernel("activation", "torch.nn.functional", refuses=_other_activations, compilable=True, functorch=True)
def activation(
    x: torch.Tensor,
    bias: torch.Tensor | None = None,
    function: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "gelu",
) -> torch.Tensor:
    """F.gelu, F.silu and the like: one kernel that computes in float32 and reads and writes 16 bits."""
    return _ACTIVATIONS[function](x if bias is None else x + bias)


# Not compilable: torch 2.13 cannot functionalize it without AMSGrad ("mutating a non-functional tensor").
@kernel("adamw", "torch._fused_adamw_ and torch._fused_adam_ of torch 2.13", refuses=_mixed_lists)
def adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor] | None = None,
    state_steps: list[torch.Tensor] | None = None,
    grad_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
    decoupled: bool = True,
    maximize: bool = False,
) -> None:
    """The kernel behind torch.optim.AdamW(fused=True). It skips where found_inf is exactly 1, and counts no steps."""
    if not params:
        return
    is_bad = None if found_inf is None else (found_inf.reshape(()) != 0).float()
    if state_steps is None:
        steps = [torch.full((), float(step), device=params[0].device)] * len(params)
    else:
        torch._foreach_add_(state_steps, 1)
        steps = state_steps
    fused = torch._fused_adamw_ if decoupled else torch._fused_adam_
    fused(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        max_exp_avg_sqs or [],
        steps,
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=max_exp_avg_sqs is not None,
        maximize=maximize,
        grad_scale=None if grad_scale is None else grad_scale.float().reshape(()),
        found_inf=is_bad,
    )
    if state_steps is not None and is_bad is not None:
        torch._foreach_sub_(state_steps, [is_bad] * len(state_steps))


@kernel("add_rms_norm", "torch.nn.functional.rms_norm", refuses=_mixed_dtypes, compilable=True, functorch=True)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum, then F.rms_norm of it."""
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


def _not_one_kind(call: Call) -> str | None:
    lists = {(tensor.dtype, tensor.device) for name, tensor in call.tensors.items() if name.endswith("]")}
    if len(lists) != 1:
        return "takes tensors of one dtype and device, at least one"
    return None


@kernel("clip_grads", "torch._foreach_norm and torch._foreach_mul_ of torch 2.13", refuses=_not_one_kind)
def clip_grads(
    grads: list[torch.Tensor],
    total_norm: torch.Tensor | None = None,
    max_norm: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A few kernels for the whole list, as in torch.nn.utils.clip_grad_norm_(foreach=True)."""
    with torch.no_grad():
        norm = multi_tensor_l2norm(grads) if total_norm is None else total_norm.detach().clone().reshape(())
        torch._foreach_mul_(grads, (max_norm / (norm + eps)).clamp(max=1.0).to(grads[0].device))
        return norm


@kernel("attention", "scaled_dot_product_attention of torch 2.13", refuses=why_not_sdpa, compilable=True)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    seed: int = 0,
    max_seqlen_q: int = 0,
    max_seqlen_k: int = 0,
    deterministic: bool = False,
) -> torch.Tensor:
    """F.scaled_dot_product_attention: windows and bottom-right alignment as masks. Without dropout seed has no use."""
    return sdpa(q, k, v, mask, layout, causal, window_left, window_right, scale)


@kernel("cross_entropy", "torch.nn.functional.cross_entropy", compilable=True, functorch=True)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """F.cross_entropy of float32 logits: of 16-bit ones it would round the log-probabilities."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).reshape(-1, logits.shape[-1])
    weight = None if class_weight is None else class_weight.detach().to(wide.dtype)
    index = target.reshape(-1).long()
    loss = F.cross_entropy(wide, index, weight, None, ignore_index, None, reduction, label_smoothing)
    loss = loss.view(target.shape) if reduction == "none" else loss
    return loss, torch.zeros_like(loss, requires_grad=False)


@kernel("decode_attention", "scaled_dot_product_attention of torch 2.13", compilable=True)
def decode_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    cache_seqlens: torch.Tensor,
    block_table: torch.Tensor | None = None,
    cache_batch_idx: torch.Tensor | None = None,
    cache_leftpad: torch.Tensor | None = None,
    causal: Literal["none", "bottom_right"] = "bottom_right",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
) -> torch.Tensor:
    """F.scaled_dot_product_attention on a copy of the keys and values that are seen, in their own dtype."""
    cache = q, k_cache, v_cache, cache_seqlens, block_table, None, None, cache_batch_idx, cache_leftpad, None, None
    return sdpa_of_cache(CacheRequest(*cache, causal, window_left, window_right, scale, 0.0))


@kernel("glu", "torch.nn.functional", refuses=_other_activations, compilable=True, functorch=True)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
) -> torch.Tensor:
    """F.silu and the like of the gate, then the product, each one kernel on tensors of the dtype of x."""
    gate, linear = (x, up) if up is not None else split(x if bias is None else x + bias, layout)
    if up is not None and bias is not None:
        gate_bias, linear_bias = split(bias, layout)
        gate, linear = gate + gate_bias, linear + linear_bias
    return _ACTIVATIONS[activation](gate) * linear


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

    Columns are padded to 16 bytes, of which its strides must be multiples.
    """
    if not x.shape[0]:
        return x @ (weight.sum(0).t() if transposed else weight.sum(0))  # empty, with gradients of 0
    matrices = weight.transpose(1, 2) if transposed else weight
    inner, outer = (-size % (16 // x.element_size()) for size in matrices.shape[1:])
    if inner or outer:
        x, matrices = F.pad(x, (0, inner)), F.pad(matrices, (0, outer, 0, inner))
    expert = row_experts(tokens_per_expert, x.shape[0]).unsqueeze(1)
    is_row = expert < weight.shape[0]
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    y = F.grouped_mm(torch.where(is_row, x, 0), matrices, offs=ends)[:, : weight.shape[1 if transposed else 2]]
    if bias is not None:
        y = y + bias[expert.squeeze(1).clamp(max=weight.shape[0] - 1)]
    return torch.where(is_row, y, 0)


def _layer_norm(call: Call) -> str | None:
    is_16_bit = call.dtype in (torch.bfloat16, torch.float16)
    if call.device == "cpu" and is_16_bit and (call.weight is not None or call.bias is not None):
        return "adds up the gradients of weight and bias in 16 bits on the CPU"  # 5 % off at 512 rows, torch 2.13
    return _mixed_dtypes(call)


@kernel("layer_norm", "torch.nn.functional.layer_norm", refuses=_layer_norm, compilable=True, functorch=True)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """F.layer_norm, a fused kernel on CUDA and on the CPU."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def _not_for_int_mm(call: Call) -> str | None:
    if call.device not in ("cpu", "cuda"):
        return "torch._int_mm has kernels on the CPU and on CUDA"
    if call.x.shape[-1] == 1:
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
    with torch.no_grad():
        q, scale = rounded_rows(x, smooth_scale)
        product = torch._int_mm(q.reshape(-1, q.shape[-1]), weight.t()).view(*q.shape[:-1], weight.shape[0])
        y = product.float() * (scale.unsqueeze(-1) * weight_scale.float())
        return (y if bias is None else y + bias.float()).to(x.dtype)


@kernel("multi_tensor_l2norm", "torch._foreach_norm of torch 2.13", refuses=_not_one_kind)
def multi_tensor_l2norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A few kernels for the whole list."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    with torch.no_grad():
        norms = torch._foreach_norm(tensors, 2, wide)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


def _other_outputs(call: Call) -> str | None:
    if call.found_inf is not None and (call.found_inf.dtype != torch.float32 or call.found_inf.ndim > 1):
        return "takes a found_inf of float32"
    if call.dtype == torch.float64:
        return "scales by a float32 number"
    return _not_one_kind(call)


@kernel("multi_tensor_scale", "torch._amp_foreach_non_finite_check_and_unscale_ of torch 2.13", refuses=_other_outputs)
def multi_tensor_scale(
    tensors: list[torch.Tensor],
    outputs: list[torch.Tensor],
    device_scale: torch.Tensor | None = None,
    found_inf: torch.Tensor | None = None,
    scale: float = 1.0,
) -> None:
    """A copy of the list, then the kernel of torch.amp.GradScaler, which looks for inf and nan as it scales."""
    with torch.no_grad():
        device = outputs[0].device
        flag = torch.zeros(1, device=device) if found_inf is None else found_inf.reshape(1)
        factor = torch.full((1,), scale, device=device)
        if device_scale is not None:
            factor = factor * device_scale.to(device, torch.float32).reshape(1)
        if any(tensor is not output for tensor, output in zip(tensors, outputs, strict=True)):
            torch._foreach_copy_(outputs, tensors)
        torch._amp_foreach_non_finite_check_and_unscale_(outputs, flag, factor)


@kernel("rms_norm", "torch.nn.functional.rms_norm", refuses=_mixed_dtypes, compilable=True, functorch=True)
def rms_norm(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
    """F.rms_norm, a fused kernel on CUDA and a composite elsewhere."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def _not_for_addmm(call: Call) -> str | None:
    # baddbmm and addmm round what they return to the dtype of their inputs; only CUDA's can keep float32.
    if call.main_grad.dtype != call.x.dtype:
        return "addmm_ takes a main_grad of the dtype of x"
    return None


@kernel("wgrad_accumulate", "torch.Tensor.addmm_", refuses=_not_for_addmm, compilable=True)
def wgrad_accumulate(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor, accumulate: bool = True) -> None:
    """addmm_: the product is added inside the matrix product."""
    with torch.no_grad():
        columns = dy.reshape(-1, dy.shape[-1]).t()
        main_grad.addmm_(columns, x.reshape(-1, x.shape[-1]), beta=1 if accumulate else 0)
