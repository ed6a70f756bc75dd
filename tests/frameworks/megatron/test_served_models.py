"""Small models of Megatron's local spec with all tables of operators, against Megatron's own code in this process."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.frameworks.megatron.real_megatron import (
    SEQUENCE,
    VOCAB,
    agree,
    calling,
    calls,
    gradients,
    model,
    on_one_rank,
    reseed,
    served,
    step,
)

LLAMA = {
    "gated_linear_unit": True,
    "activation_func": torch.nn.functional.silu,
    "num_query_groups": 2,
    "add_bias_linear": False,
}


@pytest.fixture(scope="module", autouse=True)
def megatron() -> Iterator[None]:
    """Real Megatron-Core, patched for the whole module."""
    with on_one_rank():
        yield


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> None:
    """The fixture above unpatches at the end of the module, and not each test."""


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt": ("LayerNorm", {}),
    "llama": ("RMSNorm", LLAMA | {"apply_rope_fusion": True}),
    "gemma": ("RMSNorm", LLAMA | {"layernorm_zero_centered_gamma": True, "qk_layernorm": True, "window_size": (5, 0)}),
    "gpt-oss": ("RMSNorm", LLAMA | {"softmax_type": "learnable"}),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_with_all_tables_is_megatrons(name: str, dtype: torch.dtype) -> None:
    """Loss and the gradient of every parameter, with the mask that Megatron's data gives, and without one."""
    normalization, values = MODELS[name]
    expected = step(model(normalization, dtype, **values))
    with served(), calling("attention", 4):
        gpt = model(normalization, dtype, **values)
        found, without_mask = step(gpt), step(gpt, with_mask=False)
    for losses, grads in (found, without_mask):
        agree(losses, expected[0], dtype)
        agree(grads, expected[1], dtype, factor=2.0)


def test_recompute_of_a_whole_model_is_the_model() -> None:
    """Full recompute with dropout in attention and residuals gives the loss and gradients of the plain model."""
    found = []
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    with served():
        for values in ({}, recompute):
            gpt = model("RMSNorm", **LLAMA, **values, attention_dropout=0.2, hidden_dropout=0.2)
            reseed(21)
            found.append(step(gpt, with_mask=False))
    agree(found[1][0], found[0][0], torch.float32)
    agree(found[1][1], found[0][1], torch.float32)


def test_every_table_is_at_work_in_a_llama() -> None:
    """A model of RMSNorm, SwiGLU, rope and grouped heads calls the operator of each of its parts."""
    ops = ("rms_norm", "attention", "rope", "glu", "dropout_add", "softmax_partials")
    with served():
        gpt = model("RMSNorm", **LLAMA)
        before = {op: calls(op) for op in ops}
        step(gpt, with_mask=False)
        found = {op: calls(op) - before[op] for op in ops}
    assert found == {"rms_norm": 5, "attention": 2, "rope": 4, "glu": 2, "dropout_add": 4, "softmax_partials": 1}


def test_generation_with_a_cache_is_the_whole_sequence() -> None:
    """Prompt, then one token at a time, gives the logits of the whole sequence at once."""
    contexts = importlib.import_module("megatron.core.inference.contexts")
    tokens = torch.randint(VOCAB, (2, 10), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(10).expand(2, -1)
    context = contexts.StaticInferenceContext(2, SEQUENCE)
    with served(), torch.no_grad(), calling("attention", 2 * 6):
        gpt = model("RMSNorm", **LLAMA).eval()
        expected = gpt(tokens, positions, None)
        start, found = 0, []
        for length in (6, 1, 1, 1, 1):
            part = slice(start, start + length)
            cache = {"inference_context": context, "runtime_gather_output": True}
            found.append(gpt(tokens[:, part], positions[:, part], None, **cache)[:, -1])
            context.sequence_len_offset += length
            start += length
    torch.testing.assert_close(torch.stack(found, 1), expected[:, 5:])


def latent_model() -> Any:
    """A model with multi-latent attention, whose values are narrower than its keys."""
    transformer = importlib.import_module("megatron.core.transformer")
    specs = importlib.import_module("megatron.core.models.gpt.gpt_layer_specs")
    gpt = importlib.import_module("megatron.core.models.gpt")
    reseed(11)
    sizes = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_head_dim": 8, "qk_pos_emb_head_dim": 4, "v_head_dim": 6}
    config = transformer.MLATransformerConfig(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=4,
        normalization="RMSNorm",
        rope_type="rope",
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        gradient_accumulation_fusion=False,
        **sizes,
    )
    spec = specs.get_gpt_layer_local_spec(multi_latent_attention=True, normalization="RMSNorm", qk_layernorm=True)
    return gpt.GPTModel(config, spec, VOCAB, SEQUENCE, position_embedding_type="none").cuda()


def test_multi_latent_attention_is_served_and_runs_at_all() -> None:
    """Without TransformerEngine Megatron cannot build it; served, it computes what Megatron's own forward computes."""
    with pytest.raises(TypeError):
        latent_model()
    with served("attention"):
        gpt = latent_model()
    expected = step(gpt)  # Megatron's own code in the modules that were built
    with served(), calling("attention", 4):
        gpt = latent_model()
        found, without_mask = step(gpt), step(gpt, with_mask=False)
    for losses, grads in (found, without_mask):
        agree(losses, expected[0], torch.float32)
        agree(grads, expected[1], torch.float32)


def test_packed_sequences_of_a_model_are_as_one_by_one() -> None:
    """Two sequences packed into one give the losses that each has alone, through rope, attention and all."""
    packed = importlib.import_module("megatron.core.packed_seq_params").PackedSeqParams
    lengths = [6, 10]
    ends = torch.tensor([0, 6, 16], dtype=torch.int32)
    params = packed("thd", ends, ends, max_seqlen_q=10, max_seqlen_kv=10)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(VOCAB, (1, 16), generator=generator)
    labels = torch.randint(VOCAB, (1, 16), generator=generator)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    with served():
        gpt = model("RMSNorm", **LLAMA, apply_rope_fusion=True)
        found = gpt(tokens, positions, None, labels=labels, packed_seq_params=params)
        expected = [
            gpt(*(x.split(lengths, 1)[i] for x in (tokens, positions)), None, labels=labels.split(lengths, 1)[i])
            for i in range(2)
        ]
    torch.testing.assert_close(found, torch.cat(expected, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_l2_norm_is_megatrons(dtype: torch.dtype) -> None:
    """L2Norm, of queries and keys: result and gradient are Megatron's."""
    norm = importlib.import_module("megatron.core.transformer.torch_norm").L2Norm(8)
    x = torch.randn(3, 2, 8).to(dtype)
    expected = gradients(norm, x)
    with served("norms"), calling("rms_norm"):
        found = gradients(norm, x)
    agree(found, expected, dtype)
