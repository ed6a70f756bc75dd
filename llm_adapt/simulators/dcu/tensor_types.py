"""torch.cuda.FloatTensor and its kin as constructors, which a CPU build of torch refuses to be."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

__all__ = ["make_constructible"]


class _TensorType(type):
    """A class like torch.cuda.FloatTensor: isinstance as torch's own, and makes tensors of the device."""

    own: Any
    dtype: torch.dtype

    def __instancecheck__(cls, value: object) -> bool:
        return isinstance(value, cls.own)

    def __call__(cls, *arguments: Any) -> torch.Tensor:
        """Of sizes, uninitialised; of a sequence, its numbers."""
        if len(arguments) == 1 and not isinstance(arguments[0], (int, torch.Size, torch.Tensor)):
            return torch.tensor(arguments[0], dtype=cls.dtype, device="cuda")
        sizes = arguments[0] if len(arguments) == 1 and isinstance(arguments[0], torch.Size) else arguments
        if not all(isinstance(size, int) for size in sizes):
            raise TypeError(f"{cls.__name__} takes sizes or one sequence of numbers; {arguments} was given.")
        return torch.empty(sizes or (0,), dtype=cls.dtype, device="cuda")


def make_constructible(cuda: ModuleType) -> None:
    """Replace torch.cuda's tensor types.

    Args:
        cuda: torch.cuda.
    """
    for name, own in list(vars(cuda).items()):
        if name.endswith("Tensor") and type(own) is type(torch.FloatTensor):
            parts = {"own": own, "dtype": own.dtype, "is_cuda": True, "is_sparse": False, "layout": own.layout}
            setattr(cuda, name, _TensorType(f"torch.cuda.{name}", (), parts))
