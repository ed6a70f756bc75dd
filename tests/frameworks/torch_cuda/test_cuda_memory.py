"""Memory figures of torch.cuda: those of the process and the host."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from llm_adapt.frameworks.torch_cuda.host import memory
from llm_adapt.report import Report

pytestmark = pytest.mark.usefixtures("facade")
MIB = 2**20


def test_allocation_shows() -> None:
    """memory_allocated and memory_reserved grow with what the process holds."""
    before = torch.cuda.memory_allocated()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert torch.cuda.memory_allocated("cuda:1") - before > 32 * MIB
    assert torch.cuda.memory_reserved() - before > 32 * MIB
    del held


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="Linux keeps the peak")
def test_the_peak_is_kept_and_reset() -> None:
    """max_memory_allocated remembers what was freed until reset_peak_memory_stats."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.max_memory_allocated()
    held = torch.ones(256 * MIB, dtype=torch.uint8)
    del held
    assert torch.cuda.max_memory_allocated() - before > 128 * MIB
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() - before < 128 * MIB


def test_a_peak_that_cannot_be_reset_is_noted(facade: Report, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system keeps the peak to itself, a reset has no effect and the report says so."""
    monkeypatch.setattr(memory, "_CLEAR_PEAK", Path("/nowhere"))
    torch.cuda.reset_peak_memory_stats()
    assert [line.reason for line in facade.lines if line.section == "effect"] == ["/nowhere cannot be written"]


def test_without_proc_the_peak_stands_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a system without /proc the one figure there is, the peak, is given."""
    monkeypatch.setattr(memory, "_STATUS", Path("/nowhere"))
    assert torch.cuda.memory_allocated() == torch.cuda.max_memory_allocated() > 0


def test_statistics() -> None:
    """memory_stats has the figures that there are under CUDA's names, and no others; the summary prints them."""
    stats = torch.cuda.memory_stats()
    assert stats["allocated_bytes.all.current"] > 0
    assert stats["reserved_bytes.all.peak"] >= stats["active_bytes.all.current"] // 2
    assert stats["num_ooms"] == stats["num_alloc_retries"] == 0
    assert "inactive_split_bytes.all.current" not in stats
    assert "allocated_bytes.all.peak" in torch.cuda.memory_summary(abbreviated=True)


def test_a_count_that_only_cuda_s_allocator_keeps(noted: Callable[[], list[str]]) -> None:
    """Megatron and others read it by name: it reads 0, which is noted once; a name CUDA has not is a KeyError."""
    stats = torch.cuda.memory_stats()
    for _ in range(2):
        assert stats["allocation.all.current"] == stats["inactive_split_bytes.large_pool.peak"] == 0
    assert stats.get("segment.all.current") is None
    assert noted() == [
        f"torch.cuda.memory_stats()[{name!r}]"
        for name in ("allocation.all.current", "inactive_split_bytes.large_pool.peak")
    ]
    for name in ("allocation.all", "allocated_bytes.all.now", "bytes", "num_oom"):
        with pytest.raises(KeyError, match=name):
            stats[name]
    assert type(pickle.loads(pickle.dumps(stats))) is dict
    assert copy.deepcopy(stats) == stats


def test_free_and_total() -> None:
    """mem_get_info is the host's available and whole memory."""
    free, total = torch.cuda.mem_get_info()
    assert 0 < free <= total
    assert torch.cuda.memory.mem_get_info("cuda:1")[1] == total


def test_what_needs_nothing() -> None:
    """Emptying a cache that is not there, and resetting statistics nobody keeps, return at once."""
    assert torch.cuda.empty_cache() is None
    assert torch.cuda.memory.empty_cache() is None
    assert torch.cuda.reset_accumulated_memory_stats() is None
