"""Compile what the ops' inputs launch, for a GPU that is not there; print how many variants there are of each kernel.

Arguments: backend:architecture:threads of a warp, and "first" or "all" inputs. Run by test_triton.py.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.dispatch.registry import find_op
from llm_adapt.ops.kernels.triton import gated, library, losses, norms, rotary, row_sums
from tests.ops.cases import Case, cases

backend, architecture, threads = sys.argv[1].split(":")
target = GPUTarget(backend, int(architecture) if architecture.isdigit() else architecture, int(threads))
found: dict[str, set[str]] = defaultdict(set)


def compile_alone(kernel: Any, programs: int, *arguments: Any, block: int, each: int = 16, **constants: Any) -> None:
    """Stands in for library.launch: the kernel is compiled and not started, so results are whatever memory held."""
    made = kernel.warmup(*arguments, grid=(programs,), **constants)
    found[f"{kernel.fn.__module__.rpartition('.')[2]}.{kernel.fn.__name__}"].add(made.hash)


def wanted() -> list[Case]:
    """The inputs, and one whose rows are longer than a block."""
    count = 2 if sys.argv[2] == "first" else 1000
    dtypes = (torch.bfloat16,) if sys.argv[2] == "first" else (torch.float32, torch.bfloat16, torch.float16)
    norm = find_op("rms_norm")
    long = norm.bind(x=torch.ones(3, 5000), weight=torch.ones(5000))
    return [*(case for case in cases(dtypes) if case.number < count), Case(norm, 0, torch.float32, long)]


driver.set_active(
    SimpleNamespace(
        get_current_target=lambda: target,
        get_current_device=lambda: 0,
        get_current_stream=lambda device=None: 0,
    )
)
rotary._reads_by_pairs = lambda device: True
library._is_interpreted = lambda: True  # what refuses the CPU otherwise
for module in (gated, losses, norms, rotary, row_sums):
    module.launch = compile_alone  # type: ignore[attr-defined]
for case in wanted():
    kernel = case.op.kernels.get("triton")
    if kernel is not None and not refusal(case.op, kernel, case.call):
        run_op(case.op, kernel.function, {k: v for k, v in case.arguments.items() if k in kernel.honours})
for name, variants in sorted(found.items()):
    print(name, len(variants))
