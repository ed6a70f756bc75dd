"""torch.cuda.cudart() and check_error without a CUDA runtime: the few calls that training scripts make."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llm_adapt.report import Report

__all__ = ["functions"]

_WHY = "there is no NVIDIA profiler here; torch.profiler works everywhere"


class _Cudart:
    """Stand-in for the module of runtime bindings; a name it lacks raises NotImplementedError."""

    def __init__(self, report: Report, mem_get_info: Callable[..., tuple[int, int]]) -> None:
        self._report, self._mem_get_info = report, mem_get_info

    def cudaProfilerStart(self) -> int:
        """No profiler to start."""
        self._report.once("torch.cuda.profiler", "no effect", _WHY)
        return 0

    def cudaProfilerStop(self) -> int:
        """No profiler to stop."""
        return 0

    def cudaMemGetInfo(self, device: int = 0) -> tuple[int, int]:
        """Free and total bytes, as torch.cuda.mem_get_info."""
        return self._mem_get_info(device)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked by copy, pickle and inspect, not by the script
            raise AttributeError(name)
        raise NotImplementedError(f"torch.cuda.cudart().{name} was asked; there is no CUDA runtime. Guard the call.")


def functions(report: Report, mem_get_info: Callable[..., tuple[int, int]]) -> dict[str, Any]:
    """Name -> what `torch.cuda.<name>` is where there is no CUDA runtime."""
    runtime = _Cudart(report, mem_get_info)

    def cudart() -> _Cudart:
        """Stand-in for the CUDA runtime."""
        return runtime

    def check_error(res: int) -> None:
        """Raise RuntimeError unless the code is 0."""
        if int(res) != 0:
            raise RuntimeError(f"CUDA error code {int(res)} was handed to torch.cuda.check_error.")

    return {"cudart": cudart, "check_error": check_error}
