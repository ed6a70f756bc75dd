"""Megatron-Core: the seams that must change for a CUDA-written script to run where CUDA is not, and its operators.

Rows of operators (norms to multi_tensor) are planned on every device, the others where the device is not torch.cuda.
No feature of Megatron is replaced, and no body of a Megatron function is copied. Each row resolves against every
version named in VERSIONS or says that it does not (docs/megatron_seams.md is generated from the wheels by
tests/frameworks/megatron/seam_table.py).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import (
    activations,
    attention,
    checkpoints,
    experts,
    losses,
    moe,
    multi_tensor,
    norms,
    optimizer,
    repairs,
    rotary,
    softmax,
)
from llm_adapt.frameworks.megatron.seams import VERSIONS, seam
from llm_adapt.frameworks.stand_ins import triton, wgrad
from llm_adapt.patching import Loan, Row

__all__ = ["VERSIONS", "rows"]

# Each has `rows(context)`, and decides by ops="off" itself: some of its rows are needed for a script to run.
_TABLES = (norms, attention, softmax, rotary, activations, losses, checkpoints, moe, experts, optimizer, multi_tensor)

# Only for replacements that rely on the body of what they replace; wrappers call the original and need none.
# A body that is none of these is left alone, and then it raises where the seam was needed: no wrong numbers.
_BODIES: dict[str, Mapping[str, str]] = {
    "megatron.core.datasets.utils:compile_helpers": {"0.12 to 0.19": "3a4a9f188f26"},
    "megatron.core.fusions.fused_softmax:FusedScaleMaskSoftmax.is_kernel_available": {"0.12 to 0.19": "6593540a2a54"},
    "megatron.legacy.fused_kernels:load": {"0.12 to 0.16": "4782a6a21539"},
}


def _seam(target: str, new: Any, reason: str, kind: Any = "wrap") -> Row:
    return seam(target, new, reason, kind, _BODIES.get(target))


def rows(context: Context) -> list[Row]:
    """All rows for Megatron-Core and for Megatron-LM's training loop."""
    found = [row for table in _TABLES for row in table.rows(context)]
    if not context.adapter.needs_facade:
        return found
    found += _packages() + _functions(context)
    if context.adapter.device_type == "cpu":
        tracker = "megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork"
        found.append(_seam(tracker, repairs.quiet_fork, "the CPU and the device share one generator"))
    return found


def _packages() -> list[Row]:
    """CUDA packages that Megatron asks for and that are not installed."""
    core = "megatron.core"
    found: list[Row] = [
        # Workaround: megatron-triton-at-import
        Loan(
            f"{core}.transformer.custom_layers.batch_invariant_kernels:triton",
            triton.modules,
            "defines Triton kernels at import and launches them in batch-invariant mode only",
        ),
        Loan(
            f"{core}.tensor_parallel.layers:fused_weight_gradient_mlp_cuda",
            wgrad.modules,
            "gradient accumulation fusion is on by default",
        ),
    ]
    found += [
        _seam(
            f"{core}.utils:is_{package}_min_version",
            repairs.absent_is_older,
            "a package that is not installed has no version to compare",
        )
        for package in ("te", "fa", "mamba", "causal_conv1d")
    ]
    if importlib.util.find_spec("transformer_engine") is None:
        # Read as "is there a fused GEMM?", and bound only where TransformerEngine is: elsewhere a NameError.
        # Workaround: megatron-te-gemm
        reason = "without TransformerEngine the name is read and was never bound; None selects torch.mm"
        found.append(_seam(f"{core}.transformer.moe.moe_utils:te_general_gemm", None, reason, "add"))
    return found


def _functions(context: Context) -> list[Row]:
    """Functions that assume CUDA, TransformerEngine or a certain interpreter."""
    core, training = "megatron.core", "megatron.training"
    fused_softmax = f"{core}.fusions.fused_softmax:FusedScaleMaskSoftmax"
    config = f"{core}.transformer.transformer_config:TransformerConfig"
    no_softmax = "the fused softmax is a CUDA extension; torch's softmax computes the same"
    no_fuser = "functions are fused by torch.compile for CUDA only"
    no_build = "CUDA extensions cannot be built here"
    return [
        _seam(f"{core}.jit:jit_fuser", repairs.no_fuser, no_fuser, "replace"),
        _seam(f"{fused_softmax}.is_kernel_available", repairs.never, no_softmax, "replace"),
        _seam(f"{config}.__post_init__", repairs.unfused_rope(context.report), "rope without TransformerEngine"),
        _seam(f"{core}.datasets.utils:compile_helpers", repairs.compile_helpers, "builds for this interpreter"),
        _seam("megatron.legacy.fused_kernels:load", repairs.nothing, no_build, "replace"),
        _seam(
            f"{training}.dist_signal_handler:get_device",
            repairs.signal_device(context.adapter),
            "knows nccl and gloo only",
        ),
        _seam(
            f"{training}.arguments:validate_args",
            repairs.connections_for_fsdp(context.report),
            "a variable for CUDA's queues must be 1 for tensor parallelism and must not be 1 for FSDP",
        ),
    ]
