"""Tiny models for the tests of losses, experts and MLPs, one step of them, and the rows in force alone."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from llm_adapt.adapters import adapters
from llm_adapt.frameworks.context import Context
from llm_adapt.ops.dispatch.in_force import start_over
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.patching import Plan
from llm_adapt.report import Report
from llm_adapt.settings import Settings

_BASE = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
_MLA = {
    "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16,
    "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 24,
    "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
# Name of the model's folder -> its classes begin with, and what its config has besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "phi3": ("Phi3", {}),
    "gemma2": ("Gemma2", {"head_dim": 16}),
    "mixtral": ("Mixtral", {"num_local_experts": 5}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24, "num_experts": 6,
            "num_experts_per_tok": 2,
        },
    ),
    "qwen3_moe": (
        "Qwen3Moe", {"moe_intermediate_size": 24, "num_experts": 6, "num_experts_per_tok": 2, "head_dim": 16},
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": 6, "num_experts_per_tok": 2, "head_dim": 16}),
    "deepseek_v3": ("DeepseekV3", _MLA),
}  # fmt: skip
MOE = ("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss", "deepseek_v3")


@contextlib.contextmanager
def served(
    rows: Callable[[Context], Sequence[Any]], order: tuple[str, ...] = ("torch_native",), device: str = "cpu"
) -> Iterator[Report]:
    """The rows of one table are in place inside, as for that device, and nothing else of llm_adapt is."""
    gc.collect()  # what an earlier plan held of the originals must not be found by this one
    context = Context(adapters()[device], Settings(), Report())
    plan = Plan(rows(context))
    plan.apply()
    context.report.sources.append(lambda: iter(()))
    context.report.parts["outcomes"] = lambda: [(row.target, status, told) for row, status, told in plan.outcomes()]
    start_over(Policy(order=order))
    try:
        yield context.report
    finally:
        start_over(Policy())
        assert plan.undo() == []


def applied(report: Report) -> set[str]:
    """The targets in place."""
    outcomes: Any = report.parts["outcomes"]()
    return {target for target, status, _ in outcomes if status == "applied"}


def model_of(name: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    """A model with the same weights each time, large enough for its MLPs to matter."""
    import transformers

    kind, own = MODELS[name]
    config = getattr(transformers, f"{kind}Config")(**{**_BASE, **own, **values})
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


def step(model: Any, **inputs: Any) -> dict[str, torch.Tensor]:
    """Loss and logits of a few tokens, and the gradient of every parameter, by name."""
    ids = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[0, :3] = -100
    model.zero_grad(set_to_none=True)
    found = model(input_ids=ids, labels=labels, **inputs)
    found.loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": found.loss.detach(), "logits": found.logits.detach(), **gradients}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, as a share of its norm; infinite where a tensor is missing or of no like."""
    if {name: (t.shape, t.dtype) for name, t in found.items()} != {n: (t.shape, t.dtype) for n, t in expected.items()}:
        return float("inf")
    return max(
        float((found[name].double() - value.double()).norm() / max(float(value.double().norm()), 1e-6))
        for name, value in expected.items()
    )
