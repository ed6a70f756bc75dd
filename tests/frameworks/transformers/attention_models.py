"""Tiny models of transformers for the tests of attention, and what they are compared by."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_adapt.adapters import adapters
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import attention
from llm_adapt.ops.dispatch.in_force import start_over
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.patching import Plan
from llm_adapt.report import Report
from llm_adapt.settings import Settings

WINDOW = 5
_BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": None,
}  # fmt: skip
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16,
    "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1,
    "moe_intermediate_size": 32, "first_k_dense_replace": 1, "n_shared_experts": 1,
}  # fmt: skip
# Name -> class of the model, and what its config has besides.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("LlamaForCausalLM", {}),
    "Mistral": ("MistralForCausalLM", {"sliding_window": WINDOW, "head_dim": 16}),
    "Gemma2": (
        "Gemma2ForCausalLM",
        {"sliding_window": WINDOW, "head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 2.0},
    ),
    "GptOss": (
        "GptOssForCausalLM",
        {"sliding_window": WINDOW, "head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "DeepseekV3": ("DeepseekV3ForCausalLM", _MLA),
}
_ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "Bart": (
        "BartForConditionalGeneration",
        {
            "vocab_size": 97, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
            "decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 64,
            "dropout": 0.0,
        },
    ),
    "T5": (
        "T5ForConditionalGeneration",
        {"vocab_size": 97, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0},
    ),
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small take longer on more threads, several times so on a machine that is busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@contextlib.contextmanager
def served(order: tuple[str, ...] = ("torch_native", "chunked")) -> Iterator[Report]:
    """transformers' attention is the operator inside, and nothing else of llm_adapt is in place."""
    context = Context(adapters()["cpu"], Settings(), Report())
    plan = Plan(attention.rows(context))
    plan.apply()
    start_over(Policy(order=order))
    try:
        yield context.report
    finally:
        start_over(Policy())
        assert plan.undo() == []


def build(name: str, attn: str, dtype: torch.dtype = torch.float32, **values: Any) -> Any:
    """A model with the same weights each time, sharp enough for masks, caps and sinks to matter."""
    import transformers

    kind, own = MODELS[name] if name in MODELS else _ENCODER_DECODERS[name]
    base = _BASE if name in MODELS else {}
    cls = getattr(transformers, kind)
    config = cls.config_class(**{**base, **own, **values})
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attn, dtype=torch.float32)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "sinks" in parameter_name:
                parameter.copy_(torch.tensor([2.0, -1.0, 0.5, 3.0]))
            elif any(part in parameter_name for part in ("q_proj", "k_proj", "q_b_proj", "kv_b_proj", ".q.", ".k.")):
                parameter.mul_(8.0)
    return model.to(dtype)


def tokens(rows: int = 2, columns: int = 20) -> torch.Tensor:
    """Token ids without padding."""
    return torch.randint(3, 97, (rows, columns), generator=torch.Generator().manual_seed(1))


def padding(side: str, ids: torch.Tensor) -> torch.Tensor:
    """The 2-D mask of a batch of which the last row has 7 tokens of padding at a side, or none."""
    mask = torch.ones_like(ids)
    if side == "left":
        mask[-1, :7] = 0
    if side == "right":
        mask[-1, -7:] = 0
    return mask


def step(model: Any, ids: torch.Tensor, mask: torch.Tensor, **inputs: Any) -> dict[str, torch.Tensor]:
    """Logits of the tokens that are no padding, and the gradient of every parameter, by name."""
    model.zero_grad(set_to_none=True)
    logits = model(input_ids=ids, attention_mask=mask, **inputs).logits
    if logits.shape[:2] == mask.shape:
        logits = logits * mask[..., None]
    logits.float().square().mean().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"logits": logits.detach(), **found}


def distance(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """The largest difference of a tensor, as a share of its largest value; infinite where a tensor is missing.

    A tensor whose values are next to nothing is compared on the scale of the others: roundings of theirs are in it.
    """
    if found.keys() != expected.keys():
        return float("inf")
    pairs = [(found[name].detach().double(), value.detach().double()) for name, value in expected.items()]
    floor = 1e-3 * max(float(value.abs().max()) for _, value in pairs)
    return max(float((ours - value).abs().max()) / max(float(value.abs().max()), floor) for ours, value in pairs)
