"""How kernels of torch_npu register, and what all of them refuse: also what a chip does not have.

A1 (Ascend910A, 910ProA, 910B ...) and 310P have no bfloat16, no attention for training, no cross entropy; the tables
below say what else is not documented for a chip. Ascend910B1 to B4 are A2, Ascend910_93xx are A3, Ascend950 is A5.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
import torch_npu

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["SCHEMA", "chip_family", "npu_kernel"]

SCHEMA = "torch_npu 2.13.0 schema and op-plugin document of "
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# Past each number of torch.npu.get_soc_version(), the next family begins.
_FAMILIES = ((200, "A1"), (220, "310P"), (240, "A2"), (250, "310B"), (260, "A3"))
_OLDER = frozenset({"A1", "310P"})  # float32 and float16 alone
# Families whose chips a function, or the function behind an op, is not documented for.
_NOT_ON = {
    "npu_fusion_attention": _OLDER,
    "npu_fusion_attention_v2": _OLDER,
    "npu_fused_infer_attention_score": _OLDER,
    "npu_cross_entropy_loss": _OLDER,
    "npu_dynamic_quant": _OLDER,
    "npu_moe_token_permute_with_routing_map": _OLDER,
    "npu_moe_token_unpermute_with_routing_map": _OLDER,
    "npu_rotary_mul": _OLDER,  # but for halves of 128 features, in few shapes
    "adamw": _OLDER,
    "npu_add_rms_norm": frozenset({"A1"}),
    "npu_grouped_matmul": frozenset({"A1"}),
}
_FLOAT16_ON = {"npu_grouped_matmul": frozenset({"310P"})}
# Families on which what a function keeps for its gradient is invalid: no proof of it can hold.
_NO_GRADIENT_ON = {"npu_add_rms_norm": frozenset({"310P"})}  # its rstd
P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def chip_family() -> str:
    """Family of the chip: A1, 310P, A2, 310B, A3 or A5. Asked once, at a first call: asking initialises the device."""
    version = torch_npu.npu.get_soc_version()
    return next((family for end, family in _FAMILIES if version < end), "A5")


def _chip_refuses(call: Call, needs: tuple[str, ...]) -> str | None:
    if call.device != "npu":
        return None
    family = chip_family()
    chip = f"{torch_npu.npu.get_device_name(0)} ({family})"
    dtypes = {tensor.dtype for tensor in call.tensors.values() if tensor.dtype.is_floating_point}
    if family in _OLDER and torch.bfloat16 in dtypes:
        return f"takes no bfloat16 on {chip}, which has none"
    for name in (call.op, *needs):
        if family in _NOT_ON.get(name, ()):
            return f"{name} is not documented for {chip}"
        if family in _FLOAT16_ON.get(name, ()) and dtypes - {torch.float16}:
            return f"{name} takes float16 alone on {chip}"
        if family in _NO_GRADIENT_ON.get(name, ()):
            return f"{name} has no gradient on {chip}: what it keeps for it is invalid there"
    return None


def npu_kernel(
    op: str,
    *needs: str,
    refuses: Callable[[Call], str | None] | None = None,
    takes_empty: bool = False,
    **fields: Any,
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Register the decorated function as torch_npu's kernel of an op.

    Args:
        needs: functions of torch_npu that it calls. Older versions lack some: then it refuses, and says so.
        refuses: reasons of its own.
        takes_empty: tensors without elements are not refused.
        fields: further fields of Kernel.
    """
    absent = [name for name in needs if not hasattr(torch_npu, name)]

    def refusal(call: Call) -> str | None:
        if absent:
            return f"the torch_npu installed has no {', '.join(absent)}"
        for name, tensor in call.tensors.items():
            if tensor.dtype.is_floating_point and tensor.dtype not in _FLOATS:
                return f"{name} is {tensor.dtype}; takes float32, float16 and bfloat16"
            if not takes_empty and 0 in tensor.shape:
                return "takes no empty tensors"
        return _chip_refuses(call, needs) or (refuses(call) if refuses else None)

    return kernel(op, SCHEMA + ", ".join(needs), refuses=refusal, **fields)
