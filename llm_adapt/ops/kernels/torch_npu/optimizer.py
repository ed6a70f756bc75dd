"""AdamW on an NPU: torch._fused_adamw_, which op-plugin carries out as aclnnApplyAdamWV2 on each tensor.

It ignores grad_scale and found_inf without a word, so both are left out here: calls that give them are served by
others. One dtype for parameter, gradient and moments.

op-plugin casts lr, both betas, eps and weight_decay to float32. That is AdamW of another beta2, by less than 2^-25,
used for the moments and the bias correction alike: no error that grows, and far below what is chosen when 0.999 is
written. It is allowed for in the tolerance of the op. A beta2 so near to 1 that the difference shows (0.9999 and a
second moment of 0) fails the proof, and others serve.
"""

from __future__ import annotations

import torch

from llm_adapt.ops.adamw import check_step
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import npu_kernel

__all__ = ["adamw"]


def _refuses(call: Call) -> str | None:
    lists = ("params", "grads", "exp_avgs", "exp_avg_sqs", "max_exp_avg_sqs")
    dtypes = {tensor.dtype for name, tensor in call.tensors.items() if name.partition("[")[0] in lists}
    return "takes parameters, gradients and moments of one dtype" if len(dtypes) > 1 else None


@npu_kernel("adamw", refuses=_refuses, takes_empty=True)
def adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    max_exp_avg_sqs: list[torch.Tensor] | None = None,
    state_steps: list[torch.Tensor] | None = None,
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
    maximize: bool = False,
) -> None:
    """torch._fused_adamw_; it takes the number of this step, and does not count."""
    with torch.no_grad():
        if state_steps is None:
            check_step(step)
            state_steps = [torch.full((), float(step), device=params[0].device)] * len(params)
        else:
            torch._foreach_add_(state_steps, 1)
        chosen = [index for index, param in enumerate(params) if param.numel()]  # its document is silent on empty ones

        def some(tensors: list[torch.Tensor] | None) -> list[torch.Tensor]:
            return [] if tensors is None else [tensors[index] for index in chosen]

        torch._fused_adamw_(
            some(params),
            some(grads),
            some(exp_avgs),
            some(exp_avg_sqs),
            some(max_exp_avg_sqs),
            some(state_steps),
            lr=lr,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight_decay,
            eps=eps,
            amsgrad=max_exp_avg_sqs is not None,
            maximize=maximize,
        )
