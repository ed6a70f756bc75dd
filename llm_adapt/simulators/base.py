"""Simulator: one frozen dataclass per device that can run on host memory, and the libraries it is built of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from llm_adapt.errors import LlmAdaptError

__all__ = ["Library", "Simulator", "SimulatorError", "Toolchain"]


class SimulatorError(LlmAdaptError, RuntimeError):
    """A simulator cannot be built or started."""


@dataclass(frozen=True)
class Toolchain:
    """What a simulator is built with.

    Attributes:
        compiler: path of g++.
        compiler_version: its first line of `--version`.
        torch: folder of the torch package.
        torch_version: e.g. "2.13.0+cpu".
        plugin: folder of the vendor's package, None where the simulator needs none.
        plugin_version: its version, "" without one.
    """

    compiler: str
    compiler_version: str
    torch: Path
    torch_version: str
    plugin: Path | None = None
    plugin_version: str = ""


@dataclass(frozen=True)
class Library:
    """One shared library of a simulator.

    Attributes:
        name: its file name and soname, e.g. "libascendcl.so".
        sources: C++ files; none makes an empty library, for a name that must merely be there.
        includes: folders for #include, besides torch's own where uses_torch.
        links: further arguments of the link command.
        uses_torch: compiled against torch's C++ headers, with the shared precompiled header.
        module: name of the Python extension module it is, "" for a plain library.
        stubs_for: binaries whose undefined symbols matching stubs_pattern get a function here that raises,
            unless the sources define it.
        stubs_pattern: regular expression over symbol names.
    """

    name: str
    sources: tuple[Path, ...] = ()
    includes: tuple[Path, ...] = ()
    links: tuple[str, ...] = ()
    uses_torch: bool = False
    module: str = ""
    stubs_for: tuple[Path, ...] = ()
    stubs_pattern: str = ""


@dataclass(frozen=True)
class Simulator:
    """A device that can be had without its hardware.

    Attributes:
        name: name of the device's adapter.
        title: one line for people, e.g. "Ascend NPU: the real torch_npu over an emulated CANN".
        models: chips that can be simulated, in the vendor's spelling, and what each is.
        default_model: the one of them that is taken without a word.
        libraries: what is to be built with a toolchain.
        enter: called before torch is imported with the folder of the built libraries and the model; returns the
            variables it wants set.
        install: called once torch and the plug-in are imported, with the folder.
        plugin: the vendor's package that it runs, "" when it brings its own.
        plugin_requirement: that package with its version, as pip takes it.
        unknown: what public sources do not tell of the device.
        observed: asked for the report: (subject, choice, reason) of what would be worth knowing on hardware.
    """

    name: str
    title: str
    models: Mapping[str, str]
    default_model: str
    libraries: Callable[[Toolchain], tuple[Library, ...]]
    enter: Callable[[Path, str], Mapping[str, str]]
    install: Callable[[Path], None]
    plugin: str = ""
    plugin_requirement: str = ""
    unknown: tuple[str, ...] = ()
    observed: Callable[[], Iterable[tuple[str, str, str]]] = tuple
