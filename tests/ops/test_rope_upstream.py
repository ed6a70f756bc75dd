"""Rotary embedding: the reference is what transformers and Megatron-Core compute, in every layout and table."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from megatron.core.models.common.embeddings import rope_utils

from llm_adapt.ops.rope import rope
from tests.ops.rope_checks import PAIRS, drawn, full_width, tables_of, with_gradient

FAMILIES = ["llama", "qwen2", "qwen3", "mistral", "gemma2", "mixtral", "deepseek_v3", "gpt_oss", "gemma3"]
YARN = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
    "rope_theta": 10000.0,
}


def _same(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    """Equal bit by bit, and in dtype."""
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def _transformers_tables(family: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of two sequences at other positions, from the family's own rotary embedding."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    configs = importlib.import_module(f"transformers.models.{family}.configuration_{family}")
    name = "".join(part.capitalize() for part in family.split("_"))
    config = getattr(configs, name + ("TextConfig" if family == "gemma3" else "Config"))
    given: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "head_dim": 16, "max_position_embeddings": 64}
    if family in ("deepseek_v3", "gpt_oss"):
        given |= {"rope_parameters": dict(YARN), "qk_rope_head_dim": 16}
    if family == "llama":
        given |= {"rope_parameters": dict(LLAMA3)}
    rotary = getattr(module, name + "RotaryEmbedding")(config(**given))
    positions = torch.stack([torch.arange(7), torch.arange(7) + 11])
    options = {"layer_type": "full_attention"} if family == "gemma3" else {}
    cos, sin = rotary(torch.empty(1, dtype=dtype), positions, **options)
    return cos, sin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("unsqueeze_dim", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_each_models_rotation(family: str, unsqueeze_dim: int, dtype: torch.dtype) -> None:
    """Outputs and gradients equal those of the model's apply_rotary_pos_emb on its own tables, bit by bit."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    cos, sin = _transformers_tables(family, dtype)
    x = drawn(2, 3, 7, 16, dtype=dtype) if unsqueeze_dim == 1 else drawn(2, 7, 3, 16, dtype=dtype)

    def upstream(x: torch.Tensor) -> torch.Tensor:
        return module.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim=unsqueeze_dim)[0]

    table = "half" if cos.shape[-1] == 8 else "full"
    assert (table == "half") == (family == "gpt_oss")
    layout = "bhsd" if unsqueeze_dim == 1 else "bshd"
    _same(
        with_gradient(rope, x, cos, sin, layout=layout, table=table, compute="x"),
        with_gradient(upstream, x),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_interleaved_to_half_is_deepseeks(dtype: torch.dtype) -> None:
    """The form of multi-latent attention equals apply_rotary_pos_emb_interleave, with either width of tables."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    cos, sin = _transformers_tables("deepseek_v3", dtype)
    x = drawn(2, 3, 7, 16, dtype=dtype)
    expected = with_gradient(lambda x: apply_rotary_pos_emb_interleave(x, x, cos, sin)[0], x)
    options = {"layout": "bhsd", "pairs": "interleaved_to_half", "compute": "x"}
    _same(with_gradient(rope, x, cos, sin, **options), expected)
    _same(with_gradient(rope, x, cos[..., :8], sin[..., :8], table="half", **options), expected)


@pytest.mark.parametrize("family", ["glm", "cohere"])
def test_interleaved_is_glms_and_coheres(family: str) -> None:
    """Interleaved pairs, in and out, on a part of the features (GLM) or in float32 (Cohere)."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    x = drawn(2, 3, 7, 16, dtype=torch.bfloat16)
    cos, sin = tables_of(7, 4 if family == "glm" else 8, dtype=torch.bfloat16)
    layout = "half" if family == "glm" else "interleaved"  # of the tables that the family's own embedding makes
    expected = module.apply_rotary_pos_emb(x, x, full_width(cos, layout)[None], full_width(sin, layout)[None])[0]
    compute = "x" if family == "glm" else "float32"
    found = rope(x, cos, sin, layout="bhsd", pairs="interleaved", table="half", compute=compute)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize(("features", "mscale"), [(16, 1.0), (8, 1.3)])
def test_it_is_megatrons_rotation(pairs: str, features: int, mscale: float, dtype: torch.dtype) -> None:
    """sbhd equals Megatron's unfused bshd function, bit by bit: whole or partial, with mscale in the table."""
    x = drawn(7, 2, 3, 16, dtype=dtype)
    angles = torch.rand(7, features // 2, generator=torch.Generator().manual_seed(1)) * 6
    freqs = full_width(angles, pairs)

    def upstream(x: torch.Tensor) -> torch.Tensor:
        return rope_utils._apply_rotary_pos_emb_bshd(
            x, freqs[:, None, None], pairs == "interleaved", pairs == "interleaved_to_half", mscale
        )

    cos, sin = torch.cos(freqs) * mscale, torch.sin(freqs) * mscale
    found = with_gradient(rope, x, cos, sin, layout="sbhd", pairs=pairs, compute="x")
    _same(found, with_gradient(upstream, x))


def test_a_table_for_each_sequence_is_megatrons() -> None:
    """Multimodal tables differ between the sequences of a batch."""
    x, freqs = drawn(7, 2, 3, 16), torch.rand(7, 2, 1, 16)
    expected = rope_utils._apply_rotary_pos_emb_bshd(x, freqs)
    rows = freqs[:, :, 0].transpose(0, 1)
    assert torch.equal(rope(x, rows.cos(), rows.sin(), layout="sbhd"), expected)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("ends", [[0, 3, 3, 10], [0, 10], [0, 1, 2, 10]])
def test_packed_sequences_are_megatrons(pairs: str, ends: list[int]) -> None:
    """thd with cu_seqlens equals Megatron's thd function: positions restart at each sequence."""
    x, cu_seqlens = drawn(10, 3, 16), torch.tensor(ends, dtype=torch.int32)
    freqs = full_width(torch.rand(12, 8), pairs)
    group = SimpleNamespace(size=lambda: 1, rank=lambda: 0)

    def upstream(x: torch.Tensor) -> torch.Tensor:
        return rope_utils._apply_rotary_pos_emb_thd(
            x, cu_seqlens, freqs[:, None, None], pairs == "interleaved", pairs == "interleaved_to_half", 1.0, group
        )

    found = with_gradient(
        rope, x, freqs.cos(), freqs.sin(), cu_seqlens=cu_seqlens, layout="thd", pairs=pairs, compute="x"
    )
    _same(found, with_gradient(upstream, x))
