"""Post-import hook: act on a module the moment it has been imported, so that import order never matters."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

__all__ = ["ImportHook"]


class ImportHook(importlib.abc.MetaPathFinder):
    """Finder that lets the others find a watched module and calls back around its execution.

    Args:
        watched: full names of the modules of interest.
        after: called with the name once the module has been executed. What it raises, the import raises.
        before: called with the name once the module is found and before it is executed; raise there to refuse it.
        around: called with the name; the module is executed inside the context manager it returns.
    """

    def __init__(
        self,
        watched: Iterable[str],
        after: Callable[[str], None],
        before: Callable[[str], None] = lambda name: None,
        around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
    ) -> None:
        self.watched = frozenset(watched)
        self.after, self.before, self.around = after, before, around
        self._busy = threading.local()

    def install(self) -> None:
        """Put the hook in front of the import system."""
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Take the hook out again; a second call does nothing."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a watched module through the other finders and wrap its loader."""
        if fullname not in self.watched or getattr(self._busy, "name", None) == fullname:
            return None
        spec = self._find_elsewhere(fullname, path, target)
        if spec is not None:  # a module that is not installed stays an ordinary ImportError
            self.before(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self)
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Any, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        outer = getattr(self._busy, "name", None)
        self._busy.name = fullname
        try:
            for finder in list(sys.meta_path):
                spec = None if finder is self else finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
            return None
        finally:
            self._busy.name = outer


class _Loader(importlib.abc.Loader):
    """The module's own loader, followed by a call; leaves no trace in the module."""

    def __init__(self, loader: Any, hook: ImportHook) -> None:
        self.loader, self.hook = loader, hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let the real loader create the module."""
        return self.loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with its real loader in place, then call back."""
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        with self.hook.around(module.__name__):
            self.loader.exec_module(module)
        self.hook.after(module.__name__)

    def __getattr__(self, name: str) -> Any:
        # get_source, get_data, is_package ...: whoever asks between find and exec gets the real loader's answer.
        return getattr(self.loader, name)
