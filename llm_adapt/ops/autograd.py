"""torch.autograd.Function without the cost of its apply."""

from __future__ import annotations

from typing import Any

import torch
from torch._functorch.utils import unwrap_dead_wrappers

__all__ = ["Function"]


class Function(torch.autograd.Function):
    """A function of our kernels. Arguments are given by position, all of them.

    torch's apply (2.1 to 2.13) binds the arguments to the signature of forward, which it looks up at every call where
    setup_context is defined: longer than it takes to launch a kernel. setup_context is what torch.func needs.
    """

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """As torch.autograd.Function.apply."""
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(torch.autograd.Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]
