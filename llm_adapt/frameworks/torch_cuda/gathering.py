"""gather and gather_object with the arguments of torch, where a vendor's plug-in put functions of an older torch."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.patching import Patch, Row

__all__ = ["rows", "with_group_dst"]

_NAMES = ("gather", "gather_object")
_MODULES = ("torch.distributed.distributed_c10d", "torch.distributed")


def rows() -> list[Row]:
    """Rows for gather and gather_object under all of their names, bound to one and the same object."""
    found: list[Row] = []
    for name in _NAMES:
        once = functools.lru_cache(maxsize=None)(with_group_dst)
        reason = f"group_dst and dst=None of torch, where {name} is that of an older one"
        found += [Patch(f"{module}:{name}", once, reason, kind="wrap") for module in _MODULES]
    return found


def with_group_dst(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function itself where it takes group_dst; else one that turns group_dst into dst.

    torch_npu 2.13 replaces both by functions of an older torch, for every backend: group_dst is a TypeError there, and
    the default of dst is 0, so that a caller who hands on torch's own default, None, names no rank.
    Workaround: npu-gather-group-dst

    Raises:
        ValueError: the function returned is given dst and group_dst.
    """
    signature = inspect.signature(original)
    if "group_dst" in signature.parameters or "dst" not in signature.parameters:
        return original
    group_dst = inspect.Parameter("group_dst", inspect.Parameter.POSITIONAL_OR_KEYWORD, default=None)
    own = [one.replace(default=None) if one.name == "dst" else one for one in signature.parameters.values()]
    of_torch = signature.replace(parameters=[*own, group_dst])

    @functools.wraps(original)
    def gather(*args: Any, **kwargs: Any) -> Any:
        asked = dict(of_torch.bind(*args, **kwargs).arguments)
        asked["dst"] = _root(asked.get("dst"), asked.pop("group_dst", None), asked.get("group"))
        return original(**asked)

    gather.__signature__ = of_torch  # type: ignore[attr-defined]
    return gather


def _root(dst: int | None, group_dst: int | None, group: Any) -> int:
    """The rank, among all, that receives; 0 unless it is given, as in torch."""
    if group_dst is None:
        return 0 if dst is None else dst
    if dst is not None:
        raise ValueError(f"gather: dst={dst} and group_dst={group_dst} were both given; give one of them.")
    members = torch.distributed.GroupMember
    # A rank that is not in the group has no ranks to look up, and takes no part.
    if group is None or group is members.WORLD or group is members.NON_GROUP_MEMBER:
        return group_dst
    return torch.distributed.get_global_rank(group, group_dst)
