"""What a simulator is built with: the compiler, torch, and the vendor's package, found or fetched."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from llm_adapt.simulators.base import Simulator, SimulatorError, Toolchain
from llm_adapt.simulators.build import cache_folder

__all__ = ["find_toolchain", "plugin_folder"]

Say = Callable[[str], None]


def find_toolchain(simulator: Simulator, say: Say, fetch: bool = True) -> Toolchain:
    """Find everything, or say what is missing.

    Args:
        simulator: whose toolchain.
        say: receives a line when something takes long.
        fetch: install the vendor's package into the cache when it is nowhere (never into this environment: without
            its driver it would make `import torch` fail).

    Raises:
        SimulatorError: no g++, no torch, no vendor package, or one for another torch; with what to do.
    """
    torch, torch_version = _package("torch", "torch")
    if torch is None:
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; torch is not installed. "
            f"Run: pip install torch=={_torch_of(simulator)}"
        )
    compiler = shutil.which("g++")
    if compiler is None:
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; it is compiled on first use and there is no g++ on PATH. "
            "Install one: apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, openEuler)."
        )
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    plugin, version = (None, "")
    if simulator.plugin:
        _check_pair(simulator, torch_version)
        plugin, version = _plugin(simulator, torch_version, say, fetch)
    return Toolchain(compiler, said, torch, torch_version, plugin, version)


def plugin_folder(simulator: Simulator) -> Path:
    """Folder for sys.path in which the vendor's package lies when the cache has it."""
    return cache_folder() / simulator.plugin_requirement.replace("==", "-")


def _package(name: str, distribution: str) -> tuple[Path | None, str]:
    """Folder and version of an installed package, without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        return None, ""
    return Path(spec.origin).parent, importlib.metadata.version(distribution)


def _torch_of(simulator: Simulator) -> str:
    return simulator.plugin_requirement.partition("==")[2] or "2.13.0"


def _check_pair(simulator: Simulator, torch_version: str) -> None:
    wanted = _torch_of(simulator)
    if torch_version.partition("+")[0] != wanted:
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; torch {torch_version} is installed, and it runs "
            f"{simulator.plugin_requirement}, which needs torch {wanted}. "
            f"Make an environment with it: pip install torch=={wanted} --index-url https://download.pytorch.org/whl/cpu"
        )


def _plugin(simulator: Simulator, torch_version: str, say: Say, fetch: bool) -> tuple[Path, str]:
    """The vendor's package: installed here, in the cache, or fetched into it."""
    found, version = _package(simulator.plugin, simulator.plugin)
    wanted = simulator.plugin_requirement.partition("==")[2]
    if found is not None:
        if version != wanted:
            raise SimulatorError(
                f"The {simulator.name} simulator was asked; {simulator.plugin} {version} is installed and it was made "
                f"for {wanted}. Uninstall it; the simulator fetches its own."
            )
        return found, version
    folder = plugin_folder(simulator)
    package = folder / simulator.plugin
    if not package.is_dir():
        if not fetch:
            raise SimulatorError(
                f"The {simulator.name} simulator was asked; {simulator.plugin_requirement} is neither installed nor in "
                f"{folder}. Run: llm-adapt simulate build {simulator.name}"
            )
        _fetch(simulator, folder, say)
    return package, wanted


def _fetch(simulator: Simulator, folder: Path, say: Say) -> None:
    """pip installs into a folder of its own, without dependencies: torch stays as it is."""
    say(f"fetching {simulator.plugin_requirement} into {folder}")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--target", str(unfinished), simulator.plugin_requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; it runs the vendor's own {simulator.plugin_requirement}, which "
            f"pip could not fetch:\n{done.stderr.strip()[-800:]}\nWhere there is no network, copy the wheel here and "
            f"run: pip install --no-deps --target {folder} WHEEL"
        )
    unfinished.replace(folder)
