"""Build a simulator's shared libraries with g++, once for each torch, plug-in, compiler and state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from llm_adapt import settings
from llm_adapt.simulators.base import Library, Simulator, SimulatorError, Toolchain

__all__ = ["alone", "build", "built_folder", "cache_folder"]

_HERE = Path(__file__).parent
_FLAGS = ("-std=c++20", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-w")
_PRELUDE = _HERE / "host" / "torch_prelude.h"
Say = Callable[[str], None]


def cache_folder() -> Path:
    """Where simulators are built: the folder "simulators" of the cache."""
    return settings.cache_folder() / "simulators"


def built_folder(simulator: Simulator, toolchain: Toolchain) -> Path:
    """Folder of the libraries for this toolchain and these sources; it exists once they are built."""
    digest = hashlib.sha256()
    # The libraries hold the path of torch: they are loaded before it, and must not bring another environment's.
    for part in (*_tools(toolchain), str(toolchain.torch), toolchain.plugin_version):
        digest.update(part.encode() + b"\0")
    libraries = simulator.libraries(toolchain)
    sources = {source for library in libraries for source in library.sources}
    for path in sorted(sources | {header for source in sources for header in _included(source)}):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in libraries:
        digest.update(repr((library.name, library.links, library.stubs_pattern)).encode())
    return cache_folder() / f"{simulator.name}-{digest.hexdigest()[:16]}"


def _tools(toolchain: Toolchain) -> tuple[str, ...]:
    """What every object depends on. A cache may be shared by machines of several architectures."""
    return toolchain.torch_version, toolchain.compiler_version, sys.version, platform.machine(), *_FLAGS


def build(simulator: Simulator, toolchain: Toolchain, say: Say) -> Path:
    """Build what is not there yet and return the folder.

    Raises:
        SimulatorError: the compiler refused, with its first lines and the file that has all of them; the cache cannot
            be written.
    """
    folder = built_folder(simulator, toolchain)
    if folder.is_dir():
        return folder
    try:
        _build(folder, simulator, toolchain, say)
    except OSError as error:
        raise SimulatorError(
            f"The {simulator.name} simulator was to be built in {cache_folder()}; {error}. "
            "Make room there, or name a folder that can be written with LLM_ADAPT_CACHE."
        ) from error
    return folder


def _build(folder: Path, simulator: Simulator, toolchain: Toolchain, say: Say) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with alone(folder.with_suffix(".lock"), say):
        if folder.is_dir():
            return
        started = time.monotonic()
        for left_by_a_killed_build in folder.parent.glob(f"{folder.name}.*[0-9]"):
            shutil.rmtree(left_by_a_killed_build, ignore_errors=True)
        work = folder.with_name(folder.name + f".{os.getpid()}")
        work.mkdir()
        try:
            _Work(toolchain, work, say).run(simulator.libraries(toolchain))
            os.replace(work, folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)
        say(f"built the {simulator.name} simulator in {time.monotonic() - started:.0f} s: {folder}")


@contextmanager
def alone(lock: Path, say: Say) -> Iterator[None]:
    """Context that one process enters at a time; the others say that they wait for it.

    Args:
        lock: file that is locked, made where it is not there.
        say: receives the line.
    """
    with open(lock, "w", encoding="ascii") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another process prepares the simulator; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


class _Work:
    """One build: precompile, compile, stub, link, with a line of progress for each act."""

    def __init__(self, toolchain: Toolchain, folder: Path, say: Say) -> None:
        self.toolchain, self.folder, self.say = toolchain, folder, say
        self.objects = cache_folder() / "objects"
        self.objects.mkdir(exist_ok=True)
        self.prelude = _PRELUDE
        self.done, self.total = 0, 0

    def run(self, libraries: tuple[Library, ...]) -> None:
        """Build every library into the folder."""
        sources = [(library, source) for library in libraries for source in library.sources]
        with_torch = any(library.uses_torch for library in libraries)
        self.total = len(sources) + len(libraries) + with_torch
        if with_torch:
            self._precompile()
        with ThreadPoolExecutor(max_workers=os.cpu_count() or 1) as pool:
            # The slow ones first, so that no core waits for one of them at the end.
            order = sorted(sources, key=lambda item: not item[0].uses_torch)
            jobs = [pool.submit(self._object, library, source) for library, source in order]
            try:
                for job in jobs:
                    job.result()
            finally:
                for job in jobs:
                    job.cancel()
        for library in libraries:
            self._link(library)
        for leftover in self.folder.glob("*-stubs.*"):
            leftover.unlink()

    def _precompile(self) -> None:
        """torch's headers, once for each torch and compiler, whichever simulator comes first."""
        self.prelude = self.objects / f"prelude-{self._digest(_PRELUDE.read_bytes())}" / _PRELUDE.name
        made = self.prelude.with_name(_PRELUDE.name + ".gch")
        self.prelude.parent.mkdir(exist_ok=True)
        with alone(self.prelude.with_name("lock"), self.say):
            if made.exists():
                self.done += 1
                return
            shutil.copy(_PRELUDE, self.prelude)
            unfinished = made.with_suffix(f".{os.getpid()}")
            command = ["-x", "c++-header", *self._torch_includes(), str(self.prelude), "-o", str(unfinished)]
            self._compile(command, "torch's headers")
            unfinished.replace(made)

    def _digest(self, *parts: bytes) -> str:
        """Of these parts and all that every object depends on."""
        digest = hashlib.sha256()
        for part in (*(text.encode() for text in _tools(self.toolchain)), *parts):
            digest.update(part + b"\0")
        return digest.hexdigest()[:24]

    def _torch_includes(self) -> list[str]:
        include = self.toolchain.torch / "include"
        folders = (include, include / "torch/csrc/api/include", Path(sysconfig.get_paths()["include"]))
        return [part for folder in folders for part in ("-isystem", str(folder))]

    def _object(self, library: Library, source: Path) -> Path:
        """Compile one file, unless the cache has it: it depends on the file and on our headers that it includes."""
        arguments = ["-I", str(_HERE / "host")]
        for folder in library.includes:
            arguments += ["-isystem", str(folder)]
        if library.uses_torch:
            arguments += ["-include", str(self.prelude), *self._torch_includes()]
        if library.module:
            arguments.append(f"-DTORCH_EXTENSION_NAME={library.module}")
        headers = b"".join(path.read_bytes() for path in sorted(_included(source)))
        text = self.toolchain.plugin_version + " ".join(arguments)
        path = self.objects / f"{source.stem}-{self._digest(source.read_bytes(), headers, text.encode())}.o"
        if path.exists():
            self.done += 1
            return path
        unfinished = path.with_suffix(f".{os.getpid()}")
        self._compile(["-c", str(source), "-o", str(unfinished), *arguments], f"{library.name}: {source.name}")
        unfinished.replace(path)
        return path

    def _link(self, library: Library) -> None:
        objects = [self._object(library, source) for source in library.sources]
        self.done -= len(objects)  # they were counted when they were compiled
        if library.stubs_for:
            objects.append(self._stubs(library, objects))
        arguments = ["-shared", "-o", str(self.folder / library.name), f"-Wl,-soname,{library.name}"]
        arguments += [str(path) for path in objects]
        if library.uses_torch:
            lib = self.toolchain.torch / "lib"
            arguments += [f"-L{lib}", f"-Wl,-rpath,{lib}", "-lc10", "-ltorch_cpu"]
        if library.module:
            arguments.append("-ltorch_python")
        if not objects:
            arguments += ["-x", "c++", os.devnull]
        self._compile([*arguments, "-Wl,-rpath,$ORIGIN", f"-L{self.folder}", *library.links], library.name)

    def _stubs(self, library: Library, objects: list[Path]) -> Path:
        """A function that raises, naming itself, for each symbol that a binary wants and the sources lack."""
        wanted = _symbols(library.stubs_for, "--undefined-only", dynamic=True)
        have = _symbols(tuple(objects), "--defined-only", dynamic=False)
        missing = sorted(name for name in wanted - have if re.match(library.stubs_pattern, name))
        lines = ["namespace llm_adapt { [[noreturn]] void not_modelled(const char* name); }"]
        for name in missing:
            lines.append(
                f'extern "C" __attribute__((visibility("default"))) long {name}() '
                f'{{ llm_adapt::not_modelled("{name}"); }}'
            )
        source = self.folder / f"{library.name}-stubs.cpp"
        source.write_text("\n".join(lines) + "\n", encoding="ascii")
        path = self.folder / f"{library.name}-stubs.o"
        self._compile(["-c", str(source), "-o", str(path)], f"{library.name}: {len(missing)} calls that raise", count=0)
        return path

    def _compile(self, arguments: list[str], what: str, count: int = 1) -> None:
        started = time.monotonic()
        command = [self.toolchain.compiler, *_FLAGS, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        self.done += count
        if done.returncode != 0:
            log = cache_folder() / "build-failure.txt"
            log.write_text(" ".join(command) + "\n" + done.stderr, encoding="utf-8")
            first = "\n".join(line for line in done.stderr.splitlines() if "error" in line)[:2000]
            raise SimulatorError(
                f"Building {what} was asked; {self.toolchain.compiler_version} refused:\n"
                f"{first or done.stderr[-1500:]}\n"
                f"The command and all it said are in {log}."
            )
        if count:
            self.say(f"[{self.done}/{self.total}] {what} ({time.monotonic() - started:.0f} s)")


def _included(source: Path) -> set[Path]:
    """Our own headers that a file includes, those of the headers too."""
    found: set[Path] = set()
    waiting = [source]
    while waiting:
        path = waiting.pop()
        for name in re.findall(r'^#include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            near = next((header for header in (path.parent / name, _HERE / "host" / name) if header.is_file()), None)
            if near is not None and near.resolve() not in found:
                found.add(near.resolve())
                waiting.append(near)
    return found


def _symbols(paths: tuple[Path, ...], which: str, dynamic: bool) -> set[str]:
    found: set[str] = set()
    for path in paths:
        command = ["nm", *(["-D"] if dynamic else []), which, str(path)]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found |= {line.split()[-1].split("@")[0] for line in text.splitlines() if line.strip()}
    return found
