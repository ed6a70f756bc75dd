"""The simulated machine: which chip, how many of them, how much memory, which packages are installed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_adapt.simulators.base import SimulatorError
from llm_adapt.simulators.dcu.chips import CHIPS, Chip

__all__ = ["DEVICES", "MASKS", "MEMORY", "PACKAGES", "PACKAGE_NAMES", "Machine", "read_machine"]

DEVICES = "DCU_SIM_DEVICES"
MEMORY = "DCU_SIM_MEMORY_GB"
PACKAGES = "DCU_SIM_PACKAGES"
PACKAGE_NAMES = ("flash_attn", "lightop", "apex")
MASKS = ("HIP_VISIBLE_DEVICES", "HCU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")


@dataclass(frozen=True)
class Machine:
    """What the process sees.

    Attributes:
        folder: where the built libraries are.
        chip: every device is one of these.
        num_devices: visible ones.
        memory_bytes: of each device; a limit of the simulator, not the size of a card.
        packages: which of the DAS packages are installed.
    """

    folder: Path
    chip: Chip
    num_devices: int
    memory_bytes: int
    packages: tuple[str, ...]


def read_machine(folder: Path, model: str, environ: Mapping[str, str] = os.environ) -> Machine:
    """Read DCU_SIM_DEVICES (8), DCU_SIM_MEMORY_GB (16), DCU_SIM_PACKAGES (all) and the masks.

    Raises:
        SimulatorError: a value has no meaning, or the masks differ from each other.
    """
    devices = _number(environ, DEVICES, "8", int)
    memory = _number(environ, MEMORY, "16", float)
    asked = [name.strip() for name in environ.get(PACKAGES, ",".join(PACKAGE_NAMES)).split(",") if name.strip()]
    unknown = [name for name in asked if name not in PACKAGE_NAMES]
    if unknown:
        raise SimulatorError(f"{PACKAGES} names {', '.join(unknown)}; the simulator has {', '.join(PACKAGE_NAMES)}.")
    visible = _visible(environ, int(devices))
    return Machine(folder, CHIPS[model], visible, int(memory * 2**30), tuple(asked))


def _number(environ: Mapping[str, str], name: str, default: str, kind: type[int] | type[float]) -> float:
    text = environ.get(name, default)
    try:
        value = kind(text)
    except ValueError:
        value = kind(0)
    if value <= 0:
        raise SimulatorError(f"{name}={text!r} was asked; it takes a number above 0.")
    return value


def _visible(environ: Mapping[str, str], devices: int) -> int:
    """How many devices the masks leave. DTK's torch consults all three; what it does when they differ is not public."""
    given = {name: environ[name] for name in MASKS if name in environ}
    if not given:
        return devices
    if len(set(given.values())) > 1:
        found = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise SimulatorError(f"{found}: what DTK makes of masks that differ is not public. Set all to the same value.")
    text = next(iter(given.values()))
    ordinals = [part.strip() for part in text.split(",") if part.strip()]
    wrong = [part for part in ordinals if not part.isdigit() or int(part) >= devices]
    if wrong or len(set(ordinals)) != len(ordinals):
        raise SimulatorError(
            f"{next(iter(given))}={text!r} was set; the simulated machine takes different ordinals below {devices} "
            f"({DEVICES}), separated by commas."
        )
    return len(ordinals)
