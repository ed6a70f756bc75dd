"""Compile the kernels with g++, once for each compiler, CPU and state of the sources."""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from llm_adapt.settings import cache_folder

__all__ = ["built_library"]

log = logging.getLogger("llm_adapt")
_HERE = Path(__file__).parent
# -ffp-contract=off: a product that upstream rounds is rounded here too. The other two change no number: they let
# compilers forget errno and floating-point exceptions, which keep loops from being vectorised.
_NUMBERS = ("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math")
_FLAGS = ("-std=c++17", "-O3", "-fopenmp", "-fPIC", "-fvisibility=hidden", *_NUMBERS)


def built_library() -> Path:
    """The shared library for this compiler and this CPU; built where it is not there yet.

    Raises:
        ImportError: there is no g++, it refuses the sources, or the cache cannot be written; in one line.
    """
    compiler = shutil.which("g++")
    if compiler is None:
        raise ImportError(
            "the openmp kernels are compiled at their first use and there is no g++ on PATH. Install one: "
            "apt install g++ (Debian, Ubuntu), dnf install gcc-c++ (Fedora, openEuler)."
        )
    sources = sorted(_HERE.glob("*.cpp"))
    path = cache_folder() / "kernels" / f"openmp-{_digest(compiler, [*sources, *sorted(_HERE.glob('*.h'))])}.so"
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # The ranks of a job start together, and one of them builds.
        with open(path.with_suffix(".lock"), "w", encoding="ascii") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not path.is_file():
                _build(compiler, sources, path)
    except OSError as error:
        raise ImportError(
            f"the openmp kernels were to be built in {path.parent}; {error}. "
            "Make room there, or name a folder that can be written with LLM_ADAPT_CACHE."
        ) from error
    return path


def _digest(compiler: str, files: list[Path]) -> str:
    """Of all that the library depends on. A cache may be shared by machines of several kinds."""
    real = os.path.realpath(compiler)
    found = os.stat(real)
    digest = hashlib.sha256(repr((real, found.st_size, found.st_mtime_ns, _cpu(), _flags())).encode())
    for path in files:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def _flags() -> tuple[str, ...]:
    native = "-mcpu=native" if platform.machine().startswith("ppc") else "-march=native"
    return (*_FLAGS, native)


def _cpu() -> str:
    """What tells one CPU's instructions from another's: the lines of /proc/cpuinfo that name it and its features."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.machine() + platform.processor()
    lines = re.findall(r"^(?:flags|Features|model name|cpu family|model|CPU part|cpu)\s*:.*$", text, re.MULTILINE)
    return platform.machine() + "\n".join(sorted(set(lines)))


def _build(compiler: str, sources: list[Path], path: Path) -> None:
    """Compile all files at the same time, and link them."""
    log.info("building the openmp kernels: %s", path)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=path.stem) as work:
        objects = [str(Path(work) / f"{source.stem}.o") for source in sources]
        pairs = zip(sources, objects, strict=True)
        _run(path, [[compiler, *_flags(), "-c", str(source), "-o", made] for source, made in pairs])
        linked = Path(work) / path.name
        _run(path, [[compiler, *_flags(), "-shared", *objects, "-o", str(linked)]])
        linked.replace(path)
    log.info("built the openmp kernels in %.1f s", time.monotonic() - started)


def _run(path: Path, commands: list[list[str]]) -> None:
    """Run all commands together. Raises ImportError for the first that fails, after the last has ended."""
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for command in commands]
    said = [process.communicate()[1] for process in running]
    for command, process, errors in zip(commands, running, said, strict=True):
        if process.returncode != 0:
            failure = path.with_suffix(".failure.txt")
            failure.write_text(" ".join(command) + "\n" + errors, encoding="utf-8")
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip()[-300:])
            raise ImportError(f"g++ refused the openmp kernels: {first}. The command and all it said: {failure}")
