"""Toy packages: modules from source text, importable for the time of a block; and rows to patch them with."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import textwrap
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from llm_adapt.patching import Patch, Plan

__all__ = ["ToyFinder", "applied", "load", "louder", "restless", "statuses", "toys", "wrap"]


class ToyFinder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the modules of a dict, name -> source; a package is a name with a dot behind it in another name.

    Attributes:
        executed: names in the order in which they were executed.
    """

    def __init__(self, sources: dict[str, str]) -> None:
        self.sources = {name: textwrap.dedent(text) for name, text in sources.items()}
        self.executed: list[str] = []

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        """The module's spec."""
        if fullname not in self.sources:
            return None
        is_package = any(name.startswith(fullname + ".") for name in self.sources)
        return importlib.machinery.ModuleSpec(fullname, self, origin="toy", is_package=is_package)

    def exec_module(self, module: ModuleType) -> None:
        """Execute the source."""
        self.executed.append(module.__name__)
        exec(compile(self.sources[module.__name__], f"<{module.__name__}>", "exec"), vars(module))


@contextlib.contextmanager
def toys(sources: dict[str, str]) -> Iterator[ToyFinder]:
    """Make the modules importable inside the block, and forget them behind it."""
    finder = ToyFinder(sources)
    tops = {name.partition(".")[0] for name in sources}
    sys.meta_path.append(finder)
    try:
        yield finder
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]


def load(name: str) -> Any:
    """importlib.import_module, typed so that any attribute may be asked."""
    return importlib.import_module(name)


def louder(original: Any) -> Any:
    """Wrap a function so that its answer shows it."""

    @functools.wraps(original)
    def loud(*args: Any, **kwargs: Any) -> Any:
        return ("loud", original(*args, **kwargs))

    return loud


def wrap(target: str, new: Any = louder, **facts: Any) -> Patch:
    """A row that wraps its target."""
    return Patch(target, new, f"test of {target}", kind="wrap", **facts)


def applied(*rows: Any, **options: Any) -> Plan:
    """A plan of these rows, applied."""
    plan = Plan(rows, **options)
    plan.apply()
    return plan


def statuses(plan: Plan) -> list[tuple[str, str]]:
    """Target and status of every row."""
    return [(outcome.row.target, outcome.status) for outcome in plan.outcomes()]


@contextlib.contextmanager
def restless() -> Iterator[None]:
    """Threads change, and garbage is collected, at nearly every step: what can interleave does."""
    interval, thresholds = sys.getswitchinterval(), gc.get_threshold()
    sys.setswitchinterval(1e-5)
    gc.set_threshold(5, 5, 5)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.set_threshold(*thresholds)
