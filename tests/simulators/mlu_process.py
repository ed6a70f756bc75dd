"""Run checks and code in processes of a simulated MLU, and hand back what came of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.simulators.dcu_process import check, checks_of

__all__ = ["check", "checks_of", "outcomes", "python"]

ROOT = Path(__file__).resolve().parents[2]
_START = "from llm_adapt import simulators; simulators.enter({text!r})\n"
_DROPPED = ("LLM_ADAPT_", "MLU_", "CN_VISIBLE", "CUDA_VISIBLE", "TORCH_MLU", "TORCH_DEVICE_BACKEND")


def _environment(variables: dict[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_DROPPED)}
    if "LLM_ADAPT_CACHE" in os.environ:
        kept["LLM_ADAPT_CACHE"] = os.environ["LLM_ADAPT_CACHE"]
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def python(code: str, model: str = "MLU590-M9", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code on a simulated MLU; torch is not imported yet."""
    command = [sys.executable, "-c", _START.format(text=f"mlu:{model}") + code]
    environment = _environment(variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def outcomes(module: str, folder: Path, num_ranks: int = 1) -> dict[str, str]:
    """Run a module of checks on some ranks: name of the check -> "" or what the ranks say of it."""
    run = f"from tests.simulators.dcu_process import run; run({module!r}, {str(folder)!r})"
    code = _START.format(text="mlu") + "import torch; simulators.install()\n" + run
    store = {"CNCL_STORE": str(folder / "store"), "WORLD_SIZE": str(num_ranks)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            env=_environment(store | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(num_ranks)
    ]
    said = [process.communicate(timeout=500)[0] for process in ranks]
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    assert all(file.exists() for file in files), "\n".join(said)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: "\n".join(f"rank {i}: {one[name]}" for i, one in enumerate(found) if one[name]) for name in found[0]}
