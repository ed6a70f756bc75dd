"""Memory figures: resident bytes of this process, and of the host (Linux and macOS)."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llm_adapt.report import Report

__all__ = ["functions", "host_memory"]

_STATUS, _CLEAR_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# What CUDA's allocator counts, as torch.cuda.memory_stats documents it.
_KINDS = "allocation|segment|active|inactive_split|(?:allocated|reserved|active|inactive_split|requested)_bytes"
_COUNTERS = re.compile(
    rf"(?:{_KINDS})\.(?:all|large_pool|small_pool)\.(?:current|peak|allocated|freed)\Z"
    r"|oversize_(?:allocations|segments)\.(?:current|peak|allocated|freed)\Z"
    r"|num_(?:sync_all_streams|device_alloc|device_free)\Z|max_split_size\Z"
)


class MemoryStats(dict[str, int]):
    """The figures that there are. A figure that only CUDA's allocator has reads 0, which is noted once.

    torch.cuda.memory_stats does the same for an allocator that keeps no such count (cudaMallocAsync).
    """

    def __init__(self, figures: dict[str, int], report: Report) -> None:
        super().__init__(figures)
        self._report = report

    def __missing__(self, name: str) -> int:
        if _COUNTERS.match(str(name)) is None:
            raise KeyError(name)
        self._report.once(f"torch.cuda.memory_stats()[{name!r}]", "0", "the CPU's allocator keeps no such count")
        return 0

    def __reduce__(self) -> tuple[type, tuple[dict[str, int]]]:
        return dict, (dict(self),)  # another process has no report to note in


def host_memory() -> tuple[int, int]:
    """Available and total bytes of host memory; what is available is unknown on macOS, where total stands for it."""
    available = "SC_AVPHYS_PAGES" if "SC_AVPHYS_PAGES" in os.sysconf_names else "SC_PHYS_PAGES"
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf(available) * page, os.sysconf("SC_PHYS_PAGES") * page


def _process_bytes(field: str) -> int:
    """A memory field of /proc/self/status in bytes; without that file the peak, the one figure there is."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def functions(ordinal: Callable[[Any], int], report: Report) -> dict[str, Any]:
    """Current and peak figures under the names of CUDA's allocator."""

    def resident(device: Any = None) -> int:
        """Bytes of host memory that this process occupies."""
        ordinal(device)
        return _process_bytes("VmRSS")

    def peak(device: Any = None) -> int:
        """Largest number of bytes that this process occupied since the last reset."""
        ordinal(device)
        return _process_bytes("VmHWM")

    def reset_peak(device: Any = None) -> None:
        """Start a new peak, where the system allows it (Linux)."""
        ordinal(device)
        if os.access(_CLEAR_PEAK, os.W_OK):
            _CLEAR_PEAK.write_text("5")
        else:
            report.once("torch.cuda.reset_peak_memory_stats", "no effect", f"{_CLEAR_PEAK} cannot be written")

    def memory_stats(device: Any = None) -> dict[str, int]:
        """Process figures under the allocator's names; see MemoryStats for those the CPU has no figure for."""
        now, high = resident(device), peak(device)
        kinds = ("allocated_bytes", "reserved_bytes", "active_bytes")
        stats = {f"{kind}.all.{when}": value for kind in kinds for when, value in (("current", now), ("peak", high))}
        return MemoryStats({**stats, "num_ooms": 0, "num_alloc_retries": 0}, report)

    def memory_summary(device: Any = None, abbreviated: bool = False) -> str:
        """The figures of memory_stats as text."""
        return "\n".join(f"{name:32s} {value:>16,d}" for name, value in memory_stats(device).items())

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        """Free and total bytes of host memory."""
        ordinal(device)
        return host_memory()

    def empty_cache() -> None:
        """Nothing to empty: the CPU's allocator keeps no cache of its own."""

    names = {name: resident for name in ("memory_allocated", "memory_reserved", "memory_cached", "device_memory_used")}
    names |= {name: peak for name in ("max_memory_allocated", "max_memory_reserved", "max_memory_cached")}
    resets = ("reset_peak_memory_stats", "reset_max_memory_allocated", "reset_max_memory_cached")
    return {
        **names,
        **dict.fromkeys(resets, reset_peak),
        "reset_accumulated_memory_stats": lambda device=None: None,
        "memory_stats": memory_stats,
        "memory_summary": memory_summary,
        "mem_get_info": mem_get_info,
        "empty_cache": empty_cache,
    }
