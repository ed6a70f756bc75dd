"""torch_mlu_ops of the simulator: the entries whose meaning is recorded, computed by PyTorch in float32.

For inference: nothing here has a backward, and results never require a gradient. Signatures: the newest record of each
(Python of torch_mlu_ops 2026 for norms and attention, calls of vllm_mlu 0.8.3 to version 1.5.0 for the rest, manual
1.3.2 for active). Entries that are recorded by name or signature alone raise NotImplementedError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .activations import active
from .attention import flash_attention
from .matrices import group_gemm, matmul
from .moe import moe_softmax_topk
from .norms import fused_layer_norm, fused_rms_norm

__all__ = [
    "active", "flash_attention", "fused_layer_norm", "fused_rms_norm", "group_gemm", "matmul", "moe_softmax_topk",
]  # fmt: skip

_BY_NAME = (
    "apply_rotary", "apply_topkp", "batch_matmul", "fused_mla_kv", "fused_mla_q", "fused_moe", "fused_rope",
    "fused_transpose_layernorm", "hc_split_sinkhorn", "matmul_allreduce", "moe_active", "moe_cast_gating",
    "moe_combine_result", "moe_expand_input", "moe_gen_idx", "moe_quantize", "moe_sigmoid_topk", "random_sample",
    "rejection_sample", "sage_attn", "scaled_matmul", "scaled_quantize", "single_query_cached_kv_attn",
)  # fmt: skip


def _not_modelled(name: str) -> Callable[..., Any]:
    def raises(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"torch_mlu_ops.{name} exists, but shapes or meaning of its arguments are not public; "
            "the MLU simulator does not invent them. Use a PyTorch reference."
        )

    raises.__name__ = name
    return raises


def __getattr__(name: str) -> Any:
    if name in _BY_NAME:
        return _not_modelled(name)
    raise AttributeError(f"torch_mlu_ops.{name} is not recorded in public sources; the MLU simulator does not have it.")
