"""torch.ops.torch_mlu: the fused optimizer operators whose signature is recorded, in float32.

Schemas: codegen/mlu_functions.yaml of torch_mlu d578002. There is no RMSNorm, RoPE, SwiGLU or cross entropy among
them. fused_sgd, fused_lamb, amp_unscale and mask_softmax_dropout exist there too; what they return is not recorded.
"""

from __future__ import annotations

import torch

__all__ = ["register"]

_library: torch.library.Library | None = None

_FUSED_ADAM = (
    "fused_adam(Tensor _dummy_overflow_buf, Tensor[] grads, Tensor(a!)[] params, Tensor(b!)[] exp_avgs, "
    "Tensor(c!)[] exp_avg_sqs, float lr, float beta1, float beta2, float eps, int step, int mode, "
    "int bias_correction, float weight_decay) -> bool"
)
_L2_NORM = "fused_l2_norm(Tensor _dummy_overflow_buf, Tensor[] inputs, bool per_tensor) -> (Tensor, Tensor)"


def fused_adam(
    overflow: torch.Tensor,
    grads: list[torch.Tensor],
    params: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> bool:
    """Adam (mode 0: weight decay in the gradient) or AdamW (mode 1), one step for all; the moments are float32."""
    for moment in (*exp_avgs, *exp_avg_sqs):
        if moment.dtype != torch.float32:
            raise RuntimeError(f"torch_mlu::fused_adam keeps float32 moments; {moment.dtype} was given.")
    if mode not in (0, 1):
        raise ValueError(f"torch_mlu::fused_adam has modes 0 (Adam) and 1 (AdamW); {mode} was given.")
    first = 1 - beta1**step if bias_correction else 1.0
    second = 1 - beta2**step if bias_correction else 1.0
    for grad, param, exp_avg, exp_avg_sq in zip(grads, params, exp_avgs, exp_avg_sqs, strict=True):
        g, p = grad.float(), param.float()
        if mode == 0:
            g = g + weight_decay * p
        exp_avg.mul_(beta1).add_(g, alpha=1 - beta1)
        exp_avg_sq.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        update = (exp_avg / first) / ((exp_avg_sq / second).sqrt() + eps)
        if mode == 1:
            update = update + weight_decay * p
        param.copy_(p - lr * update)
    return True


def fused_l2_norm(
    overflow: torch.Tensor, inputs: list[torch.Tensor], per_tensor: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm of all, norm of each): sqrt(sum x^2) in float32; the second is empty without per_tensor."""
    norms = torch.stack([tensor.float().norm() for tensor in inputs])
    return norms.norm().reshape(1), norms if per_tensor else norms.new_empty(0)


def register() -> None:
    """Define the operators for the device."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("torch_mlu", "DEF")
    for schema, function in ((_FUSED_ADAM, fused_adam), (_L2_NORM, fused_l2_norm)):
        _library.define(schema)
        _library.impl(schema.partition("(")[0], function, "PrivateUse1")
