"""Act before and after a module runs for the first time, before anything that imports it goes on."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType

__all__ = ["Acts", "on_first_import"]


def _nothing() -> None:
    """Where there is nothing to do before."""


@dataclass(frozen=True)
class Acts:
    """What is done about one module.

    Attributes:
        after: called with the module once it has run.
        before: called just before it runs.
    """

    after: Callable[[ModuleType], None]
    before: Callable[[], None] = _nothing


class _Loader(importlib.abc.Loader):
    """The module's own loader, between the two acts."""

    def __init__(self, own: importlib.abc.Loader, acts: Acts) -> None:
        self.own, self.acts = own, acts

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        self.acts.before()  # here and not later: an extension module may run already when it is made
        return self.own.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # The module must not see us: it may ask its loader for data or source.
        module.__loader__ = self.own
        assert module.__spec__ is not None
        module.__spec__.loader = self.own
        self.own.exec_module(module)
        self.acts.after(module)


class _Finder(importlib.abc.MetaPathFinder):
    """First in sys.meta_path; knows nothing itself and asks the finders behind it."""

    def __init__(self, acts: Mapping[str, Acts]) -> None:
        self.acts = dict(acts)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        acts = self.acts.pop(fullname, None)
        if acts is None:
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec is not None and spec.loader is not None:
                spec.loader = _Loader(spec.loader, acts)
                return spec
        return None


def on_first_import(acts: Mapping[str, Acts]) -> None:
    """Register acts: name of a module that is not imported yet -> what is done about it."""
    sys.meta_path.insert(0, _Finder(acts))
