"""Everything a patch could change in a process, taken down by identity, and what differs later."""

from __future__ import annotations

import builtins
import copyreg
import gc
import os
import sys
import types
import warnings
from typing import Any

__all__ = ["Snapshot"]

# Written by Python itself: builtins of each namespace, warnings given, slots found by copyreg, the last traceback.
_CACHES = ("__builtins__", "__warningregistry__", "__slotnames__", "last_type", "last_value", "last_traceback")
_NOT_TAKEN = ("llm_adapt", "_pytest", "pytest", "pluggy", "hypothesis")  # ours, and who runs the tests
_class_names = type.__dict__["__dict__"].__get__


class Snapshot:
    """Names of every module and class (but llm_adapt's and the test runner's), and the process-wide registries.

    Values are kept, not their ids, so that no id can be used twice.
    """

    def __init__(self) -> None:
        self.boxes: dict[str, dict[Any, Any]] = {}
        self.modules = {name: module for name, module in sys.modules.items() if not _is_left_out(name)}
        for name, module in self.modules.items():
            if issubclass(type(module), types.ModuleType):
                self._take(f"module {name}", object.__getattribute__(module, "__dict__"))
        found = [value for box in self.boxes.values() for value in box.values()]
        for kind in {value for value in found if issubclass(type(value), type)}:
            if not _is_left_out(str(_class_names(kind).get("__module__"))):
                self._take(f"class {kind.__module__}.{kind.__qualname__} {id(kind)}", _class_names(kind))
        self._take("copyreg", copyreg.dispatch_table)
        environment = {name: value for name, value in os.environ.items() if name != "PYTEST_CURRENT_TEST"}
        self._take("environment", environment, by_value=True)
        self._take("process", {"import": builtins.__import__, "gc": gc.isenabled()}, by_value=True)
        for title, items in _lists().items():
            self._take(title, dict(enumerate(items)))

    def _take(self, title: str, box: Any, by_value: bool = False) -> None:
        names = {name: value for name, value in dict(box).items() if name not in _CACHES}
        self.boxes[title] = {name: str(value) for name, value in names.items()} if by_value else names

    def differences(self, later: Snapshot) -> list[str]:
        """One line for everything that is not what it was; modules imported in between are nobody's change."""
        lines = []
        for title, box in self.boxes.items():
            now = later.boxes.get(title)
            if now is None:
                lines.append(f"{title} is gone")
                continue
            for name in box.keys() | now.keys():
                old, new = box.get(name, "absent"), now.get(name, "absent")
                is_submodule = issubclass(type(new), types.ModuleType) and name not in box
                if old is not new and not (type(old) is str and old == new) and not is_submodule:
                    lines.append(f"{title}: {name!r}: {old!r:.60} -> {new!r:.60}")
        return sorted(lines)


def _is_left_out(module: str) -> bool:
    return module.partition(".")[0] in _NOT_TAKEN


def _lists() -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {"meta_path": list(sys.meta_path), "path_hooks": list(sys.path_hooks)}
    found["warning filters"] = list(warnings.filters)
    torch = sys.modules.get("torch")
    if torch is not None:
        found["torch.serialization registry"] = list(torch.serialization._package_registry)
    return found
