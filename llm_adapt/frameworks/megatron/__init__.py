"""Megatron-Core: the seams that must change for a CUDA-written script to run where CUDA is not.

Only those: no feature of Megatron is replaced, and no body of a Megatron function is copied. Each row resolves
against every version named in VERSIONS or says that it does not (docs/megatron_seams.md is generated from the
wheels by tests/frameworks/megatron/seam_table.py).
"""

from __future__ import annotations

from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import norms, repairs
from llm_adapt.frameworks.stand_ins import triton, wgrad
from llm_adapt.patching import Loan, Patch, Row

__all__ = ["VERSIONS", "rows"]

VERSIONS = "megatron-core 0.12 to 0.19"


def _seam(target: str, new: Any, reason: str, kind: Any = "wrap") -> Patch:
    """A row of this table: a target that a version lacks is a reported skip."""
    return Patch(target, new, reason, kind=kind, optional=True, versions=VERSIONS)


def rows(context: Context) -> list[Row]:
    """All rows for Megatron-Core and for Megatron-LM's training loop; none where the device is torch.cuda."""
    if not context.adapter.needs_facade:
        return []
    core = "megatron.core"
    found: list[Row] = [
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
    found += [
        _seam(
            f"{core}.jit:jit_fuser", repairs.no_fuser, "functions are fused by torch.compile for CUDA only", "replace"
        ),
        _seam(f"{core}.transformer.torch_norm:WrappedTorchNorm.__new__", norms.wrapped, "norms without apex and TE"),
        _seam(
            f"{core}.fusions.fused_softmax:FusedScaleMaskSoftmax.is_kernel_available",
            repairs.never,
            "the fused softmax is a CUDA extension; torch's softmax computes the same",
            "replace",
        ),
        _seam(f"{core}.datasets.utils:compile_helpers", repairs.compile_helpers, "builds for this interpreter"),
        _seam("megatron.legacy.fused_kernels:load", repairs.nothing, "CUDA extensions cannot be built here", "replace"),
        _seam(
            "megatron.training.dist_signal_handler:get_device",
            repairs.signal_device(context.adapter),
            "knows nccl and gloo only",
        ),
    ]
    if context.adapter.device_type == "cpu":
        tracker = f"{core}.tensor_parallel.random:CudaRNGStatesTracker.fork"
        found.append(_seam(tracker, repairs.quiet_fork, "the CPU and the device share one generator"))
    return found
