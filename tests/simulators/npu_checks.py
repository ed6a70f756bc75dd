"""What the tests of the simulated NPU share: an operator of torch_npu against a formula in float64 on the CPU.

Import torch before this module is used: it runs in a process that simulates an NPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch

__all__ = ["FLOATS", "HALVES", "agrees", "close", "refuses", "said_on"]

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)
_BEGIN = "--- the code begins"
_START = f"""
import llm_adapt
llm_adapt.patch(simulate="npu:{{model}}")
import torch, torch_npu

def outcome(call):
    try:
        call()
        torch.npu.synchronize()
    except (RuntimeError, NotImplementedError) as error:
        print("refused:", error)
    else:
        print("done")

print({_BEGIN!r}, flush=True)
"""
# Largest difference over largest value: the arithmetic of float32, one rounding to 16 bits.
_TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def close(found: torch.Tensor, expected: torch.Tensor, what: str = "result") -> None:
    """Compare a result with its float64 value.

    Raises:
        AssertionError: shapes differ, or values by more than rounding.
    """
    tolerance = _TOLERANCE[found.dtype]
    assert found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, expected {tuple(expected.shape)}"
    if not found.numel():
        return
    difference = (found.detach().cpu().double() - expected.detach().double()).abs().max().item()
    scale = max(expected.detach().double().abs().max().item(), 1e-6)
    assert difference <= tolerance * scale, f"{what}: off by {difference:.3e} where the largest is {scale:.3e}"


def agrees(
    operator: Callable[..., Any],
    formula: Callable[..., Any],
    tensors: Sequence[torch.Tensor],
    dtypes: Sequence[torch.dtype] | torch.dtype,
    *,
    backward: bool = True,
    node: str = "",
) -> None:
    """Run `operator` on the NPU and `formula` in float64 on the CPU; compare results and gradients of all tensors.

    Where results are a tuple, the first has the gradient. `node`: what the name of its autograd node must contain.

    Raises:
        AssertionError: they differ, or the node is another.
    """
    dtypes = [dtypes] * len(tensors) if isinstance(dtypes, torch.dtype) else list(dtypes)
    rounded = [tensor.to(dtype) for tensor, dtype in zip(tensors, dtypes, strict=True)]
    here = [tensor.detach().npu().requires_grad_(backward) for tensor in rounded]
    there = [tensor.detach().double().requires_grad_(backward) for tensor in rounded]
    found, expected = operator(*here), formula(*there)
    pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
    for place, (one, value) in enumerate(pairs):
        if value is not None:
            close(one, value, what=f"result {place}")
    if not backward:
        return
    first, value = pairs[0]
    assert first.grad_fn is not None, "the result has no autograd node"
    assert node in first.grad_fn.name(), f"autograd node {first.grad_fn.name()}"
    cotangent = torch.randn(value.shape, generator=torch.Generator().manual_seed(7)).to(first.dtype)
    first.backward(cotangent.npu())
    value.backward(cotangent.double())
    for place, (one, value) in enumerate(zip(here, there, strict=True)):
        assert one.grad is not None, f"gradient {place} is not there"
        assert one.grad.dtype == one.dtype, f"gradient {place} is {one.grad.dtype}"
        close(one.grad, value.grad, what=f"gradient {place}")


@contextmanager
def refuses(text: str) -> Iterator[None]:
    """The calls inside raise an error whose text contains `text` (a regular expression)."""
    with pytest.raises(RuntimeError, match=text):
        yield
        torch.npu.synchronize()


def said_on(model: str, code: str) -> str:
    """What `code` prints in a process of its own that simulates the chip `model`, with torch and torch_npu imported.

    Raises:
        AssertionError: it failed; with what it said.
    """
    command = [sys.executable, "-c", _START.format(model=model) + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.partition(f"{_BEGIN}\n")[2]
