"""amp_C, a compiled part of apex: scale, norm and Adam of lists of tensors. Each list [n] of tensors of one size.

Source: csrc/multi_tensor_{scale,l2norm,adam}*.cu of NVIDIA apex. Nothing is written where noop_flag is set.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from llm_adapt.simulators.dcu.das.limits import demand, demand_torch, missing

__all__ = ["multi_tensor_adam", "multi_tensor_l2norm", "multi_tensor_scale"]

demand_torch("amp_C")
__getattr__ = missing("amp_C")

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Lists = Sequence[Sequence[torch.Tensor]]


def _check(noop_flag: torch.Tensor, lists: Lists, count: int) -> None:
    demand(len(lists) == count, f"expected {count} lists of tensors, found {len(lists)}")
    demand(len({len(tensors) for tensors in lists}) == 1, "the lists are equally long")
    demand(noop_flag.dtype == torch.int32 and noop_flag.is_cuda, "noop_flag is an int32 on cuda")
    for tensors in lists:
        demand(all(tensor.is_cuda and tensor.dtype in _FLOATS for tensor in tensors), "tensors on cuda, 16 or 32 bits")
    for row in zip(*lists, strict=True):
        demand(len({tensor.numel() for tensor in row}) == 1, "tensors of one place have one size")


@torch.no_grad()
def multi_tensor_scale(chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, scale: float) -> None:
    """second[i] = first[i] * scale; noop_flag becomes 1 where a number is not finite.

    Raises:
        RuntimeError: lists that the kernel does not take.
    """
    _check(noop_flag, tensor_lists, 2)
    for source, target in zip(*tensor_lists, strict=True):
        scaled = source.float() * scale
        if not bool(torch.isfinite(scaled).all()):
            noop_flag.fill_(1)
        target.copy_(scaled)


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of all together [1], and of each [n] where asked, else [0].

    Raises:
        RuntimeError: lists that the kernel does not take.
    """
    _check(noop_flag, tensor_lists, 1)
    norms = [tensor.float().norm() for tensor in tensor_lists[0]]
    each = torch.stack(norms) if norms else noop_flag.new_zeros(0, dtype=torch.float32)
    return each.norm().reshape(1), each if per_tensor else each[:0]


@torch.no_grad()
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: torch.Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """One step of Adam; lists: gradients, parameters, first and second moments (float32).

    mode 0 adds the decay to the gradient, mode 1 takes it off the parameter.

    Raises:
        RuntimeError: lists that the kernel does not take.
    """
    _check(noop_flag, tensor_lists, 4)
    demand(mode in (0, 1), "mode is 0 (L2) or 1 (AdamW)")
    if bool(noop_flag.any()):
        return
    first_correction = 1 - beta1**step if bias_correction else 1.0
    second_correction = 1 - beta2**step if bias_correction else 1.0
    for gradient, parameter, first, second in zip(*tensor_lists, strict=True):
        demand(gradient.dtype == parameter.dtype, "a gradient has the dtype of its parameter")
        demand(first.dtype == second.dtype == torch.float32, "moments are float32")
        wide, wide_gradient = parameter.float(), gradient.float()
        if mode == 0:
            wide_gradient = wide_gradient + weight_decay * wide
        first.mul_(beta1).add_(wide_gradient, alpha=1 - beta1)
        second.mul_(beta2).addcmul_(wide_gradient, wide_gradient, value=1 - beta2)
        update = (first / first_correction) / ((second / second_correction).sqrt() + epsilon)
        if mode == 1:
            update = update + weight_decay * wide
        parameter.copy_(wide - lr * update)
