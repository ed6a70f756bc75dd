"""A small mixture of experts of Megatron-Core, with and without the operators; for the checks beside it."""

from __future__ import annotations

import warnings
from typing import Any

import torch

from tests.frameworks.megatron.served_rows import REFERENCES, served

__all__ = ["EVERYTHING", "EXPERTS", "TOPK", "agree", "model", "same_with_and_without", "trained"]

warnings.simplefilter("ignore")
SEQUENCE, BATCH, VOCAB, HIDDEN, EXPERTS, TOPK = 12, 2, 32, 16, 4, 2
# Largest difference relative to the largest gradient of all: sums in another order.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 4e-2}
EVERYTHING = {
    "moe_aux_loss_coeff": 0.05,
    "moe_z_loss_coeff": 0.01,
    "moe_router_score_function": "sigmoid",
    "moe_router_topk_scaling_factor": 2.5,
    "moe_router_num_groups": 2,
    "moe_router_group_topk": 1,
    "moe_router_enable_expert_bias": False,
}


def prepare() -> None:
    """Model parallel groups of Megatron, and its random state."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    if not parallel_state.model_parallel_is_initialized():
        size = torch.distributed.get_world_size()
        parallel_state.initialize_model_parallel(expert_model_parallel_size=size)
    model_parallel_cuda_manual_seed(7)


def model(dtype: torch.dtype = torch.float32, grouped: bool = False, **values: Any) -> Any:
    """A GPT of the local spec whose every layer has experts; the same numbers at each call."""
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer import TransformerConfig

    prepare()
    given = {
        "num_layers": 2, "hidden_size": HIDDEN, "num_attention_heads": 2, "num_moe_experts": EXPERTS,
        "moe_router_topk": TOPK, "moe_ffn_hidden_size": 24, "add_bias_linear": False, "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu, "hidden_dropout": 0.0, "attention_dropout": 0.0,
        "moe_token_dispatcher_type": "alltoall", "moe_router_dtype": "fp32", "bf16": dtype == torch.bfloat16,
        "params_dtype": dtype, "moe_grouped_gemm": grouped, "gradient_accumulation_fusion": False,
        "expert_model_parallel_size": torch.distributed.get_world_size(),
    }  # fmt: skip
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=grouped)
    gpt = GPTModel(TransformerConfig(**(given | values)), spec, VOCAB, SEQUENCE).cuda().to(dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in sorted(gpt.named_parameters()):
            if "weight1" not in name and "weight2" not in name and "experts" not in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + ("norm" in name))
        fill_experts(gpt, grouped)
    return gpt


def fill_experts(gpt: Any, grouped: bool) -> None:
    """The same experts whether they are grouped or not, and on whichever rank they are."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    local = EXPERTS // size
    for number, layer in enumerate(gpt.decoder.layers):
        held = layer.mlp.experts
        for index in range(EXPERTS):
            generator = torch.Generator().manual_seed(100 * number + index)
            first = torch.randn(48, HIDDEN, generator=generator) * 0.3
            second = torch.randn(HIDDEN, 24, generator=generator) * 0.3
            if index // local != rank:
                continue
            at = index % local
            if grouped:
                held.weight1.view(local, HIDDEN, 48)[at] = first.t().to(held.weight1.dtype)
                held.weight2.view(local, 24, HIDDEN)[at] = second.t().to(held.weight2.dtype)
            else:
                held.local_experts[at].linear_fc1.weight.copy_(first)
                held.local_experts[at].linear_fc2.weight.copy_(second)


def trained(gpt: Any) -> dict[str, torch.Tensor]:
    """Loss and all gradients of one batch; grouped experts under the names of the single ones."""
    generator = torch.Generator().manual_seed(5 + torch.distributed.get_rank())
    tokens = torch.randint(0, VOCAB, (BATCH, SEQUENCE), generator=generator).cuda()
    positions = torch.arange(SEQUENCE, device="cuda").expand(BATCH, -1)
    mask = torch.ones(1, 1, SEQUENCE, SEQUENCE, device="cuda").tril() < 0.5
    gpt.train()
    loss = gpt(tokens, positions, mask, labels=tokens.roll(-1, 1)).mean()
    loss.backward()
    found = {"loss": loss.detach().float()}
    for name, parameter in gpt.named_parameters():
        if parameter.grad is None:  # of a router that was replaced
            assert "router" in name, name
            continue
        if name.endswith(("weight1", "weight2")):
            local = EXPERTS // torch.distributed.get_world_size()
            shape = (local, HIDDEN, 48) if name.endswith("1") else (local, 24, HIDDEN)
            for index, grad in enumerate(parameter.grad.view(shape)):
                layer = name.removesuffix(f".weight{name[-1]}")
                found[f"{layer}.local_experts.{index}.linear_fc{name[-1]}.weight"] = grad.t().float()
        else:
            found[name] = parameter.grad.float()
    return found


def agree(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], dtype: torch.dtype) -> None:
    """The same loss and gradients up to the order of sums."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = max(float(value.abs().max()), 1e-3)
        error = float((found[name] - value).abs().max()) / scale
        assert error <= TOLERANCE[dtype], f"{name}: {error}"


def same_with_and_without(dtype: torch.dtype = torch.float32, grouped: bool = False, **values: Any) -> None:
    """Loss and gradients with Megatron's own functions, with the rows of the CPU, and with every op."""
    expected = None if grouped else trained(model(dtype, **values))
    with served():
        rows_of_the_cpu = trained(model(dtype, grouped, **values))
    with served(REFERENCES):
        found = trained(model(dtype, grouped, **values))
    if grouped:
        expected = trained(model(dtype, **values))  # sequential experts, which need no package
    agree(found, expected, dtype)
    agree(rows_of_the_cpu, expected, dtype)
