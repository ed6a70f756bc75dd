"""What a failed launch in torch_npu's task queue does to the process, and that a proof does not go on after it."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.simulator("npu")

_START = """
import llm_adapt
llm_adapt.patch(simulate="npu")
import torch, torch_npu

def outcome(call):
    try:
        call()
        torch.npu.synchronize()
        return "done"
    except RuntimeError as error:
        return " ".join(str(error).split())

def unmodelled():
    torch_npu.npu_pad(torch.ones(2, 2).npu(), [1, 1, 1, 1])
"""


def said(code: str) -> str:
    """What a process of its own prints: a stopped queue stays stopped."""
    done = subprocess.run(
        [sys.executable, "-c", _START + code], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_nothing_is_computed_after_the_queue_has_stopped() -> None:
    """torch_npu drops later operators without a word; the simulator refuses them, and says which one failed first."""
    text = said("""
print(outcome(unmodelled))
for call in (lambda: torch.ones(3).npu().cpu(), lambda: torch.ones(3, device="npu") + 1, torch.npu.synchronize):
    print("after:", outcome(call))
""")
    first, *later = text.split("after:")
    assert "GE operator Pad" in first
    assert len(later) == 3
    assert all("failed in torch_npu's task queue" in line or "507899" in line for line in later), text


def test_a_kernel_that_stops_the_device_ends_the_proof() -> None:
    """No quarantine after which everything would be garbage: an error that says how to start again."""
    text = said("""
from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, find_op
import dataclasses

op = find_op("rms_norm")

def broken(x, weight=None, eps=1e-6):
    unmodelled()
    return x

x = torch.randn(2, 8, device="npu")
try:
    prove(op, Kernel("rms_norm", "broken", broken, "a test", has_backward=False), op.bind(x=x))
except KernelError as error:
    print(error)
""")
    assert "npu:0 does not compute any more" in text
    assert "LLM_ADAPT_OPS=rms_norm=reference" in text


def test_the_report_counts_what_hardware_would_make_slow_or_large() -> None:
    """Operators that the NPU leaves to the CPU, with their calls, and the buffers of each communicator."""
    text = said("""
import torch.distributed as dist
dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
x = torch.eye(3, device="cuda")
dist.all_reduce(x)
torch.linalg.inv(x)
print(llm_adapt.report().to_text())
dist.destroy_process_group()
""")
    assert "simulator: aten::linalg_inv_ex: computed by the CPU - " in text
    assert "400 MB of device memory" in text


def test_no_event_is_waited_for_after_the_queue_has_stopped() -> None:
    """torch_npu would never record it, and wait for that for ever: an error instead, and the process ends."""
    text = said("""
before = torch.npu.Event()
before.record()
torch.npu.synchronize()
print(outcome(unmodelled))

def record_and_wait():
    event = torch.npu.Event()
    event.record()
    event.synchronize()

for call in (record_and_wait, before.synchronize, lambda: torch.ones(3).pin_memory().npu(non_blocking=True)):
    print("after:", outcome(call))
""")
    first, *later = text.split("after:")
    assert "GE operator Pad" in first
    assert len(later) == 3
    assert all("failed in torch_npu's task queue" in line for line in later), text


def test_every_command_says_that_it_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """ops, explain and bench on a simulator name it in their first lines and in their JSON."""
    monkeypatch.setenv("LLM_ADAPT_SIMULATE", "npu")
    for arguments in (
        ["ops"],
        ["explain", "rms_norm"],
        ["explain", "rms_norm", "--json"],
        ["bench", "--quick", "--only", "softmax_partials"],
    ):
        command = [sys.executable, "-m", "llm_adapt.cli", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=200)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "Ascend910B3" in done.stdout, (arguments, done.stdout[:500])
        assert "simulated" in done.stdout.lower(), arguments
