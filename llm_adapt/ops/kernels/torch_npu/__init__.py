"""Kernels of torch_npu (Huawei Ascend), one family a file.

Written from the operator schemas of torch_npu 2.13.0 and the op-plugin documents of the same version. None of it has
run on an NPU: tests/contracts calls it against fakes that bind every call to those schemas and compute the documented
results. What a chip lacks (Atlas A1 and 310P have no fused attention, for one) shows at the first proof.
"""

from llm_adapt.ops.kernels.torch_npu import (
    activations,
    attention,
    decoding,
    losses,
    low_precision,
    moe,
    norms,
    optimizer,
    rotary,
)

__all__ = ["activations", "attention", "decoding", "losses", "low_precision", "moe", "norms", "optimizer", "rotary"]
