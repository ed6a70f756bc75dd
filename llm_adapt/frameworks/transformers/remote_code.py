"""Remote code (trust_remote_code): transformers executes such a module itself, past Python's import system.

So no import hook hears of it. Where it does so, our hooks are told, as if the module had been imported.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from typing import Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import VERSIONS
from llm_adapt.patching import Patch, PlanItem
from llm_adapt.patching.import_hook import ImportHook

__all__ = ["rows", "surveyed"]

_MARK = "__transformers_module_hash__"  # transformers puts it into a module each time that it has executed it


def rows(context: Context) -> list[PlanItem]:
    """One row: the function of transformers that executes a module of remote code."""
    if not context.serves_operators:
        return []
    target = "transformers.dynamic_module_utils:get_class_in_module"
    reason = "modules of remote code are surveyed too"
    return [Patch(target, surveyed, reason, kind="wrap", optional=True, versions=VERSIONS)]


def surveyed(original: Callable[..., Any]) -> Callable[..., Any]:
    """The original, after which the hooks that watch the module are told that it has been executed."""

    @functools.wraps(original)
    def get_class_in_module(class_name: str, module_path: str | os.PathLike[str], **options: Any) -> Any:
        name = os.path.normpath(module_path).removesuffix(".py").replace(os.path.sep, ".")
        hooks = [hook for hook in sys.meta_path if isinstance(hook, ImportHook) and hook.covers(name)]
        before = _executed(name)
        with contextlib.ExitStack() as stack:
            for hook in hooks:
                stack.enter_context(hook.around(name))
            found = original(class_name, module_path, **options)
        if _executed(name) != before:
            for hook in hooks:
                hook.after(name)
        return found

    return get_class_in_module


def _executed(name: str) -> tuple[int, Any]:
    """Which module has that name, and what was executed in it."""
    module = sys.modules.get(name)
    return id(module), getattr(module, _MARK, None)
