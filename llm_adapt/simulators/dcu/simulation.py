"""Enter and install: make `import torch` in this process give the torch of a DCU."""

from __future__ import annotations

import ctypes
import importlib.util
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from llm_adapt.simulators.base import Library, SimulatorError, Toolchain
from llm_adapt.simulators.dcu.compiler import take_over_device_graphs
from llm_adapt.simulators.dcu.first_import import Acts, on_first_import
from llm_adapt.simulators.dcu.identity import present
from llm_adapt.simulators.dcu.machine import Machine, read_machine
from llm_adapt.simulators.dcu.packages import serve

__all__ = ["EXTENSION", "SIMULATED", "enter", "install", "libraries"]

EXTENSION = "_llm_adapt_dcu"
SIMULATED = "DCU_SIM_MODEL"  # set in a process that was entered; adapters/dcu.py looks for it
_SOURCES = Path(__file__).parent / "cuda"
_SHARED = Path(__file__).parents[1] / "host"


def libraries(toolchain: Toolchain) -> tuple[Library, ...]:
    """The one library of the simulator: devices, memory, random numbers, operators and their Python names."""
    sources = (*sorted(_SOURCES.glob("*.cpp")), _SHARED / "process_group.cpp")
    return (Library(f"{EXTENSION}.so", sources, uses_torch=True, module=EXTENSION),)


def enter(folder: Path, model: str) -> Mapping[str, str]:
    """Register what is to happen when torch is imported.

    Raises:
        SimulatorError: torch is imported already; the machine's variables have no meaning.
    """
    if "torch" in sys.modules:
        raise SimulatorError(
            "The DCU simulator was asked after torch was imported: torch.cuda's classes are made of the device's at "
            "its import. Ask before the first import of torch."
        )
    machine = read_machine(folder, model)
    on_first_import(
        {
            "torch.version": Acts(after=present),
            "torch._C": Acts(before=lambda: _register(machine), after=lambda c: _add_names(c, machine)),
            "torch._inductor.compile_fx": Acts(after=take_over_device_graphs),
        }
    )
    serve(machine.packages)
    return {SIMULATED: model}


def install(folder: Path) -> None:
    """What can only be done once torch is whole."""
    from llm_adapt.simulators.dcu.storages import teach_storages
    from llm_adapt.simulators.dcu.tensor_types import make_constructible

    teach_storages(sys.modules[EXTENSION])
    make_constructible(sys.modules["torch.cuda"])


def _library_path(machine: Machine) -> Path:
    path = machine.folder / f"{EXTENSION}.so"
    if not path.is_file():
        raise SimulatorError(f"{path} is not there. Run: llm-adapt simulate build dcu")
    return path


def _register(machine: Machine) -> None:
    """Load the library, which brings libtorch_cpu along, and register the device with it."""
    library = ctypes.CDLL(str(_library_path(machine)))
    library.llm_adapt_dcu_register(machine.num_devices, ctypes.c_double(machine.memory_bytes))


def _add_names(c: ModuleType, machine: Machine) -> None:
    """Once torch._C is there: the library as a Python module, and what a CUDA build has more than a CPU build."""
    from llm_adapt.simulators.dcu.runtime import add_names

    spec = importlib.util.spec_from_file_location(EXTENSION, _library_path(machine))
    assert spec is not None
    assert spec.loader is not None
    library = importlib.util.module_from_spec(spec)
    sys.modules[EXTENSION] = library
    spec.loader.exec_module(library)
    library.set_limits(machine.chip.has_fp8_matmul, machine.chip.has_bfloat16, "flash_attn" in machine.packages)
    library.register_kernels()
    add_names(c, library, machine)
