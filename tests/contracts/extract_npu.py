"""Extract the contract of the torch_npu operators that we call into npu.json.

python -m tests.contracts.extract_npu                        from an installed torch_npu
python -m tests.contracts.extract_npu schemas.txt dispatch.txt    from saved text: one schema, or "name keys", a line
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

VERSION = "2.13.0"
WANTED = (
    "npu_add_rms_norm",
    "npu_cross_entropy_loss",
    "npu_dynamic_quant",
    "npu_fast_gelu",
    "npu_fused_infer_attention_score",
    "npu_fusion_attention",
    "npu_fusion_attention_v2",
    "npu_geglu",
    "npu_gelu",
    "npu_grouped_matmul",
    "npu_moe_token_permute_with_routing_map",
    "npu_moe_token_unpermute_with_routing_map",
    "npu_quant_matmul",
    "npu_rms_norm",
    "npu_rms_norm_backward",
    "npu_rotary_mul",
    "npu_scaled_masked_softmax",
    "npu_swiglu",
)

# AutogradErrorFallback.cpp of torch_npu 2.13.0: backward raises "derivative for npu::X is not implemented".
RAISES = ("npu_add_rms_norm", "npu_apply_rotary_pos_emb", "npu_interleave_rope", "npu_moe_gating_top_k_softmax")


def autograd_of(name: str, keys: str) -> str:
    """What backward does: "derivative", "raises", or "drops" the gradients after one warning."""
    if name in RAISES:
        return "raises"
    return "derivative" if "AutogradPrivateUse1" in keys else "drops"


def from_text(schemas: str, dispatch: str) -> dict[str, Any]:
    """The contract from saved schemas and saved dispatch keys."""
    keys = dict(line.split(" ", 1) for line in dispatch.splitlines() if " " in line)
    texts = {line.partition("(")[0].removeprefix("npu::"): line for line in schemas.splitlines()}
    return {
        name: {"schema": texts[name], "autograd": autograd_of(name, keys.get(f"npu::{name}", ""))} for name in WANTED
    }


def from_package() -> dict[str, Any]:
    """The contract from the torch_npu that is installed."""
    import torch
    import torch_npu  # noqa: F401

    texts = {schema.name: str(schema) for schema in torch._C._jit_get_all_schemas() if not schema.overload_name}
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    keys = {
        f"npu::{name}": "AutogradPrivateUse1" if has_kernel(f"npu::{name}", "AutogradPrivateUse1") else ""
        for name in WANTED
    }
    return from_text("\n".join(texts.values()), "\n".join(f"{name} {key}" for name, key in keys.items()))


if __name__ == "__main__":
    found = from_text(*(Path(path).read_text() for path in sys.argv[1:3])) if sys.argv[1:] else from_package()
    contract = {"source": f"torch_npu {VERSION}, schemas and dispatch table", "operators": found}
    Path(__file__).with_name("npu.json").write_text(json.dumps(contract, indent=1) + "\n")
