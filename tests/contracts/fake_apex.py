"""What the sources of apex show of the functions that we call, in float64. H hidden size, S positions, D head size."""

from __future__ import annotations

from typing import Any

import torch

from tests.contracts.recording import demand

__all__ = ["MODULES"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _norm(x: torch.Tensor, shape: Any, weight: Any, bias: Any, eps: float, is_rms: bool) -> torch.Tensor:
    demand(tuple(shape) == tuple(x.shape[-1:]) and x.dtype in FLOATS, "normalized_shape is the last axis")
    demand(all(t is None or t.dtype == x.dtype for t in (weight, bias)), "the affine function takes one dtype")
    wide = x.double()
    centered = wide if is_rms else wide - wide.mean(-1, keepdim=True)
    y = centered * (centered.square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y if weight is None else y * weight.double()
    return (y if bias is None else y + bias.double()).to(x.dtype)


def fused_rms_norm_affine(input: Any, weight: Any, normalized_shape: Any, eps: float, memory_efficient: bool) -> Any:
    """RMSNorm with a weight."""
    return _norm(input, normalized_shape, weight, None, eps, is_rms=True)


def fused_rms_norm(input: Any, normalized_shape: Any, eps: float, memory_efficient: bool) -> Any:
    """RMSNorm without a weight."""
    return _norm(input, normalized_shape, None, None, eps, is_rms=True)


def fused_layer_norm_affine(input: Any, weight: Any, bias: Any, normalized_shape: Any, eps: float, **_: Any) -> Any:
    """LayerNorm with weight and bias."""
    return _norm(input, normalized_shape, weight, bias, eps, is_rms=False)


def fused_layer_norm(input: Any, normalized_shape: Any, eps: float, memory_efficient: bool) -> Any:
    """LayerNorm without."""
    return _norm(input, normalized_shape, None, None, eps, is_rms=False)


def fused_apply_rotary_pos_emb_cached(t: Any, cos: Any, sin: Any, transpose_output_memory: bool) -> torch.Tensor:
    """t [S, B, H, D] turned by half pairs of the first columns; the tables are cast to the dtype of t."""
    demand(t.ndim == 4 and cos.shape == sin.shape == (t.shape[0], 1, 1, cos.shape[-1]), "tables are [S, 1, 1, D]")
    width = cos.shape[-1]
    x, rest = t[..., :width].double(), t[..., width:].double()
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    y = x * cos.to(t.dtype).double() + turned * sin.to(t.dtype).double()
    return torch.cat([y, rest], -1).to(t.dtype)


def multi_tensor_applier(op: Any, noop_flag_buffer: Any, tensor_lists: Any, *args: Any) -> None:
    """Calls the function on the lists, by chunks."""
    op(2048 * 32, noop_flag_buffer, tensor_lists, *args)


def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Any,
    tensor_lists: Any,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Adam: mode 0 adds the decay to the gradient, 1 takes it off the parameter; moments are float32."""
    demand(noop_flag.dtype == torch.int32 and not bool(noop_flag.any()), "noop_flag is an int32 of 0")
    correction = [1 - beta**step if bias_correction else 1.0 for beta in (beta1, beta2)]
    for g_, p_, m_, v_ in zip(*tensor_lists, strict=True):
        demand(g_.dtype == p_.dtype and m_.dtype == v_.dtype == torch.float32, "g and p of one dtype, m and v float32")
        g, p, m, v = (t.double() for t in (g_, p_, m_, v_))
        g = g + weight_decay * p if mode == 0 else g
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        update = (m / correction[0]) / ((v / correction[1]).sqrt() + epsilon)
        p_.copy_(p - lr * (update + weight_decay * p if mode == 1 else update))
        m_.copy_(m), v_.copy_(v)


def _accumulate(input: Any, grad_output: Any, main_grad: Any, dtype: torch.dtype) -> None:
    demand(input.ndim == grad_output.ndim == 2 and input.is_contiguous() and grad_output.is_contiguous(), "matrices")
    demand(main_grad.dtype == dtype and input.dtype == grad_output.dtype, f"main_grad is {dtype}")
    main_grad.copy_(main_grad.double() + grad_output.double().t() @ input.double())


def wgrad_gemm_accum_fp32(input: Any, grad_output: Any, main_grad: Any) -> None:
    """main_grad += grad_output^T input in float32."""
    _accumulate(input, grad_output, main_grad, torch.float32)


def wgrad_gemm_accum_fp16(input: Any, grad_output: Any, main_grad: Any) -> None:
    """The same in the dtype of input."""
    _accumulate(input, grad_output, main_grad, input.dtype)


MODULES: dict[str, dict[str, Any]] = {
    "apex": {},
    "apex.normalization.fused_layer_norm": {
        f.__name__: f for f in (fused_rms_norm_affine, fused_rms_norm, fused_layer_norm_affine, fused_layer_norm)
    },
    "apex.transformer.functional": {"fused_apply_rotary_pos_emb_cached": fused_apply_rotary_pos_emb_cached},
    "apex.multi_tensor_apply": {"multi_tensor_applier": multi_tensor_applier},
    "amp_C": {"multi_tensor_adam": multi_tensor_adam},
    "fused_layer_norm_cuda": {},
    "fused_rotary_positional_embedding": {},
    "fused_weight_gradient_mlp_cuda": {f.__name__: f for f in (wgrad_gemm_accum_fp32, wgrad_gemm_accum_fp16)},
}
