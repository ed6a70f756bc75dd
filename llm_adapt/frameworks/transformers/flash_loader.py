"""transformers' loader of flash-attention gets the functions of flash.py: every name and version of it is served.

transformers asks three things of a machine before it uses "flash_attention_2": whether the package is there
(FLASH_ATTENTION_COMPATIBILITY_MATRIX), else a kernel from the hub, over the network; and then the functions
(lazy_import_flash_attention). It keeps what it has loaded in module globals. Those are never touched here: the loader
itself is replaced for the names that are served, and asks the original for all others.

On NPU this takes the place of transformers' own functions, which drop sliding windows and sinks and refuse softcap.
Source: modeling_flash_attention_utils.py and integrations/npu_flash_attention.py of transformers 5.23 and 5.24.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from llm_adapt.errors import PatchError
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import MODEL_FILES
from llm_adapt.patching import Entry, Patch, PlanItem, Survey
from llm_adapt.patching.fingerprint import fingerprint_object

__all__ = ["HUB_NAMES", "rows", "serves_flash"]

# The repositories that transformers itself takes for one of its own names, or that models name.
HUB_NAMES = (
    "kernels-community/aiter-flash-attn",
    "kernels-community/flash-attn2",
    "kernels-community/flash-attn3",
    "kernels-community/flash-attn4",
    "kernels-community/metal-flash-sdpa",
    "kernels-community/vllm-flash-attn3",
)
_UTILS = "transformers.modeling_flash_attention_utils"
_LOADERS = {"5.23 and 5.24": "2240d9ec2616"}


def rows(context: Context) -> list[PlanItem]:
    """The loader, the availability of each version, the names of the hub, and models that bind a function at import."""
    if not serves_flash(context):
        reason = "the kernels package is installed, which fetches one for this device"
        context.report.add("patch", "flash-attention of transformers", "left alone", reason)
        return []
    loader = functools.partial(_loader, context=context)
    return [
        Survey((_UTILS,), loader, "flash-attention is the operator"),
        Survey(("transformers.modeling_utils",), _names, "names of flash-attention on the hub need no hub"),
        Survey(MODEL_FILES, _bound_at_import, "some bind flash-attention at import, if it is there then"),
    ]


def serves_flash(context: Context) -> bool:
    """Whether any name of flash-attention is ours here.

    Where the device is torch.cuda, what is installed for it is what the script was written for, and stays: a version
    that transformers finds (_served), and all, where a package can fetch them. What is left would only raise.
    """
    return context.adapter.needs_facade or importlib.util.find_spec("kernels") is None


def _served(context: Context, checks: dict[str, Callable[[], bool]]) -> frozenset[str]:
    """The values of attn_implementation that get our functions."""
    is_ours = context.adapter.needs_facade
    theirs = [] if is_ours else [name for name, is_available in checks.items() if is_available()]
    for name in theirs:
        context.report.once(name, "left to transformers", "it is installed for this device")
    return frozenset({*HUB_NAMES, *checks}.difference(theirs))


def _loader(module: ModuleType, context: Context) -> Iterator[Patch | Entry]:
    original = module.lazy_import_flash_attention
    known = ", ".join(f"{version}: {value}" for version, value in _LOADERS.items())
    if (found := fingerprint_object(original)) not in _LOADERS.values():
        raise PatchError(
            f"lazy_import_flash_attention has changed (fingerprint {found}; known {known}); use one of those versions, "
            "or attn_implementation='sdpa'"
        )
    matrix = module.FLASH_ATTENTION_COMPATIBILITY_MATRIX
    checks = {f"flash_attention_{version}": facts["general_availability_check"] for version, facts in matrix.items()}
    served = _served(context, checks)
    reason = "its functions are the attention operator"
    yield Patch(f"{module.__name__}:lazy_import_flash_attention", _loading(served), reason, kind="wrap")
    yield Patch(f"{module.__name__}:is_flash_attn_available", _is_there, "the operator serves it")
    for version, facts in matrix.items():
        if f"flash_attention_{version}" not in served:
            continue
        yield Entry(
            f"{module.__name__}:FLASH_ATTENTION_COMPATIBILITY_MATRIX",
            {
                **facts,
                "general_availability_check": _is_there,
                "supported_devices": (*facts["supported_devices"], (_is_there, context.adapter.device_type)),
            },
            "the operator needs no package",
            key=version,
        )


def _is_there(kernels_fallback_ok: bool = False) -> bool:
    """Flash-attention is available; nothing is fetched to find out."""
    return True


def _loading(served: frozenset[str]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`lazy_import_flash_attention` that has our functions for the names that are served."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        from llm_adapt.frameworks.transformers.flash import flash_attn_func, flash_attn_varlen_func

        names = original.__globals__
        # No function that writes new keys into pages: transformers then takes the packed one for continuous batching.
        functions = flash_attn_func, flash_attn_varlen_func, None, names["_pad_input"], names["_unpad_input"]
        loaded = functions, (names["_lazy_define_process_function"](flash_attn_varlen_func), dict)

        @functools.wraps(original)
        def lazy_import_flash_attention(implementation: str | None, *args: Any, **kwargs: Any) -> Any:
            # None = the one loaded last, which older models ask for; before any other it is ours.
            name = names["_loaded_implementation"] if implementation is None else implementation
            return loaded if name is None or name in served else original(implementation, *args, **kwargs)

        return lazy_import_flash_attention

    return wrap


def _names(module: ModuleType) -> Iterator[Entry]:
    functions = module.AttentionInterface._global_mapping
    for name in HUB_NAMES:
        yield Entry(
            f"{module.__name__}:AttentionInterface._global_mapping",
            functions["flash_attention_2"],
            "models ask for it by the name of its repository",
            key=name,
        )


def _bound_at_import(module: ModuleType) -> Iterator[Patch]:
    """The function that a model imports only if flash-attention is there: for those imported before patch()."""
    if "is_flash_attn_available" in vars(module) and "_flash_attention_forward" not in vars(module):
        function = vars(sys.modules[_UTILS])["_flash_attention_forward"]
        reason = "it was imported while there was no flash-attention"
        yield Patch(f"{module.__name__}:_flash_attention_forward", function, reason, kind="add")
