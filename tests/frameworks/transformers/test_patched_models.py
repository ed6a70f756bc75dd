"""Models with the rows of norms and rotary functions in force: they train as before, and unpatch() restores them."""

from __future__ import annotations

import gc
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import llm_adapt
from tests.frameworks.transformers.probed import PLAIN, modeling, op_calls

pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _no_garbage() -> Iterator[None]:
    """An earlier patch's rows hold originals until they are collected, and the report would tell of them."""
    gc.collect()
    yield
    gc.collect()


def test_existing_instances_are_reached_and_unpatch_restores() -> None:
    """patch() after the model was made serves it; the report lists what was swapped and what was not, and why."""
    module, gated = modeling("qwen3_next"), modeling("qwen3_next").Qwen3NextRMSNormGated.forward
    original = module.Qwen3NextRMSNorm.forward
    norm, x = module.Qwen3NextRMSNorm(16), torch.randn(3, 16)
    expected, before = norm(x), op_calls()
    with llm_adapt.patched(device="cpu") as report:
        torch.testing.assert_close(norm(x), expected)
        assert op_calls() == 1  # a patch starts the count anew
        assert module.Qwen3NextRMSNormGated.forward is gated
        lines = {line.subject: (line.choice, line.reason) for line in report.lines}
    name = "transformers.models.qwen3_next.modeling_qwen3_next"
    assert lines[f"{name}:Qwen3NextRMSNorm.forward"] == ("applied", "computes rms_norm, one_plus, result dtype x")
    gated_line = ("left as it is", "its forward takes (hidden_states, gate)")
    assert lines[f"{name}:Qwen3NextRMSNormGated"] == gated_line
    assert module.Qwen3NextRMSNorm.forward is original
    assert before >= 0


def test_with_operators_off_nothing_is_surveyed() -> None:
    """ops="off" leaves every class as it is."""
    original = modeling("llama").LlamaRMSNorm.forward
    with llm_adapt.patched(device="cpu", ops="off"):
        assert modeling("llama").LlamaRMSNorm.forward is original


def test_patch_reaches_copies_and_unpatch_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name that another module took is rebound too; the report tells both what was replaced and what was not."""
    module, user = modeling("deepseek_v3"), types.ModuleType("some_script")
    # In variables of a function, which alone the search for copies passes over.
    plain, interleaved = module.apply_rotary_pos_emb, module.apply_rotary_pos_emb_interleave
    user.rotate = plain  # type: ignore[attr-defined]
    modeling("llama4")
    monkeypatch.setitem(sys.modules, "some_script", user)
    with llm_adapt.patched(device="cpu") as report:
        assert user.rotate is module.apply_rotary_pos_emb is not plain
        lines = {line.subject: (line.choice, line.reason) for line in report.lines}
    name = "transformers.models.deepseek_v3.modeling_deepseek_v3"
    family = "rotates: half, columns: all, rounds each step, float32 tables: widen x"
    assert lines[f"{name}:{PLAIN}"] == ("applied", family)
    llama4 = "transformers.models.llama4.modeling_llama4:apply_rotary_emb"
    assert lines[llama4] == ("left as it is", "takes (xq, xk, freqs_cis)")
    assert user.rotate is module.apply_rotary_pos_emb is plain
    assert module.apply_rotary_pos_emb_interleave is interleaved


MODELS = {
    "Llama": {},
    "Gemma2": {"head_dim": 8},
    "Qwen3": {"head_dim": 8},
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
    "DeepseekV3": {
        "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
        "v_head_dim": 8, "qk_nope_head_dim": 8, "first_k_dense_replace": 1,
    },
}  # fmt: skip


def tiny(name: str) -> Any:
    """A model of two layers."""
    import transformers

    sizes = {
        "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    config = getattr(transformers, f"{name}Config")(**{**sizes, **MODELS[name]})
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def step(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Loss and gradients."""
    ids = torch.arange(1, 25).view(2, 12)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("name", "amp"), [*((name, False) for name in MODELS), ("Llama", True), ("Gemma2", True)])
def test_a_model_trains_as_before(name: str, amp: bool) -> None:
    """Loss and gradients of a whole model agree, under autocast too, and afterwards they are what they were."""
    model = tiny(name)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=amp):
        before = step(model)
        with llm_adapt.patched(device="cpu") as report:
            found = step(model)
            ops = {line.subject.split()[0] for line in report.lines if line.section == "op"}
        after = step(model)
    assert {"rms_norm", "rope"} <= ops
    tolerance = 3e-2 if amp else 1e-5
    torch.testing.assert_close(found[0], before[0], rtol=tolerance, atol=0)
    for key, gradient in before[1].items():
        assert float((found[1][key] - gradient).norm() / (gradient.norm() + 1e-6)) < tolerance, key
    assert torch.equal(before[0], after[0])


def test_gradient_checkpointing_gives_the_same_numbers() -> None:
    """Recomputed activations are those of the first pass."""
    model = tiny("Llama").train()
    with llm_adapt.patched(device="cpu"):
        plain = step(model)
        model.gradient_checkpointing_enable()
        checkpointed = step(model)
    assert torch.equal(plain[0], checkpointed[0])
    for name, gradient in plain[1].items():
        torch.testing.assert_close(checkpointed[1][name], gradient)


@pytest.mark.slow
def test_a_patched_model_compiles_in_one_graph() -> None:
    """The whole of Llama, with all of the rows of transformers in force."""
    model = tiny("Llama").eval()
    ids = torch.arange(1, 25).view(2, 12)
    with llm_adapt.patched(device="cpu"):
        expected = model(input_ids=ids, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(input_ids=ids, use_cache=False).logits, expected)
    torch._dynamo.reset()
