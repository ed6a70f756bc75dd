"""Our Triton kernels: right in Triton's interpreter, compiled for GPUs that are not there, absent without Triton."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
OPS = ("add_rms_norm", "cross_entropy", "glu", "rms_norm", "rope")
TARGETS = ("cuda:80:32", "hip:gfx90a:64")

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed; run: pip install --no-deps triton"
)


def run(*arguments: str, **environment: str) -> str:
    """What a Python process prints that succeeds. Triton reads its environment when it is imported: hence a process."""
    kept = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    found = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == 0, (found.stdout + found.stderr)[-6000:]
    return found.stdout


def test_without_triton_the_library_is_absent() -> None:
    """The import fails with Triton's name, and that is the reason in every report; the package does not find itself."""
    code = """
import sys
sys.modules["triton"] = None
from llm_adapt.ops.dispatch.registry import load_library
print(load_library("triton"))
"""
    reason = run("-c", code)
    assert reason.startswith(("ModuleNotFoundError: ", "ImportError: "))
    assert "triton" in reason


@needs_triton
def test_the_library_imports_the_real_triton() -> None:
    """Inside our package of that name, `import triton` is the one that is installed."""
    code = """
from llm_adapt.ops.kernels.triton import library
print(library.triton.__file__, library.__file__, sep="\\n")
"""
    theirs, ours = run("-c", code).split()
    assert Path(theirs).parent.name == Path(ours).parent.name == "triton"
    assert "llm_adapt" not in Path(theirs).parts


@needs_triton
def test_the_cpu_is_refused_without_the_interpreter() -> None:
    """Triton has no CPU backend: each kernel refuses, and names the interpreter."""
    code = """
import torch
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.registry import load_library
from tests.ops.cases import cases
print(load_library("triton"))
kernels = [(case, case.op.kernels["triton"]) for case in cases() if "triton" in case.op.kernels]
print(len({kernel.name for _, kernel in kernels}))
print(*{refusal(case.op, kernel, case.call) for case, kernel in kernels}, sep="\\n")
"""
    absent, number, *reasons = run("-c", code).split("\n")[:-1]
    assert (absent, number) == ("", str(len(OPS)))
    expected = "Triton has no CPU backend; its interpreter runs there, with TRITON_INTERPRET=1 set before it starts"
    assert set(reasons) == {expected, "does not honour bias"}


@needs_triton
@pytest.mark.parametrize("op", OPS)
def test_kernels_are_right_in_the_interpreter(op: str) -> None:
    """Every test of interpreted_triton.py that concerns the op passes where TRITON_INTERPRET=1 is set."""
    options = ["-q", "-p", "no:cacheprovider", "--no-header", "-k", f"{op} and not add_{op}"]
    said = run("-m", "pytest", "tests/ops/kernels/interpreted_triton.py", *options, TRITON_INTERPRET="1")
    assert " passed" in said
    assert "skipped" not in said


@needs_triton
@pytest.mark.parametrize("cases", ["first", pytest.param("all", marks=pytest.mark.slow)])
@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_a_device(target: str, cases: str, tmp_path: Path) -> None:
    """Triton's compiler makes machine code of what the ops' inputs launch, for warps of 32 and of 64 threads."""
    said = run("tests/ops/kernels/compiled_triton.py", target, cases, TRITON_CACHE_DIR=str(tmp_path))
    kernels = dict(line.split() for line in said.splitlines())
    expected = {
        "gated": ("_backward", "_forward"),
        "losses": ("_backward", "_forward"),
        "norms": ("_backward", "_backward_of_long", "_forward", "_forward_of_long"),
        "rotary": ("_turn",),
        "row_sums": ("_added_up", "_sums"),
    }
    assert sorted(kernels) == sorted(f"{file}.{name}" for file, names in expected.items() for name in names)
    assert all(int(number) > 0 for number in kernels.values())
