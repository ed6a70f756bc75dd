"""An import finder for the packages of the DAS index and their metadata, in a process that simulates a DCU."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

__all__ = ["DISTRIBUTIONS", "serve"]

_DAS = Path(__file__).parent / "das"

# Package -> its modules: name -> file in das/.
_MODULES = {
    "flash_attn": {
        "flash_attn": "flash_attn.py",
        "flash_attn.flash_attn_interface": "flash_attn_interface.py",
        "flash_attn_2_cuda": "flash_attn_2_cuda.py",
    },
    "lightop": {"lightop": "lightop.py"},
    "apex": {
        "apex": "apex.py",
        "apex.normalization": "apex_normalization.py",
        "apex.normalization.fused_layer_norm": "apex_fused_layer_norm.py",
        "apex.optimizers": "apex_optimizers.py",
        "apex.multi_tensor_apply": "apex_multi_tensor_apply.py",
        "amp_C": "amp_c.py",
        "fused_layer_norm_cuda": "fused_layer_norm_cuda.py",
        "fused_weight_gradient_mlp_cuda": "fused_weight_gradient_mlp_cuda.py",
    },
}
_FOLDERS = ("flash_attn", "apex", "apex.normalization")

# Versions as recorded; that of lightop is not. The real names end in the torch that a wheel is for.
DISTRIBUTIONS = {"flash_attn": "2.8.3+das.opt1.dtk2604", "apex": "1.7.0+das.opt2.dtk2604"}


class _Distribution(importlib.metadata.Distribution):
    """What pip would have recorded of a wheel."""

    def __init__(self, package: str) -> None:
        self.package = package

    def read_text(self, filename: str) -> str | None:
        if filename != "METADATA":
            return None
        return f"Metadata-Version: 2.1\nName: {self.package}\nVersion: {DISTRIBUTIONS[self.package]}\n"

    def locate_file(self, path: object) -> Path:  # type: ignore[override]
        return _DAS / str(path)


class _Finder(importlib.metadata.DistributionFinder):
    """Finds the modules and the distributions of the packages that are installed on the simulated machine."""

    def __init__(self, packages: Sequence[str]) -> None:
        self.packages = packages
        self.modules = {name: file for package in packages for name, file in _MODULES[package].items()}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        file = self.modules.get(fullname)
        if file is None:
            return None
        folder: list[str] | None = [] if fullname in _FOLDERS else None
        return importlib.util.spec_from_file_location(fullname, _DAS / file, submodule_search_locations=folder)

    def find_distributions(
        self, context: importlib.metadata.DistributionFinder.Context | None = None
    ) -> Iterable[importlib.metadata.Distribution]:
        asked = None if context is None else context.name
        for package in self.packages:
            if package in DISTRIBUTIONS and (asked is None or asked.lower().replace("-", "_") == package):
                yield _Distribution(package)


def serve(packages: Sequence[str]) -> None:
    """Let the packages be imported. Behind the interpreter's own finders: one that is installed comes first."""
    sys.meta_path.append(_Finder(packages))
