"""torch.load and checkpoints: storages tagged by any device land on this one, without the other's plug-in."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.torch_cuda.availability import IsTold
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.patching import Entry, Patch, Row

__all__ = ["rows"]

# Before torch's own entries for cuda (20) and the plug-in device (23), which raise without the device.
_PRIORITY = 15
_ACCELERATOR_TAG = re.compile(r"(cuda|npu|mlu|privateuseone)(?::(\d+))?\Z")


def rows(translate: DeviceTranslator, is_told: IsTold) -> list[Row]:
    """Rows for torch.load's map_location and for storage tags."""
    why = "checkpoints written on any device load here"
    load = functools.lru_cache(maxsize=None)(
        functools.partial(_load, translate=translate, is_told=is_told)
    )  # one object, two names
    entry = (_PRIORITY, _no_tag, functools.partial(_restore, translate=translate))
    return [
        Patch("torch:load", load, why, kind="wrap"),
        Patch("torch.serialization:load", load, why, kind="wrap"),
        Entry("torch.serialization:_package_registry", entry, why, sort_key=lambda item: item[0]),
    ]


def _load(original: Callable[..., Any], translate: DeviceTranslator, is_told: IsTold) -> Callable[..., Any]:
    def location(value: Any) -> Any:
        if isinstance(value, dict):
            found = {key: location(item) for key, item in value.items()}
            # Files that this device wrote have its own tags where those of CUDA have cuda's.
            return {_retagged(key, "cuda", translate.target): item for key, item in found.items()} | found
        if callable(value):
            is_ours = not translate.is_host and is_told(getattr(value, "__module__", None) or "")
            return _told_cuda(value, translate.target) if is_ours else value
        place = translate(value)
        return str(place) if isinstance(value, str) else place

    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        # The first argument is a path or a file: it is never translated, whatever it is called.
        return original(f, location(map_location), *args, **kwargs)

    return load


def _retagged(tag: Any, old: str, new: str) -> Any:
    """`cuda:1` as `npu:1` or the other way round; any other tag stays."""
    match = _ACCELERATOR_TAG.match(tag) if isinstance(tag, str) else None
    return tag if match is None or match[1] != old else new + tag[len(old) :]


def _told_cuda(place: Callable[[Any, str], Any], own: str) -> Callable[[Any, str], Any]:
    """A map_location function of CUDA code, which is told cuda where the file names this device."""
    return lambda storage, tag: place(storage, _retagged(tag, own, "cuda"))


def _no_tag(storage: Any) -> None:
    """Leave the writing of tags to torch."""


def _restore(storage: Any, tag: str, translate: DeviceTranslator) -> Any:
    """Bring a storage written on an accelerator to this device; None for tags that torch knows how to restore."""
    match = _ACCELERATOR_TAG.match(tag)
    if match is None or match[1] == translate.target:
        return None
    if translate.is_host:
        return storage
    return storage.to(device=torch.device(translate.target) if match[2] is None else translate.ordinal(int(match[2])))
