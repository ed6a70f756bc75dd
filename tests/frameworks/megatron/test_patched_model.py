"""Megatron-Core itself under patch(), in one fresh process (patched_model.py): it trains, and each seam answers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What patched_model.py found."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; run: pip install megatron-core==0.16.1")
    for package in ("transformer_engine", "flash_attn", "mamba_ssm", "triton"):
        if importlib.util.find_spec(package) is not None:
            pytest.skip(f"{package} is installed; this is the test of Megatron without it")
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    script = Path(__file__).with_name("patched_model.py")
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("JSON ")]
    return json.loads(line.removeprefix("JSON "))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["gpt", "llama", "moe"])
def test_a_model_of_the_local_spec_learns_its_batch(found: dict[str, Any], kind: str) -> None:
    """GPT, a llama-like model and a mixture of experts fall from log(vocabulary); every parameter has a gradient."""
    losses = found[kind]["losses"]
    assert 4.0 < losses[0] < 4.4  # log(64) = 4.16
    assert losses[-1] < losses[0] - 1.0
    assert found[kind]["idle"] == []


def test_a_package_that_is_absent_is_older_than_any_version(found: dict[str, Any]) -> None:
    """TransformerEngine, flash-attn and mamba are answered with no, where Megatron raises."""
    assert found["seams"]["te"] == [False, False, False]


def test_a_loan_is_used_and_is_gone_after_the_import(found: dict[str, Any]) -> None:
    """Megatron's modules hold the stand-ins, a launched kernel refuses, and no one else can import them."""
    assert found["seams"]["wgrad"] is True
    assert "matmul_kernel_persistent was launched; Triton is not installed" in found["seams"]["launch"]
    assert found["seams"]["lent"] == []


def test_the_fused_paths_are_off(found: dict[str, Any]) -> None:
    """The fuser leaves functions alone, no fused softmax or GEMM is offered; rope fusion is served by the operator."""
    assert found["seams"]["unfused"] is True
    assert found["seams"]["softmax"] is False
    assert found["seams"]["gemm"] is None
    assert "apply_rope_fusion" not in found["effects"]


def test_megatron_gets_group_options_and_an_architecture(found: dict[str, Any]) -> None:
    """get_nccl_options fills its options, and get_device_arch_version has a number to read."""
    assert found["seams"]["max_ctas"] == 8
    assert found["seams"]["arch"] >= 7


def test_nothing_of_megatron_core_is_skipped_in_the_pinned_version(found: dict[str, Any]) -> None:
    """Every row of megatron.core is applied or waits for its module; the training loop is not in this wheel."""
    assert [target for target in found["skipped"] if target.startswith("megatron.core")] == []


def test_unpatch_gives_megatron_its_own_functions_back(found: dict[str, Any]) -> None:
    """After the patch, the fuser is torch's and the version check is Megatron's."""
    assert found["after"] == {"fuser": "torch", "check": "megatron.core.utils"}
