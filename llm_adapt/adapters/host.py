"""Host: what can be seen of a machine without importing torch: files, commands, packages, variables.

Every look that detection and `llm-adapt doctor` take goes through one Host, so that a test (or a report
from another machine) can present a made-up one: a folder as root, Python paths, a dict of variables.
"""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["Host", "TorchBuild"]

_LIBRARY_FOLDERS = ("/lib", "/usr/lib", "/lib64", "/usr/lib64", "/usr/local/lib")
_NAME_AND_VERSION = re.compile(r"^(?:Name|Version): *(\S+)", re.MULTILINE)
_VERSION_LINE = re.compile(r"^(\w+)(?:\s*:[^=]+)?\s*=\s*['\"]([^'\"]*)['\"]", re.MULTILINE)


@dataclass(frozen=True)
class TorchBuild:
    """Which torch is installed, read from its version.py or the loaded module; "" = not built for it."""

    version: str
    cuda: str = ""
    hip: str = ""


def _environment() -> Mapping[str, str]:
    return os.environ


def _modules() -> Mapping[str, ModuleType]:
    return sys.modules


def _can_read_and_write(path: str) -> bool:
    return os.access(path, os.R_OK | os.W_OK)


@dataclass(frozen=True)
class Host:
    """A machine as seen from one Python process.

    Attributes:
        root: folder that stands for "/".
        environ: environment variables.
        python_path: where packages are looked for; None = as this interpreter imports.
        loaded: modules already imported.
        can_open: whether a device node may be opened for reading and writing.
    """

    root: Path = Path("/")
    environ: Mapping[str, str] = field(default_factory=_environment)
    python_path: tuple[str, ...] | None = None
    loaded: Mapping[str, ModuleType] = field(default_factory=_modules)
    can_open: Callable[[str], bool] = _can_read_and_write

    def path(self, absolute: str) -> Path:
        """Where an absolute path of the described machine lies on this one."""
        return self.root / absolute.lstrip("/")

    def exists(self, absolute: str) -> bool:
        """Whether the file, folder or node exists."""
        return self.path(absolute).exists()

    def read(self, absolute: str) -> str:
        """Text of a file; "" when it is absent or unreadable, which is the same answer to every caller."""
        try:
            return self.path(absolute).read_text(encoding="utf-8", errors="replace")
        except OSError:
            return ""

    def nodes(self, pattern: str) -> tuple[str, ...]:
        """Absolute paths that match a glob, numbers in numeric order."""
        found = ("/" + path.relative_to(self.root).as_posix() for path in self.root.glob(pattern.lstrip("/")))
        return tuple(sorted(found, key=_numeric_order))

    def closed(self, nodes: Iterable[str]) -> tuple[str, ...]:
        """Those of the device nodes that this user may not open."""
        return tuple(node for node in nodes if not self.can_open(str(self.path(node))))

    def which(self, command: str) -> str | None:
        """Full path of a command on PATH."""
        folders = filter(None, self.environ.get("PATH", "").split(os.pathsep))
        return shutil.which(command, path=os.pathsep.join(str(self.path(folder)) for folder in folders))

    def library(self, name: str) -> str | None:
        """Where the loader would find a shared library: a path, "ld.so.cache", or None."""
        listed = self.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep)
        for folder in (*filter(None, listed), *_LIBRARY_FOLDERS):
            if self.exists(f"{folder}/{name}"):
                return f"{folder}/{name}"
        cache = self.path("/etc/ld.so.cache")
        if cache.is_file() and os.access(cache, os.R_OK) and name.encode() in cache.read_bytes():
            return "ld.so.cache"
        return None

    def pci_classes(self, vendor: str) -> tuple[str, ...]:
        """PCI classes of the devices of one vendor, e.g. pci_classes("0x10de") == ("0x030200",)."""
        return tuple(
            self.read(f"{node}/class").strip()
            for node in self.nodes("/sys/bus/pci/devices/*")
            if self.read(f"{node}/vendor").strip().lower() == vendor
        )

    def package(self, name: str) -> Path | None:
        """File that `import name` would load, without importing it; None when not installed."""
        module = self.loaded.get(name)
        if module is not None:
            return Path(getattr(module, "__file__", None) or name)
        if self.python_path is None:
            spec = importlib.util.find_spec(name)
        else:
            spec = importlib.machinery.PathFinder.find_spec(name, list(self.python_path))
        if spec is None or spec.origin is None:  # no origin: a bare folder of that name, not a package
            return None
        return Path(spec.origin)

    def distributions(self, name: str | None = None) -> list[importlib.metadata.Distribution]:
        """Installed distributions, all or those of one name (hyphen and underscore are the same)."""
        context: dict[str, Any] = {} if name is None else {"name": name}
        if self.python_path is not None:
            context["path"] = list(self.python_path)
        return list(importlib.metadata.Distribution.discover(**context))

    def version(self, distribution: str) -> str | None:
        """Version of an installed distribution, from its metadata."""
        for found in self.distributions(distribution):
            text = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
            version = re.search(r"^Version: *(\S+)", text, re.MULTILINE)
            return version.group(1) if version else None
        return None

    def owners(self, file: str) -> list[str]:
        """Distributions, with their versions, that installed a file, e.g. owners("triton/__init__.py")."""
        records = ((found, found.read_text("RECORD") or "") for found in self.distributions())
        lines = {found.read_text("METADATA") or "" for found, record in records if f"\n{file}," in f"\n{record}"}
        return sorted(" ".join(_NAME_AND_VERSION.findall(text)[:2]) for text in lines)

    def entry_points(self, group: str) -> list[importlib.metadata.EntryPoint]:
        """Entry points of one group; a distribution that lies twice on the path counts once."""
        points = {
            (point.name, point.value): point
            for found in self.distributions()
            for point in found.entry_points
            if point.group == group
        }
        return [points[key] for key in sorted(points)]

    def torch_build(self) -> TorchBuild | None:
        """The torch that is loaded or would be imported; None when torch is not installed."""
        torch = self.loaded.get("torch")
        if torch is not None:
            facts = getattr(torch, "version", None)
            cuda, hip = (str(getattr(facts, name, None) or "") for name in ("cuda", "hip"))
            return TorchBuild(str(getattr(torch, "__version__", "")), cuda, hip)
        origin = self.package("torch")
        if origin is None:
            return None
        version_file = origin.with_name("version.py")
        text = version_file.read_text(encoding="utf-8") if version_file.is_file() else ""
        values = dict(_VERSION_LINE.findall(text))
        version = values.get("__version__") or self.version("torch") or "of unknown version"
        return TorchBuild(version, values.get("cuda", ""), values.get("hip", ""))


def _numeric_order(path: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path)]
