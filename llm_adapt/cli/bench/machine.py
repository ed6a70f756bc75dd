"""Machine: the device, the rates that it reaches here and now, its versions, and the peak memory of a call."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

import llm_adapt
from llm_adapt.cli.bench.timing import Clock, DeviceClock, HostClock, interval

__all__ = ["MEMORY_WORDS", "Machine"]

_PACKAGES = ("transformers", "megatron-core", "liger-kernel", "flag_gems", "apex", "transformer_engine", "flash-attn",
             "triton", "numpy")  # fmt: skip
MEMORY_WORDS = {
    "cpu": "sum of torch's allocations less its releases during one call, as torch.profiler records them; buffers that "
    "a kernel takes past torch's allocator are not seen",
    "device": "max_memory_allocated of the device during one call, less what was allocated before",
    "": "not measured: the simulator has no allocator of its own",
}


class Machine:
    """A device and what was measured of it in this process.

    Attributes:
        load: of the machine in the minute before.
        bandwidth: bytes/s that a copy of a large tensor reads and writes.
    """

    def __init__(self, device: str, title: str, simulated: str = "") -> None:
        self.device, self.title, self.simulated = torch.device(device), title, simulated
        self.is_host = device == "cpu" or bool(simulated)
        wait = getattr(torch, device).synchronize if simulated else None
        self.clock: Clock = HostClock(wait) if self.is_host else DeviceClock(self.device)
        self.started = time.strftime("%Y-%m-%dT%H:%M:%S+00:00", time.gmtime())
        self.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
        self.bandwidth = self._bandwidth()

    def _bandwidth(self) -> float:
        elements = 2**24 if self.is_host else 2**28  # 64 MB and 1 GB, each read and written
        source = torch.ones(elements, device=self.device)
        target = torch.empty_like(source)
        return 8 * elements / self._seconds(lambda: target.copy_(source))

    def _seconds(self, act: Callable[[], Any]) -> float:
        act()
        return interval([self.clock.sample(act, 1) for _ in range(9)]).median

    @functools.cache  # noqa: B019 - a machine lives as long as the process
    def copy_seconds(self, moved: int) -> float:
        """Time of a copy that reads and writes so many bytes together: a small one does not reach the bandwidth."""
        source = torch.ones(max(moved // 2, 1), dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return self._seconds(lambda: target.copy_(source))

    @functools.cache  # noqa: B019 - a machine lives as long as the process
    def matmul_rate(self, dtype: torch.dtype) -> float:
        """Operations/s of a square product in this dtype; of 1024 on a host, of 8192 on an accelerator."""
        size = 1024 if self.is_host else 8192
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self._seconds(lambda: torch.matmul(a, b))

    @property
    def memory_words(self) -> str:
        """How peak memory is measured here."""
        return MEMORY_WORDS["" if self.simulated else "cpu" if self.is_host else "device"]

    def peak_bytes(self, act: Callable[[], Any]) -> float | None:
        """Memory that a call takes at its peak, results included; None where it cannot be measured."""
        if self.simulated:
            return None
        if self.is_host:
            return _peak_by_profiler(act)
        module: Any = getattr(torch, self.device.type)
        module.synchronize()
        before = module.memory_allocated()
        module.reset_peak_memory_stats()
        kept = act()
        module.synchronize()
        peak = float(module.max_memory_allocated() - before)
        del kept
        return peak

    def facts(self) -> dict[str, Any]:
        """What is needed to compare these results with others."""
        versions = {"llm_adapt": llm_adapt.__version__, "torch": torch.__version__, "python": platform.python_version()}
        for name in _PACKAGES:
            try:
                versions[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return {
            "device": self.title,
            "simulated": self.simulated,
            "machine": _processor(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "load_before": round(self.load, 2),
            "versions": versions,
            "copy_bandwidth_gb_s": round(self.bandwidth / 1e9, 2),
            "memory": self.memory_words,
            "started": self.started,
        }


def _processor() -> str:
    """The name of the processor, as Linux has it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def _peak_by_profiler(act: Callable[[], Any]) -> float:
    """The largest sum of the allocator's events during one call."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = act()
    results = profile.profiler.kineto_results  # type: ignore[union-attr]
    events = [(event.start_ns(), event.nbytes()) for event in results.events() if event.name() == "[memory]"]
    del kept
    level = peak = 0
    for _, change in sorted(events, key=lambda pair: pair[0]):
        level += change
        peak = max(peak, level)
    return float(peak)
