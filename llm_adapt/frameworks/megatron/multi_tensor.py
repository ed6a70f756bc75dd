"""Megatron's functions over lists of tensors by the operators multi_tensor_l2norm and multi_tensor_scale.

n tensors of any shapes in each list.

Where neither TransformerEngine nor apex is installed, Megatron's own forms serve: gradient norms and clipping, copies
between main and model parameters. They take one tensor after the other, wait for the device once for each norm, give
no norm of each tensor and never set the flag. With either package Megatron does not call them, and nothing is replaced.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam
from llm_adapt.patching import Row

__all__ = ["l2_norm", "rows", "scale"]

Lists = Sequence[list[torch.Tensor]]

_NORM: Mapping[str, str] = {"0.12 to 0.19": "22ba254d3fbb"}
_SCALE: Mapping[str, str] = {"0.12 to 0.19": "1408635f4bcf"}
_MIXED_PRECISION = "megatron.core.distributed.fsdp.src.megatron_fsdp.mixed_precision"


def rows(context: Context) -> list[Row]:
    """Rows of megatron.core.utils, and of Megatron-FSDP, which has a form of its own; none with ops="off"."""
    installed = [name for name in ("transformer_engine", "apex") if importlib.util.find_spec(name) is not None]
    if not context.serves_operators or installed:
        return []
    norm, scaled = "operator multi_tensor_l2norm", "operator multi_tensor_scale; lists of several dtypes stay"
    utils = "megatron.core.utils"
    return [
        seam(f"{utils}:local_multi_tensor_l2_norm", l2_norm, norm, bodies=_NORM),
        seam(f"{utils}:local_multi_tensor_scale", scale, scaled, bodies=_SCALE),
        seam(f"{_MIXED_PRECISION}:local_multi_tensor_scale", scale, scaled, bodies=_SCALE),
    ]


def l2_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    """`local_multi_tensor_l2_norm`: (norm [1] of all tensors, None or that of each [n]), without waiting for them."""
    from llm_adapt.ops.multi_tensor_l2norm import multi_tensor_l2norm

    @functools.wraps(original)
    def local_multi_tensor_l2_norm(
        chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, per_tensor: bool, *args: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tensors = [tensor for tensors in tensor_lists for tensor in tensors]
        if not tensors:
            zeros = torch.zeros(1, device=noop_flag.device)
            return zeros, zeros[:0] if per_tensor else None
        found = multi_tensor_l2norm(tensors, per_tensor=per_tensor)
        norm, norms = found if isinstance(found, tuple) else (found, None)
        return norm.float().reshape(1), None if norms is None else norms.float()

    return local_multi_tensor_l2_norm


def scale(original: Callable[..., Any]) -> Callable[..., Any]:
    """`local_multi_tensor_scale`: outputs = tensors * scale; the flag becomes 1 where a tensor holds inf or nan.

    Lists of several dtypes, copies of main to model parameters, go to Megatron's own loop, which leaves the flag alone:
    no kernel takes them, and to look for inf costs more than the copy.
    """
    from llm_adapt.ops.multi_tensor_scale import multi_tensor_scale

    @functools.wraps(original)
    def local_multi_tensor_scale(
        chunk_size: int, noop_flag: torch.Tensor, tensor_lists: Lists, scale: float | torch.Tensor
    ) -> None:
        tensors, outputs = tensor_lists[0], tensor_lists[1]
        if len({tensor.dtype for tensor in (*tensors, *outputs)}) != 1 or isinstance(scale, torch.Tensor):
            original(chunk_size, noop_flag, tensor_lists, scale)
            return
        found_inf = torch.zeros(1, device=outputs[0].device)
        multi_tensor_scale(tensors, outputs, found_inf=found_inf, scale=scale)
        noop_flag.copy_(torch.maximum(noop_flag, found_inf.to(noop_flag.device, noop_flag.dtype)))

    return local_multi_tensor_scale
