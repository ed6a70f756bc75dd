"""torch.cuda.get_device_properties of a simulated DCU: what is public of the chip; the rest raises."""

from __future__ import annotations

from typing import NoReturn

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.machine import Machine

__all__ = ["DeviceProperties"]

_WAVEFRONT = 64  # lanes of a wavefront of gfx9
_NOT_PUBLIC = (
    "multi_processor_count", "max_threads_per_multi_processor", "max_threads_per_block", "L2_cache_size", "clock_rate",
    "memory_clock_rate", "memory_bus_width", "shared_memory_per_block", "shared_memory_per_block_optin",
    "shared_memory_per_multiprocessor", "regs_per_multiprocessor", "uuid", "pci_bus_id", "pci_device_id",
    "pci_domain_id", "is_multi_gpu_board",
)  # fmt: skip


class DeviceProperties:
    """torch._C._CudaDeviceProperties.

    Raises:
        SimulatorError: a property is read that no public source gives for the chip.
    """

    is_integrated = 0
    warp_size = _WAVEFRONT

    def __init__(self, machine: Machine) -> None:
        self._chip = machine.chip
        self.major, self.minor = machine.chip.capability
        self.gcnArchName = machine.chip.gfx
        self.total_memory = machine.memory_bytes

    @property
    def name(self) -> str:
        """What torch prints for the card."""
        if not self._chip.name:
            self._refuse("name")
        return self._chip.name

    def _refuse(self, name: str) -> NoReturn:
        raise SimulatorError(
            f"get_device_properties().{name} was read; for {self._chip.gfx} it is not public, and the DCU simulator "
            "invents nothing."
        )

    def __getattr__(self, name: str) -> object:
        if name in _NOT_PUBLIC:
            self._refuse(name)
        raise AttributeError(f"_CudaDeviceProperties has no attribute {name!r}")

    def __repr__(self) -> str:
        return (
            f"_CudaDeviceProperties(name={self._chip.name!r}, major={self.major}, minor={self.minor}, "
            f"gcnArchName={self.gcnArchName!r}, total_memory={self.total_memory // 2**20}MB, simulated)"
        )
