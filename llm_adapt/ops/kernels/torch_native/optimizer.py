"""torch's fused and foreach kernels over lists of tensors. Source: torch 2.13 of each function named."""

from __future__ import annotations

import torch

from llm_adapt.ops.adamw import check_step
from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.multi_tensor_scale import check_lists

__all__ = ["adamw", "clip_grads", "multi_tensor_l2norm", "multi_tensor_scale"]

_PART = 2**18  # elements that stay in a cache: 1 MiB of float32


def _mixed_lists(call: Call) -> str | None:
    lists = ("params[", "grads[", "exp_avg", "max_exp_avg")
    dtypes = {tensor.dtype for name, tensor in call.tensors.items() if name.startswith(lists)}
    if len(dtypes) > 1:
        return "takes parameters, gradients and moments of one dtype"
    if any(tensor.dtype != torch.float32 for name, tensor in call.tensors.items() if name.startswith("state_steps")):
        return "takes state_steps of float32"
    if call.device == "npu" and (call.grad_scale is not None or call.found_inf is not None):
        return "grad_scale and found_inf are ignored there (torch_npu 2.13)"
    return None


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
    check_step(step)
    if not params:
        return
    with torch.no_grad():
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


def _not_one_kind(call: Call) -> str | None:
    lists = {(tensor.dtype, tensor.device) for name, tensor in call.tensors.items() if name.endswith("]")}
    if len(lists) != 1:
        return "takes tensors of one dtype and device, at least one"
    return None


def _no_clipping(call: Call) -> str | None:
    if call.dtype == torch.float64 and call.total_norm is not None and call.total_norm.dtype != torch.float64:
        return "divides in the dtype of total_norm"
    return _not_one_kind(call)


@kernel("clip_grads", "torch._foreach_norm and torch._foreach_mul_ of torch 2.13", refuses=_no_clipping)
def clip_grads(
    grads: list[torch.Tensor],
    total_norm: torch.Tensor | None = None,
    max_norm: float = 1.0,
    eps: float = 1e-6,
) -> torch.Tensor:
    """A few kernels for the whole list, as in torch.nn.utils.clip_grad_norm_(foreach=True)."""
    with torch.no_grad():
        norm = multi_tensor_l2norm(grads) if total_norm is None else total_norm.detach().clone().reshape(())
        factor = (max_norm / (norm + eps)).clamp(max=1.0).to(grads[0].device)
        if factor.is_cuda and grads[0].dtype == torch.bfloat16:
            # A factor of another dtype takes twice as long (seen on an H200), and torch rounds it too. In float16 a
            # small one would lose its digits.
            factor = factor.to(torch.bfloat16)
        torch._foreach_mul_(grads, factor)
        return norm


@kernel("multi_tensor_l2norm", "torch._foreach_norm of torch 2.13", refuses=_not_one_kind)
def multi_tensor_l2norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """A few kernels for the whole list."""
    wide = torch.promote_types(tensors[0].dtype, torch.float32)
    with torch.no_grad():
        is_narrow = tensors[0].device.type == "cpu" and wide != tensors[0].dtype
        norms = _norms_of_parts(tensors) if is_narrow else torch._foreach_norm(tensors, 2, wide)
        norm: torch.Tensor = torch.linalg.vector_norm(torch.stack(norms))
        return norm


def _norms_of_parts(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Norms of parts that are widened into one buffer: a float32 copy of each tensor costs more than its norm."""
    norms, wide = [], torch.empty(min(_PART, max(tensor.numel() for tensor in tensors)))
    for tensor in tensors:
        for part in tensor.reshape(-1).split(_PART):
            norms.append(torch.linalg.vector_norm(wide[: part.numel()].copy_(part)))
    return norms


def _other_outputs(call: Call) -> str | None:
    if call.device == "cpu" and call.found_inf is None and any(name.endswith("]") for name in call.tensors):
        return None
    if call.found_inf is not None and (call.found_inf.dtype != torch.float32 or call.found_inf.ndim > 1):
        return "takes a found_inf of float32"
    if call.dtype == torch.float64:
        return "scales by a float32 number"
    outputs = {tensor.dtype for name, tensor in call.tensors.items() if name.startswith("outputs[")}
    if call.device == "cuda" and torch.bfloat16 in outputs:
        return "is not implemented for bfloat16 on CUDA (torch 2.11)"
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
        if device.type == "cpu" and found_inf is None:
            _scale_on_the_host(tensors, outputs, device_scale, scale)
            return
        flag = torch.zeros(1, device=device) if found_inf is None else found_inf.reshape(1)
        factor = torch.full((1,), scale, device=device)
        if device_scale is not None:
            factor = factor * device_scale.to(device, torch.float32).reshape(1)
        if any(tensor is not output for tensor, output in zip(tensors, outputs, strict=True)):
            torch._foreach_copy_(outputs, tensors)
        torch._amp_foreach_non_finite_check_and_unscale_(outputs, flag, factor)


def _scale_on_the_host(
    tensors: list[torch.Tensor], outputs: list[torch.Tensor], device_scale: torch.Tensor | None, scale: float
) -> None:
    """One pass, or a widening copy and a product in place; a narrower output takes a product in the wider dtype."""
    check_lists(tensors, outputs)
    factor = scale if device_scale is None else scale * float(device_scale)
    for tensor, output in zip(tensors, outputs, strict=True):
        if tensor.dtype == output.dtype:
            torch.mul(tensor, factor, out=output)
        elif torch.promote_types(tensor.dtype, output.dtype) == output.dtype:
            output.copy_(tensor).mul_(factor)
        else:
            output.copy_(tensor.to(torch.promote_types(tensor.dtype, torch.float32)) * factor)
