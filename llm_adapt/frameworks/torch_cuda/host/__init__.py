"""The torch.cuda API on the CPU: what each name does where the device is host memory.

Work on the CPU is finished when a call returns, so streams and events order nothing and synchronize waits for
nothing; an event still takes the time. The random stream of the "device" is the CPU's default generator,
because that is what tensors on it draw from. Memory figures are those of the whole process and of the host.
"""

from __future__ import annotations

from typing import Any

from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.frameworks.torch_cuda.host import generators, memory, selection, streams
from llm_adapt.report import Report

__all__ = ["NO_EFFECT", "functions"]

# Accepted and reported, because a script may rely on them: name -> why there is nothing to do.
NO_EFFECT = {
    "set_per_process_memory_fraction": "the CPU's memory is not divided; use ulimit or a cgroup",
    "set_sync_debug_mode": "the CPU never waits for a device",
    "ipc_collect": "the CPU shares memory by file descriptors",
}


def functions(translate: DeviceTranslator, report: Report) -> dict[str, Any]:
    """Name -> what `torch.cuda.<name>` is on the CPU."""

    def current() -> int:
        return translate.current

    def ordinal(device: Any) -> int:
        return translate.index(device, current)

    return {
        **selection.functions(translate, ordinal),
        **streams.functions(ordinal),
        **generators.functions(translate, ordinal, report),
        **memory.functions(ordinal, report),
    }
