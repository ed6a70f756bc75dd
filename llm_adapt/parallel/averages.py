"""ReduceOp.AVG for collective libraries that have none.

NCCL's average is a sum of inputs that were multiplied by 1/n before it, and so is this one: it rounds where NCCL
rounds, and works with async_op. Integers are refused: NCCL divides their sum, which no sum of parts equals.

Source: NCCL documents ncclAvg as the sum over 1/n; torch_mlu d578002 process_group_cncl.cpp refuses AVG.

Workaround: cncl-average
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from llm_adapt.errors import CommError

__all__ = ["averaged"]

_IN_PLACE = {"all_reduce": "tensor", "reduce": "tensor"}


def averaged(original: Callable[..., Any], backend: str) -> Callable[..., Any]:
    """A reduction in which AVG on a group of `backend` is the sum of its inputs over the number of ranks.

    Raises:
        CommError: the average of integers is asked.
    """
    signature = inspect.signature(original)
    in_place = _IN_PLACE.get(original.__name__)

    @functools.wraps(original)
    def reduction(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        op, group = call.arguments.get("op"), call.arguments.get("group")
        if op != dist.ReduceOp.AVG or backend not in _backend(group):
            return original(*args, **kwargs)
        call.arguments["op"] = dist.ReduceOp.SUM
        share = 1.0 / dist.get_world_size(group)
        if in_place is not None:
            _check(call.arguments[in_place]).mul_(share)
        else:  # the input of reduce_scatter stays as it is
            given = next(name for name in ("input_list", "input", "input_tensor") if name in call.arguments)
            value = call.arguments[given]
            is_list = isinstance(value, list)
            scaled = [_check(item) * share for item in (value if is_list else [value])]
            call.arguments[given] = scaled if is_list else scaled[0]
        return original(*call.args, **call.kwargs)

    return reduction


def _backend(group: dist.ProcessGroup | None) -> str:
    """The group's own backend: while patched, get_backend() says nccl."""
    c10d = dist.distributed_c10d
    found = c10d._world.pg_map.get(group or c10d._get_default_group())
    return "" if found is None else found[0]


def _check(tensor: torch.Tensor) -> torch.Tensor:
    if not tensor.is_floating_point() and not tensor.is_complex():
        raise CommError(
            f"ReduceOp.AVG of a {tensor.dtype} tensor was asked; this device's library has no average, and a sum of "
            "parts is not what NCCL gives. Use ReduceOp.SUM and divide."
        )
    return tensor
