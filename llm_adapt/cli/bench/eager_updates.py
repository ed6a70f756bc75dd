"""Eager, continued: lists of tensors as optimizers have them, accumulated gradients, and low precision."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from llm_adapt.cli.bench.counterparts import eager, only


def _adamw() -> Any:
    """torch.optim.adamw.adamw: torch.optim hides the module."""
    return importlib.import_module("torch.optim.adamw").adamw


@eager("adamw", "torch.optim.AdamW as it is by default on the device", only(decoupled=True, maximize=False))
def adamw(
    params: list[Tensor], grads: list[Tensor], exp_avgs: list[Tensor], exp_avg_sqs: list[Tensor], lr: float,
    beta1: float, beta2: float, eps: float, weight_decay: float, step: int,
) -> None:  # fmt: skip
    """The function behind the optimizer: a loop on the CPU, foreach on accelerators."""
    steps = [torch.tensor(float(step - 1)) for _ in params]
    with torch.no_grad():
        _adamw()(
            params, grads, exp_avgs, exp_avg_sqs, [], steps, foreach=params[0].device.type != "cpu", amsgrad=False,
            beta1=beta1, beta2=beta2, lr=lr, weight_decay=weight_decay, eps=eps, maximize=False,
        )  # fmt: skip


@eager("clip_grads", "torch.nn.utils.clip_grad_norm_, its two steps")
def clip_grads(grads: list[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Norms of all gradients, the norm of these, and a product that is always done."""
    norm = torch.nn.utils.get_total_norm(grads, norm_type)
    coefficient = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    torch._foreach_mul_(grads, coefficient)
    return norm.to(torch.promote_types(norm.dtype, torch.float32))


@eager("multi_tensor_l2norm", "torch.nn.utils.get_total_norm", only(per_tensor=False))
def l2norm(tensors: list[Tensor]) -> Tensor:
    """torch's norm of a list; of 16-bit tensors it is rounded to 16 bits."""
    return torch.nn.utils.get_total_norm(tensors).float()


@eager("multi_tensor_scale", "PyTorch: a product and a copy for each tensor (Megatron-Core without apex)")
def scale(tensors: list[Tensor], outputs: list[Tensor], scale: float) -> None:
    """The loop of Megatron-Core's local multi_tensor_scale."""
    with torch.no_grad():
        for tensor, output in zip(tensors, outputs, strict=True):
            output.copy_(tensor * scale)


@eager("wgrad_accumulate", "PyTorch: main_grad += dy^T x (Megatron-Core without gradient_accumulation_fusion)")
def accumulate(x: Tensor, dy: Tensor, main_grad: Tensor) -> None:
    """The product in the dtype of x, then the sum."""
    with torch.no_grad():
        main_grad.add_(dy.flatten(0, -2).t().matmul(x.flatten(0, -2)))


@eager("quantize_int8", "PyTorch, after quantize_activation_per_token_absmax of SmoothQuant")
def quantize_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row by its largest element, which is kept from 0."""
    wide = x.float()
    scale = wide.abs().amax(-1).clamp_(min=1e-5).div_(127)
    return (wide / scale[..., None]).round().to(torch.int8), scale


@eager("dequantize_int8", "PyTorch: a cast and a product")
def dequantize_int8(q: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """In float32, then the dtype."""
    return (q.float() * scale[..., None]).to(dtype)


@eager("linear_int8", "PyTorch: rounding of the rows as SmoothQuant has it, torch._int_mm, scales")
def linear_int8(x: Tensor, weight: Tensor, weight_scale: Tensor) -> Tensor:
    """Both scales after the product of integers."""
    q, scale = quantize_int8(x)
    return (torch._int_mm(q, weight.t()).float() * scale[..., None] * weight_scale).to(x.dtype)


@eager("quantize_fp8", "PyTorch, after act_quant of DeepSeek-V3.1 (ue8m0)", only(block="1x128", format="e4m3"))
def quantize_fp8(x: Tensor, block: str, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Tiles of 128 by their largest element, which is kept from 0; the scale is a power of two."""
    tiles = x.float().unflatten(-1, (-1, 128))
    amax = tiles.abs().amax(-1)
    scale = torch.exp2(torch.floor(torch.log2(448.0 / amax.clamp(min=1e-4))))
    q = (tiles * scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    return q.flatten(-2), 1 / scale, amax


@eager("dequantize_fp8", "PyTorch, after weight_dequant of DeepSeek-V3", only(block="1x128"))
def dequantize_fp8(q: Tensor, scale_inv: Tensor, block: str, dtype: torch.dtype) -> Tensor:
    """Tiles of 128 times their scale."""
    tiles: Tensor = q.float().unflatten(-1, (-1, 128)) * scale_inv[..., None]
    return tiles.flatten(-2).to(dtype)
