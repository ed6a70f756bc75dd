"""Make `import torch_mlu` and `import torch_mlu_ops` find the simulator's, and only while simulating."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["NATIVE", "VERSION", "Finder", "put_first"]

_HERE = Path(__file__).parent
NATIVE = "torch_mlu_native.so"
VERSION = "0.0.0"

# Packages, and the file that is each one's content. Modules inside them lie beside it, under their own names.
_PACKAGES = {
    "torch_mlu": "torch_mlu/__init__.py",
    "torch_mlu.mlu": "torch_mlu/mlu.py",
    "torch_mlu.optimizers": "torch_mlu/optimizers.py",
    "torch_mlu.utils": "torch_mlu/empty.py",
    "torch_mlu.utils.gpu_migration": "torch_mlu/gpu_migration.py",
    "torch_mlu.utils.gpu_migration.migration": "torch_mlu/migration.py",
    "torch_mlu.utils.model_transfer": "torch_mlu/model_transfer.py",
    "torch_mlu_ops": "torch_mlu_ops/__init__.py",
}


class Finder(MetaPathFinder):
    """Finds the two packages, their metadata, and holds triton back until torch_mlu is there."""

    def __init__(self, folder: Path, torch_version: str) -> None:
        self.folder = folder
        self.version = f"{VERSION}+torch{torch_version.partition('+')[0]}"

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of a module of the two packages; None for all others."""
        if fullname == "torch_mlu._native":
            origin = str(self.folder / NATIVE)
            return ModuleSpec(fullname, ExtensionFileLoader(fullname, origin), origin=origin)
        if fullname == "triton" and "torch_mlu" not in sys.modules:
            return self._held_back(path, target)
        package = _PACKAGES.get(fullname)
        if package is not None:
            return importlib.util.spec_from_file_location(fullname, _HERE / package, submodule_search_locations=[])
        parent, _, name = fullname.rpartition(".")
        inside = _PACKAGES.get(parent)
        file = _HERE / str(inside) if inside is None else (_HERE / inside).with_name(f"{name}.py")
        if inside is None or not file.is_file():
            return None
        return importlib.util.spec_from_file_location(fullname, file)

    def _held_back(self, path: Sequence[str] | None, target: ModuleType | None) -> ModuleSpec | None:
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec("triton", path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            spec.loader = _Refuses()
        return spec

    def find_distributions(self, context: Any = None) -> Iterable[importlib.metadata.Distribution]:
        """The packages' metadata, so that their versions and torch_mlu's entry point for torch are found."""
        name = getattr(context, "name", None)
        asked = None if name is None else name.replace("-", "_").lower()
        known = (
            _Distribution("torch_mlu", self.version, "[torch.backends]\ntorch_mlu = torch_mlu:init\n"),
            _Distribution("torch_mlu_ops", VERSION, ""),
        )
        return [one for one in known if asked in (None, one.name)]


class _Refuses(Loader):
    """Loader of triton while torch_mlu is missing."""

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        raise ImportError(
            "triton was imported before torch_mlu, and its MLU driver needs torch_mlu first. Import torch_mlu before."
        )


class _Distribution(importlib.metadata.Distribution):
    """What pip would have written of torch_mlu."""

    def __init__(self, name: str, version: str, entry_points: str) -> None:
        self._files = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
            "entry_points.txt": entry_points,
        }

    def read_text(self, filename: str) -> str | None:
        return self._files.get(filename)

    def locate_file(self, path: Any) -> Any:
        return _HERE / path


def put_first(finder: Finder) -> None:
    """Ask this finder before all others."""
    sys.meta_path.insert(0, finder)
    importlib.invalidate_caches()
