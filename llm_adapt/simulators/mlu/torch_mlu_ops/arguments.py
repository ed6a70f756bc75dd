"""What every entry of torch_mlu_ops checks."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["FLOATS", "check_tensors", "refuse_given"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def refuse_given(entry: str, **given: tuple[Any, Any]) -> None:
    """Refuse arguments that are not at the one value that is modelled.

    Args:
        entry: name of the operator.
        given: for each argument (what was given, what is modelled).

    Raises:
        NotImplementedError: one differs.
    """
    for name, (value, modelled) in given.items():
        if value is not modelled and value != modelled:
            raise NotImplementedError(
                f"torch_mlu_ops.{entry} was asked with {name}={value!r}; the MLU simulator models {name}={modelled!r}, "
                "since what others do is not public."
            )


def check_tensors(entry: str, ndim: int, *tensors: torch.Tensor | None) -> None:
    """Refuse what is not on an MLU, not of one float dtype, not contiguous, or has other dimensions than the first.

    Raises:
        RuntimeError: naming the operator.
    """
    there = [tensor for tensor in tensors if tensor is not None]
    first = there[0]
    if first.ndim != ndim:
        raise RuntimeError(f"torch_mlu_ops.{entry} takes {ndim} dimensions; {tuple(first.shape)} was given.")
    for tensor in there:
        if tensor.device.type != "mlu":
            raise RuntimeError(f"torch_mlu_ops.{entry} takes tensors on an MLU; one is on {tensor.device}.")
        if tensor.dtype not in FLOATS or tensor.dtype != first.dtype:
            raise RuntimeError(
                f"torch_mlu_ops.{entry} takes float32, float16 and bfloat16, all alike; {tensor.dtype} was given."
            )
        if not tensor.is_contiguous():
            raise RuntimeError(f"torch_mlu_ops.{entry} takes contiguous tensors.")
