"""apex.multi_tensor_apply: calls a function of amp_C on lists of tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from llm_adapt.simulators.dcu.das.limits import missing

__all__ = ["MultiTensorApply", "multi_tensor_applier"]

__getattr__ = missing("apex.multi_tensor_apply")


class MultiTensorApply:
    """Holds the size of a chunk of the kernels."""

    available = True

    def __init__(self, chunk_size: int) -> None:
        self.chunk_size = chunk_size

    def __call__(
        self,
        op: Callable[..., Any],
        noop_flag_buffer: torch.Tensor,
        tensor_lists: Sequence[Sequence[torch.Tensor]],
        *args: Any,
    ) -> Any:
        """op(chunk size, noop_flag_buffer, tensor_lists, *args)."""
        return op(self.chunk_size, noop_flag_buffer, tensor_lists, *args)


multi_tensor_applier = MultiTensorApply(2048 * 32)
