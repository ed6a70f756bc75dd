"""Post-import hook: act on a module the moment it has been imported, so that import order never matters."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

from llm_adapt.errors import PatchError
from llm_adapt.patching.places import namespace

__all__ = ["ImportHook", "is_missing", "wait_for_begun_imports", "wait_for_import"]


class ImportHook(importlib.abc.MetaPathFinder):
    """Finder that lets the others find a watched module and calls back around its execution.

    Args:
        watched: full names of the modules of interest.
        after: called with the name once the module has been executed. What it raises, the import raises.
        before: called with the name when the module is about to be created; raise there to refuse it. Merely
            asking for its spec, as importlib.util.find_spec does, calls nothing.
        around: called with the name; the module is executed inside the context manager it returns.
        covers: whether a module that is not watched by name is watched all the same.
    """

    def __init__(
        self,
        watched: Iterable[str],
        after: Callable[[str], None],
        before: Callable[[str], None] = lambda name: None,
        around: Callable[[str], AbstractContextManager[Any]] = lambda name: nullcontext(),
        covers: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.watched = frozenset(watched)
        self.after, self.before, self.around, self.covers = after, before, around, covers
        self._list = sys.meta_path
        self._asking = threading.local()  # names this thread is asking the other finders for

    def install(self) -> None:
        """Put the hook in front of the import system."""
        # A list of its own: threads may be iterating over the present one, and a removal makes them skip a finder.
        self._list = sys.meta_path
        sys.meta_path = [self, *self._list]

    def remove(self) -> None:
        """Take the hook out again; a second call does nothing."""
        if self in sys.meta_path:
            self._list[:] = [finder for finder in sys.meta_path if finder is not self]
            sys.meta_path = self._list

    def find_spec(
        self, fullname: str, path: Any = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a watched module through the other finders and wrap its loader."""
        asking: set[str] = vars(self._asking).setdefault("names", set())
        if fullname in asking or not (fullname in self.watched or self.covers(fullname)):
            return None
        asking.add(fullname)
        try:
            spec = self._find_elsewhere(fullname, path, target)
        finally:
            asking.remove(fullname)
        # A module that is not installed stays an ordinary ImportError; a namespace package executes nothing.
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader, self)
        return spec

    def _find_elsewhere(
        self, fullname: str, path: Any, target: ModuleType | None
    ) -> importlib.machinery.ModuleSpec | None:
        for finder in list(sys.meta_path):
            if finder is not self and hasattr(finder, "find_spec"):
                spec = finder.find_spec(fullname, path, target)
                if spec is not None:
                    return spec
        return None


class _Loader(importlib.abc.Loader):
    """The module's own loader with a call before and after; leaves no trace in the module."""

    def __init__(self, loader: Any, hook: ImportHook) -> None:
        self.loader, self.hook = loader, hook

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        """Let the real loader create the module."""
        self.hook.before(spec.name)
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
        if name == "loader":  # not there yet: somebody copies this object
            raise AttributeError(name)
        return getattr(self.loader, name)


def is_missing(module: str) -> bool:
    """Whether a module that is not imported cannot be: its nearest imported package does not have it."""
    parts = module.split(".")
    for count in range(2, len(parts) + 1):
        package, name = ".".join(parts[: count - 1]), ".".join(parts[:count])
        if sys.modules.get(name) is None:
            try:
                return sys.modules.get(package) is not None and importlib.util.find_spec(name) is None
            except ModuleNotFoundError:  # the parent is no package
                return True
    return False


def wait_for_import(module: str, timeout_s: float = 60.0) -> None:
    """Wait until a module that another thread is importing is complete.

    Raises:
        PatchError: this very thread is importing it, or the other one takes too long.
    """
    deadline = time.monotonic() + timeout_s
    while getattr(_names(module).get("__spec__"), "_initializing", False):
        if _is_executing(_names(module)) or time.monotonic() > deadline:
            raise PatchError(
                f"patch() was called while {module} is being imported, which it would patch. "
                "Call it before that import, or after it."
            )
        time.sleep(0.001)


def wait_for_begun_imports(modules: Iterable[str], timeout_s: float = 1.0) -> None:
    """Wait until modules that other threads began to import, before the hook was there, are in sys.modules.

    Such a thread has asked the finders without the hook, which therefore hears nothing of the module. Between that and
    its place in sys.modules lie microseconds, in which CPython holds a lock of the module's name. A thread may also
    hold it while it imports the parent package, which takes long; then the finders, and the hook, are asked later.
    """
    deadline = time.monotonic() + timeout_s
    for module in modules:
        while _is_begun_elsewhere(module) and time.monotonic() < deadline:
            time.sleep(0.0005)


def _is_begun_elsewhere(module: str) -> bool:
    locks: dict[str, Any] = getattr(importlib._bootstrap, "_module_locks", {})  # type: ignore[attr-defined]
    reference = locks.get(module)
    lock = reference() if reference is not None else None
    return lock is not None and lock.owner not in (None, threading.get_ident()) and module not in sys.modules


def _names(module: str) -> dict[str, Any]:
    found = sys.modules.get(module)
    return namespace(found) if isinstance(found, ModuleType) else {}


def _is_executing(names: dict[str, Any]) -> bool:
    """Whether this thread is executing the body of the module with these names."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_globals is names and frame.f_code.co_name == "<module>":
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False
