"""Model files for the tests of norms and rotary functions: what was recognised in them, and its replacement."""

from __future__ import annotations

import importlib
import types
from typing import Any

from llm_adapt.frameworks.transformers import norms, rotary
from llm_adapt.ops.dispatch.dispatcher import dispatchers

PLAIN = "apply_rotary_pos_emb"


TOLD: list[None] = []


def told() -> None:
    """Stands for a line of the report."""
    TOLD.append(None)


def modeling(name: str) -> Any:
    """A model's module."""
    return importlib.import_module(f"transformers.models.{name}.modeling_{name}")


def make_module(source: str) -> types.ModuleType:
    """A module as remote code brings one."""
    module = types.ModuleType("transformers_modules.some.modeling_some")
    exec("import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n" + source, vars(module))
    return module


def served_norm(name: str, cls: str) -> tuple[Any, Any, Any]:
    """A class, its replaced forward and its own."""
    found = norms.examine(modeling(name))
    cls_ = getattr(modeling(name), cls)
    assert not isinstance(found[cls_], str), found[cls_]
    return cls_, norms.replacement(cls_, found[cls_], told), cls_.forward


def served_rotary(name: str, function: str = PLAIN) -> tuple[Any, Any, Any]:
    """What a function was recognised as, its replacement and itself."""
    found = rotary.examine(modeling(name))[function]
    assert not isinstance(found, str), found
    original = getattr(modeling(name), function)
    return found, rotary.replacement(original, found, told), original


def op_calls() -> int:
    """How often any op was called."""
    return sum(binding.calls for found in dispatchers.values() for binding in found.bindings.values())
