"""Run as a script: Megatron-Core under patch() in one fresh process; prints what it found as JSON.

No package of CUDA is installed, so every seam of megatron.core is used on the way.
"""

from __future__ import annotations

import json
import sys
import warnings
from typing import Any

import torch

import llm_adapt
from llm_adapt import session

warnings.simplefilter("ignore")
SEQUENCE, BATCH, VOCAB, HIDDEN = 16, 2, 64, 32


def model(normalization: str, **values: Any) -> Any:
    """A small GPT of the local spec, with the fusions that Megatron's scripts ask for."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HIDDEN,
        num_attention_heads=4,
        normalization=normalization,
        persist_layer_norm=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=True,
        apply_rope_fusion=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        **values,
    )
    spec = get_gpt_layer_local_spec(normalization=normalization, num_experts=values.get("num_moe_experts"))
    return GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="rope").cuda()


def train(gpt: Any, steps: int = 8) -> dict[str, Any]:
    """Losses of a few steps on one batch, and the parameters that received no gradient."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator).cuda()
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, device="cuda").tril() < 0.5
    for name, parameter in gpt.named_parameters():
        assert parameter.requires_grad, name
        parameter.main_grad = torch.zeros_like(parameter, dtype=torch.float32)
    optimizer = torch.optim.Adam(gpt.parameters(), lr=1e-2)
    losses, idle = [], []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = gpt(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
        loss.backward()
        idle = [
            name
            for name, parameter in gpt.named_parameters()
            if parameter.grad is None and not parameter.main_grad.any()
        ]
        for parameter in gpt.parameters():
            if parameter.main_grad.any():
                parameter.grad = parameter.main_grad.to(parameter.dtype).clone()
                parameter.main_grad.zero_()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "idle": idle}


def seams() -> dict[str, Any]:
    """What the single seams answer in real Megatron modules."""
    from megatron.core import jit, utils
    from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
    from megatron.core.parallel_state import get_nccl_options
    from megatron.core.tensor_parallel import layers
    from megatron.core.transformer.custom_layers import batch_invariant_kernels
    from megatron.core.transformer.moe import moe_utils

    def identity(x: Any) -> Any:
        return x

    launch = "returned"
    try:
        batch_invariant_kernels.matmul_kernel_persistent[(1,)]()
    except NotImplementedError as error:
        launch = str(error)
    options = get_nccl_options("tp", {"tp": {"max_ctas": 8, "is_high_priority_stream": True}})
    return {
        "te": [utils.is_te_min_version("1.0"), utils.is_fa_min_version("2.0"), utils.is_mamba_min_version("1.0")],
        "unfused": jit.jit_fuser(identity) is identity,
        "softmax": FusedScaleMaskSoftmax.is_kernel_available(None, None, 4, 4, 128, 128),
        "wgrad": layers._grad_accum_fusion_available,
        "gemm": moe_utils.te_general_gemm,
        "launch": launch,
        "max_ctas": options.config.max_ctas,
        "arch": torch.cuda.get_device_properties(torch.device("cuda:0")).major,
        "lent": [name for name in ("triton", "fused_weight_gradient_mlp_cuda") if name in sys.modules],
    }


def main() -> None:
    """Build and train both kinds of model, and look at the seams, inside one patch."""
    found: dict[str, Any] = {}
    with llm_adapt.patched(device="cpu"):
        torch.distributed.init_process_group("nccl", store=torch.distributed.HashStore(), rank=0, world_size=1)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(7)
        found["gpt"] = train(model("LayerNorm", gradient_accumulation_fusion=True))
        llama = {"gated_linear_unit": True, "activation_func": torch.nn.functional.silu, "num_query_groups": 2}
        found["llama"] = train(model("RMSNorm", add_bias_linear=False, layernorm_zero_centered_gamma=True, **llama))
        found["moe"] = train(model("RMSNorm", add_bias_linear=False, num_moe_experts=4, moe_router_topk=2, **llama))
        found["seams"] = seams()
        report = session.report()
        found["effects"] = {line.subject: line.choice for line in report.lines if line.section == "effect"}
        found["skipped"] = [line.subject for line in report.lines if line.status in ("skipped", "problem")]
    from megatron.core import jit, utils

    found["after"] = {"fuser": jit.jit_fuser.__module__, "check": utils.is_te_min_version.__module__}
    print("JSON " + json.dumps(found))


if __name__ == "__main__":
    main()
