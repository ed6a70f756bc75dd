"""From "npu:Ascend910_9391" to a process whose torch has that device."""

from __future__ import annotations

import atexit
import difflib
import importlib
import os
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from llm_adapt.simulators.base import Simulator, SimulatorError
from llm_adapt.simulators.build import build
from llm_adapt.simulators.toolchain import find_toolchain, plugin_folder

__all__ = ["SIMULATORS", "Simulation", "enter", "install", "observed", "parse", "prepare"]

SIMULATORS = ("npu", "mlu", "dcu")


@dataclass(frozen=True)
class Simulation:
    """One simulated device: whose, and which chip."""

    simulator: Simulator
    model: str

    @property
    def text(self) -> str:
        """As --simulate takes it."""
        return f"{self.simulator.name}:{self.model}"


_entered: tuple[Simulation, Path] | None = None
_installed = False


def parse(text: str) -> Simulation:
    """Read "npu" or "npu:MODEL".

    Raises:
        SimulatorError: there is no such simulator or model; with those there are.
    """
    name, _, model = text.partition(":")
    if name not in SIMULATORS:
        known = ", ".join(SIMULATORS)
        raise SimulatorError(f"Simulator {name!r} was asked; there are {known}.{_near(name, SIMULATORS)}")
    simulator: Simulator = importlib.import_module(f"llm_adapt.simulators.{name}").SIMULATOR
    model = model or simulator.default_model
    by_short_name = {known.removeprefix("Ascend"): known for known in simulator.models}
    if model not in simulator.models and model not in by_short_name:
        known = ", ".join(simulator.models)
        raise SimulatorError(
            f"Model {model!r} of the {name} simulator was asked; it has {known}.{_near(model, simulator.models)}"
        )
    return Simulation(simulator, by_short_name.get(model, model))


def _near(asked: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(asked, list(known), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def _say(line: str) -> None:
    print(f"llm-adapt: {line}", file=sys.stderr, flush=True)


def prepare(text: str) -> Path:
    """Build the simulator if that has not been done, with progress on stderr; the folder of its libraries.

    Raises:
        SimulatorError: it cannot be built; with what is missing.
    """
    simulator = parse(text).simulator
    return build(simulator, find_toolchain(simulator, _say), _say)


def enter(text: str) -> Simulation:
    """Make this process ready: to be called before torch is imported, once.

    Raises:
        SimulatorError: torch is imported already, another simulator was entered, or it cannot be built.
    """
    global _entered
    simulation = parse(text)
    if _entered is not None:
        if _entered[0] == simulation:
            return simulation
        raise SimulatorError(
            f"Simulator {simulation.text} was asked; this process simulates {_entered[0].text}. One process has one."
        )
    if "torch" in sys.modules:
        raise SimulatorError(
            f"Simulator {simulation.text} was asked after torch was imported. Use `llm-adapt run --simulate "
            f"{text} script.py`, or call llm_adapt.patch(simulate={text!r}) before the first import of torch."
        )
    folder = prepare(text)
    if simulation.simulator.plugin and importlib.util.find_spec(simulation.simulator.plugin) is None:
        sys.path.append(str(plugin_folder(simulation.simulator)))
        importlib.invalidate_caches()
    os.environ.update(simulation.simulator.enter(folder, simulation.model))
    _entered = (simulation, folder)
    return simulation


def observed() -> Iterable[tuple[str, str, str]]:
    """What the simulator saw that would be worth knowing on hardware: (subject, choice, reason)."""
    return () if _entered is None else _entered[0].simulator.observed()


def install() -> None:
    """Finish what `enter` began, once torch and the plug-in are imported; a second call does nothing."""
    global _installed
    if _entered is not None and not _installed:
        _installed = True
        simulation, folder = _entered
        simulation.simulator.install(folder)
        # torch's threads for backward may still let go of a graph when the script has ended. One that wants the
        # interpreter's lock after Python has begun to end aborts the process; this lets them come first.
        atexit.register(time.sleep, 0.05)
