"""The census: every norm and rotary function that is recognised computes what its original does, in float64."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "scripts"))

pytest.importorskip("transformers")

import transformers_census as census  # noqa: E402

TELLING = (
    "llama", "gemma", "gemma2", "gemma3", "gemma3n", "qwen3_next", "gpt_oss", "olmo", "olmo2", "nanochat", "falcon_h1",
    "deepseek_v3", "cohere", "glm", "mllama", "qwen2_vl", "persimmon", "phi", "openai_privacy_filter", "t5", "nemotron",
)  # fmt: skip


@pytest.mark.parametrize("model", TELLING)
def test_what_is_recognised_computes_what_the_original_does(model: str) -> None:
    """Results and gradients in float64, and roundings in bfloat16, on shapes that the probe does not use."""
    findings = list(census.survey(importlib.import_module(f"transformers.models.{model}.modeling_{model}")))
    assert [one for one in findings if one.problem] == []
    assert any(one.family for one in findings)


def test_a_wrong_family_is_noticed() -> None:
    """The verification fails for a rotation with the other sign, and for another form, eps or column."""
    from dataclasses import replace

    from llm_adapt.frameworks.transformers import norms, rotary

    llama: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    rotation: Any = rotary.examine(llama)["apply_rotary_pos_emb"]
    formula: Any = norms.examine(llama)[llama.LlamaRMSNorm][0]  # type: ignore[index]
    assert census.verified(census.verify_rotary, llama.apply_rotary_pos_emb, rotation) == ""
    for wrong in (
        replace(rotation, inverse=True),
        replace(rotation, pairs="interleaved"),
        replace(rotation, columns="the first half"),
        replace(rotation, same="float32"),
        replace(rotation, is_partial=True),
    ):
        assert census.verified(census.verify_rotary, llama.apply_rotary_pos_emb, wrong) != "", wrong
    assert census.verified(census.verify_norm, llama.LlamaRMSNorm, (formula,)) == ""
    for wrong in (
        replace(formula, form="one_plus"),
        replace(formula, form="standard"),
        replace(formula, result_dtype="x"),
        replace(formula, op="layer_norm", form="standard"),
        replace(formula, eps=1e-5),
    ):
        assert census.verified(census.verify_norm, llama.LlamaRMSNorm, (wrong,)) != "", wrong


def test_the_original_is_evaluated_in_float64() -> None:
    """Llama's norm rounds to float32 on its way; inside the mode it does not."""
    llama: Any = importlib.import_module("transformers.models.llama.modeling_llama")
    x = torch.randn(5, 40, dtype=torch.float64)
    norm = llama.LlamaRMSNorm(40).double()
    exact = x / (x.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    with torch.no_grad(), census.InFloat64():
        assert float((norm(x) - exact).abs().max()) < 1e-14
    with torch.no_grad():
        assert float((norm(x) - exact).abs().max()) > 1e-9


@pytest.mark.slow
def test_the_page_is_what_is_found() -> None:
    """docs/transformers_census.md is up to date, and nothing in it is recognised wrongly."""
    script = [sys.executable, str(ROOT / "scripts" / "transformers_census.py"), "--check"]
    done = subprocess.run(script, capture_output=True, text=True, cwd=ROOT, check=False, timeout=550)
    assert done.returncode == 0, done.stderr
    counts = {
        row.split("|")[1].strip(): [int(n) for n in row.split("|")[2:6]] for row in done.stdout.splitlines() if row
    }
    assert counts["RMSNorm"][1] >= 183
    assert counts["rotary"][1] >= 188
