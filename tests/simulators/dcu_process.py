"""Run checks in processes of a simulated DCU, and hand back what came of them.

A file of checks is a module whose functions are marked with @check; each takes no argument, its docstring is its
specification, and all of them run one after another in one process (or in one on each rank), since torch takes
seconds to import.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

__all__ = ["check", "checks_of", "outcomes", "python"]

ROOT = Path(__file__).resolve().parents[2]
HERE = "tests.simulators"
Check = Callable[[], None]
_CHECKS: dict[str, dict[str, Check]] = {}
_START = "from llm_adapt import simulators; simulators.enter({text!r}); import torch; simulators.install()\n"


def check(function: Check) -> Check:
    """Register a check of the module that defines it."""
    _CHECKS.setdefault(function.__module__, {})[function.__name__] = function
    return function


def checks_of(module: str) -> dict[str, Check]:
    """The checks of a module of this folder, by name."""
    importlib.import_module(f"{HERE}.{module}")
    return _CHECKS[f"{HERE}.{module}"]


def _environment(variables: dict[str, str]) -> dict[str, str]:
    dropped = ("LLM_ADAPT_", "DCU_SIM_", "CUDA_VISIBLE", "HIP_VISIBLE", "HCU_VISIBLE")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    if "LLM_ADAPT_CACHE" in os.environ:
        kept["LLM_ADAPT_CACHE"] = os.environ["LLM_ADAPT_CACHE"]
    return kept | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | variables


def python(code: str, model: str | None = "BW1000", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run code, on a simulated DCU unless the model is None."""
    start = "" if model is None else _START.format(text=f"dcu:{model}")
    command = [sys.executable, "-c", start + code]
    environment = _environment(variables)
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500, check=False)


def outcomes(module: str, folder: Path, num_ranks: int = 1) -> dict[str, str]:
    """Run a module of checks: name of the check -> "" or what the ranks say of it."""
    code = f"from {HERE}.dcu_process import run; run({module!r}, {str(folder)!r})"
    start = _START.format(text="dcu:BW1000")
    store = {"RCCL_STORE": str(folder / "store")}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", start + code],
            env=_environment({"RANK": str(rank), "WORLD_SIZE": str(num_ranks), "LOCAL_RANK": str(rank)} | store),
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(num_ranks)
    ]  # fmt: skip
    said = [process.communicate(timeout=500)[0] for process in ranks]
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    assert all(file.exists() for file in files), "\n".join(said)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {name: "\n".join(f"rank {i}: {one[name]}" for i, one in enumerate(found) if one[name]) for name in found[0]}


def run(module: str, folder: str) -> None:
    """In the simulated process: run every check; after a failure on several ranks, none, since they would wait."""
    found = dict.fromkeys(checks_of(module), "not run: an earlier check failed on this rank")
    for name, function in checks_of(module).items():
        try:
            function()
            found[name] = ""
        except BaseException:  # noqa: BLE001 - whatever it is, pytest's too, it is the outcome
            found[name] = traceback.format_exc()
            if os.environ["WORLD_SIZE"] != "1":
                break
    Path(folder, f"{os.environ['RANK']}.json").write_text(json.dumps(found), encoding="utf-8")
