"""nvtx, cudart, the CUDA profiler and torch.profiler on the CPU; and the switches of torch.backends."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

pytestmark = pytest.mark.usefixtures("facade")


def test_nvtx(noted: Callable[[], list[str]]) -> None:
    """Ranges and marks are accepted in every form, count their depth, and are noted once."""
    nvtx = torch.cuda.nvtx
    assert [nvtx.range_push("a"), nvtx.range_push("b"), nvtx.range_pop(), nvtx.range_pop()] == [0, 1, 1, 0]
    assert nvtx.range_pop() == 0
    nvtx.range_end(nvtx.range_start("c"))
    nvtx.mark("d")
    with nvtx.range("step {}", 3):
        pass
    assert nvtx.range("f")(lambda: 5)() == 5
    assert noted() == ["torch.cuda.nvtx"]


def test_emit_nvtx(noted: Callable[[], list[str]]) -> None:
    """torch.autograd.profiler.emit_nvtx runs its block, and is noted once."""
    with torch.autograd.profiler.emit_nvtx():
        assert (torch.ones(2) + 1).tolist() == [2.0, 2.0]
    assert noted() == ["torch.autograd.profiler.emit_nvtx"]


def test_the_cuda_profiler(noted: Callable[[], list[str]]) -> None:
    """torch.cuda.profiler and cudart()'s start and stop are accepted, and noted once."""
    torch.cuda.profiler.start()
    torch.cuda.profiler.stop()
    with torch.cuda.profiler.profile():
        pass
    torch.cuda.check_error(torch.cuda.cudart().cudaProfilerStart())
    assert torch.cuda.cudart().cudaProfilerStop() == 0
    assert noted() == ["torch.cuda.profiler"]


def test_the_runtime() -> None:
    """cudart() answers for memory, refuses what it has not by name, and check_error raises for an error."""
    assert torch.cuda.cudart().cudaMemGetInfo(0)[1] == torch.cuda.mem_get_info()[1]
    with pytest.raises(NotImplementedError, match=r"cudart\(\)\.cudaHostRegister was asked"):
        torch.cuda.cudart().cudaHostRegister(0, 0, 0)
    with pytest.raises(RuntimeError, match="code 2"):
        torch.cuda.check_error(2)


def test_profiler_activities(noted: Callable[[], list[str]]) -> None:
    """ProfilerActivity.CUDA is left out, noted once, and the CPU's activity is recorded."""
    for activities in ([ProfilerActivity.CPU, ProfilerActivity.CUDA], {ProfilerActivity.CUDA}):
        with profile(activities=activities, record_shapes=True) as found, record_function("our block"):
            torch.ones(4) @ torch.ones(4)
        table = found.key_averages().table(sort_by="cuda_time_total", row_limit=20)
        assert "our block" in table
    assert isinstance(found, profile)
    assert noted() == ["ProfilerActivity.CUDA"]


def test_a_profiler_with_a_schedule() -> None:
    """The profiler tutorial's schedule and trace handler work, and so does the profiler without activities."""
    traces: list[int] = []
    schedule = torch.profiler.schedule(wait=1, warmup=1, active=1, repeat=1)
    with profile(
        activities=[ProfilerActivity.CUDA],
        schedule=schedule,
        on_trace_ready=lambda found: traces.append(found.step_num),
    ) as found:
        for _ in range(4):
            torch.ones(2).sum()
            found.step()
    assert traces == [3]
    with profile() as found:
        torch.ones(2).sum()
    assert found.key_averages()


SWITCHES = """
cudnn.benchmark = True
cudnn.benchmark_limit = 3
cudnn.deterministic = True
cudnn.enabled = False
cudnn.allow_tf32 = False
cudnn.conv.fp32_precision = "tf32"
cudnn.rnn.fp32_precision = "tf32"
cuda.matmul.allow_tf32 = True
cuda.matmul.fp32_precision = "tf32"
cuda.matmul.allow_fp16_reduced_precision_reduction = False
cuda.matmul.allow_bf16_reduced_precision_reduction = False
cuda.matmul.allow_fp16_accumulation = True
cuda.enable_flash_sdp(False)
cuda.enable_mem_efficient_sdp(False)
cuda.enable_math_sdp(True)
cuda.enable_cudnn_sdp(False)
cuda.allow_fp16_bf16_reduction_math_sdp(True)
cuda.preferred_linalg_library("cusolver")
cuda.preferred_linalg_library("magma")
cuda.preferred_blas_library("cublaslt")
cuda.cufft_plan_cache.max_size = 4
cuda.cufft_plan_cache[0].max_size = 4
cuda.cufft_plan_cache.clear()
"""


def test_switches() -> None:
    """Every switch of torch.backends.cuda and cudnn can be thrown; those that torch itself refuses are noted once."""
    lines = [f"torch.backends.{line}" for line in SWITCHES.strip().splitlines()]
    script = [
        "import torch, llm_adapt",
        "report = llm_adapt.patch(device='cpu')",
        *lines,
        "assert torch.backends.cuda.cufft_plan_cache.max_size == 4",
        "assert torch.backends.cuda.cufft_plan_cache.size == 0",
        "assert torch.backends.cuda.preferred_blas_library() is not None",
        "print([line.subject.rpartition('.')[2] for line in report.lines if line.section == 'effect'])",
    ]
    # In a process of its own: torch keeps some of these switches for good.
    done = subprocess.run([sys.executable, "-c", "\n".join(script)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "['preferred_linalg_library', 'preferred_blas_library', 'cufft_plan_cache']"


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_attention_switches() -> None:
    """The contexts that choose an attention kernel by CUDA's names work."""
    q = torch.ones(1, 1, 4, 8, device="cuda")
    with torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False):
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert torch.nn.functional.scaled_dot_product_attention(q, q, q).shape == q.shape
    with torch.backends.cudnn.flags(enabled=False, deterministic=True):
        assert torch.backends.cudnn.deterministic


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    "choose",
    [
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.EFFICIENT_ATTENTION),
        lambda: torch.nn.attention.sdpa_kernel([torch.nn.attention.SDPBackend.CUDNN_ATTENTION], set_priority=True),
        lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION),
        lambda: torch.backends.cuda.sdp_kernel(enable_flash=True, enable_math=False, enable_mem_efficient=False),
        lambda: torch.backends.cuda.enable_math_sdp(False),
    ],
)
def test_attention_is_computed_where_cuda_s_kernel_is_not(
    choose: Callable[[], Any], noted: Callable[[], list[str]]
) -> None:
    """A choice of CUDA's kernels without the math kernel computes with what the CPU has, and is noted once."""
    attend = torch.nn.functional.scaled_dot_product_attention
    q, mask = torch.randn(1, 2, 4, 8, device="cuda"), torch.randn(4, 4, device="cuda", requires_grad=True)
    expected = torch.softmax(q @ q.transpose(-1, -2) / 8**0.5 + mask, -1) @ q
    with choose() or contextlib.nullcontext():
        found = attend(q, q, q, attn_mask=mask)
        assert attend(q, q, q, dropout_p=0.5, is_causal=True).shape == q.shape
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert noted() == ["attention without the math kernel"]
    assert torch.backends.cuda.math_sdp_enabled()
