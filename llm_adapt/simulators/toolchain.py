"""What a simulator is built with: the compiler, torch, and the vendor's package, found or fetched."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

from llm_adapt.simulators.base import Simulator, SimulatorError, Toolchain
from llm_adapt.simulators.build import alone, cache_folder

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
        SimulatorError: no g++, no headers of Python, no torch, no vendor package, or one for another torch; with what
            to do.
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
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    if not header.is_file():
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; it is compiled on first use and {header} is not there. Install "
            "the headers of this Python: apt install python3-dev (Debian, Ubuntu), dnf install python3-devel (Fedora, "
            "openEuler)."
        )
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout.splitlines()[0]
    plugin, version = (None, "")
    if simulator.plugin:
        _check_pair(simulator, torch_version)
        plugin, version = _plugin(simulator, torch_version, say, fetch)
    return Toolchain(compiler, said, torch, torch_version, plugin, version)


def plugin_folder(simulator: Simulator) -> Path:
    """Folder for sys.path in which the vendor's package lies when the cache has it: wheels fit one Python and CPU."""
    fits = f"{sys.implementation.cache_tag}-{platform.machine()}"
    return cache_folder() / f"{simulator.plugin_requirement.replace('==', '-')}-{fits}"


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
        _fetch_once(simulator, folder, say)
    _check_copy(simulator, folder)
    return package, wanted


def _check_copy(simulator: Simulator, folder: Path) -> None:
    """A wheel may have been put into the cache by hand."""
    wanted = simulator.plugin_requirement.partition("==")[2]
    found = {one.version for one in importlib.metadata.distributions(name=simulator.plugin, path=[str(folder)])}
    if found != {wanted}:
        raise SimulatorError(
            f"The {simulator.name} simulator was asked; it runs {simulator.plugin_requirement}, and {folder} has "
            f"{', '.join(sorted(found)) or 'a package without a version'}. Delete the folder; the simulator fetches "
            "its own."
        )


def _fetch_once(simulator: Simulator, folder: Path, say: Say) -> None:
    """The ranks of a job start together, and one of them fetches."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with alone(folder.with_name(folder.name + ".lock"), say):
            if not folder.is_dir():
                _fetch(simulator, folder, say)
    except OSError as error:
        raise SimulatorError(
            f"{simulator.plugin_requirement} was to be fetched into {folder}; {error}. "
            "Make room there, or name a folder that can be written with LLM_ADAPT_CACHE."
        ) from error


def _fetch(simulator: Simulator, folder: Path, say: Say) -> None:
    """pip installs into a folder of its own, without dependencies: torch stays as it is."""
    say(f"fetching {simulator.plugin_requirement} into {folder}")
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
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
