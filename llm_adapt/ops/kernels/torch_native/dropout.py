"""Dropout as frameworks write it, on the CPU and on CUDA. x and residual [..., H], bias [H].

It draws the very numbers that they draw, so a script drops the same elements with it and without.
"""

from __future__ import annotations

import torch
from torch.nn import functional as F

from llm_adapt.ops.activation import check_bias
from llm_adapt.ops.dispatch import Call, kernel
from llm_adapt.ops.dropout_add import check_dropout

__all__ = ["dropout_add"]


def _refuses(call: Call) -> str | None:
    if call.device not in ("cpu", "cuda"):
        return "is known to be faster than the reference on the CPU and on CUDA alone"
    if len({tensor.dtype for tensor in call.tensors.values()}) > 1:
        return "takes tensors of one dtype"
    return None


@kernel("dropout_add", "torch.nn.functional.dropout", refuses=_refuses)
def dropout_add(
    x: torch.Tensor, residual: torch.Tensor, bias: torch.Tensor | None = None, p: float = 0.0
) -> torch.Tensor:
    """Each step in the dtype of x; 16-bit tensors are not cast to float32 and back."""
    check_dropout(x, residual, p)
    if bias is not None:
        check_bias("dropout_add", bias, x.shape)
        x = x + bias
    return residual + (F.dropout(x, p) if p else x)
