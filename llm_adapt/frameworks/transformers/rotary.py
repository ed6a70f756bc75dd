"""Rotary functions of transformers' model files and of remote code: recognised by what they compute, served by rope.

Every model file has its own `apply_rotary_pos_emb`, which its attention looks up at each call. One body stands for
opposite rotations, as it calls another `rotate_half`. Each function is tried once, when its module has been imported
(rotations.py); what is not recognised beyond doubt stays, and the report says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import FunctionType, ModuleType
from typing import TYPE_CHECKING, Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import MODEL_FILES, NOT_TRIED, VERSIONS
from llm_adapt.patching import Patch, PlanItem, Survey

if TYPE_CHECKING:
    import torch

    from llm_adapt.frameworks.transformers.rotations import Rotation

__all__ = ["examine", "functions", "replacement", "rows"]

_BEGINNINGS = ("apply_rotary", "apply_multimodal_rotary")


def rows(context: Context) -> list[PlanItem]:
    """One survey of all modules with models; none where frameworks keep their own operators."""
    if not context.serves_operators:
        return []

    def find(module: ModuleType) -> Iterator[Patch]:
        for name, found in examine(module).items():
            target = f"{module.__name__}:{name}"
            if isinstance(found, str):
                context.report.once(target, "left as it is", found)
                continue
            told = context.teller(target, "left to transformers at a call", NOT_TRIED)
            new = replacement(vars(module)[name], found, told)
            yield Patch(target, new, f"rotates: {found.family}", versions=VERSIONS)

    return [Survey(MODEL_FILES, find, "rotary functions that compute what rope computes")]


def functions(module: ModuleType) -> Mapping[str, Any]:
    """Names of a module that look like functions which apply a rotary embedding, defined there."""
    return {
        name: value
        for name, value in list(vars(module).items())
        if name.startswith(_BEGINNINGS)
        and callable(value)
        and not isinstance(value, type)
        # With the kernels package a function may have been wrapped in an object that is at home elsewhere.
        and (not isinstance(value, FunctionType) or value.__module__ == module.__name__)
    }


def examine(module: ModuleType) -> Mapping[str, Rotation | str]:
    """The rotation of each such function, or why it is left as it is."""
    candidates = functions(module)
    if not candidates:
        return {}
    from llm_adapt.frameworks.transformers.probe import NotRecognised, undisturbed
    from llm_adapt.frameworks.transformers.rotations import recognise

    found: dict[str, Rotation | str] = {}
    for name, function in candidates.items():
        try:
            with undisturbed():
                found[name] = recognise(function)
        except NotRecognised as reason:
            found[name] = str(reason)
        except Exception as error:  # noqa: BLE001 - foreign code is tried out: said, and the function is left alone
            found[name] = f"trying it raised {type(error).__name__}: {error}"
    return found


def replacement(original: Callable[..., Any], rotation: Rotation, told: Callable[[], None]) -> Callable[..., Any]:
    """The function with rope in it; calls that it was not recognised for go to the original.

    It holds no state, and torch.compile and torch.export trace it.
    """
    from llm_adapt.frameworks.transformers.probe import parameters_of, written

    names = [parameter.name for parameter in parameters_of(original)]
    axis = "unsqueeze_dim" if "unsqueeze_dim" in names else "None"
    tensors = ", ".join(rotation.tensors)
    is_free = "position_ids" in names and not rotation.positions
    rotated = ", ".join(f"_rotate({name}, cos, sin, *_how)" for name in rotation.tensors)
    refused = "None if position_ids is not None else " if is_free else ""
    body = (
        f"_how = {refused}_choose(({tensors},), cos, sin, {axis})\n"
        f"if _how is None:\n"
        f"    _told()\n"
        f"    return _original({', '.join(names)})\n"
        f"return {rotated}"
    )
    inside = {"_choose": _chooser(rotation), "_rotate": _rotator(rotation), "_told": told}
    return written(body, original.__name__, inside, original)


def _chooser(rotation: Rotation) -> Callable[..., tuple[str, str] | None]:
    """A function of the tensors of a call -> (layout, compute) of rope; None where the original must serve."""
    import torch

    layouts = {tuple(call): layout for call, layout in rotation.layouts}
    positions = {"bhsd": 2, "bshd": 1, "thd": 0}
    narrow = (torch.bfloat16, torch.float16)
    widening = 2 if rotation.columns == "one for each pair" else 1

    def choose(
        tensors: tuple[torch.Tensor, ...], cos: torch.Tensor, sin: torch.Tensor, axis: int | None
    ) -> tuple[str, str] | None:
        first = tensors[0]
        if not all([isinstance(t, torch.Tensor) for t in (*tensors, cos, sin)]):  # torch.fx hands over proxies
            return None
        layout = layouts.get((first.ndim, cos.ndim, axis))
        if cos.dtype == first.dtype:
            compute = rotation.same
        else:
            compute = rotation.mixed if cos.dtype == torch.float32 and first.dtype in narrow else ""
        if layout is None or not compute or cos.shape != sin.shape or cos.dtype != sin.dtype:
            return None
        rotated = cos.shape[-1] * widening
        for x in tensors:
            is_wide = rotated == x.shape[-1] or (rotation.is_partial and rotated < x.shape[-1])
            if (
                not is_wide
                or x.ndim != first.ndim
                or x.dtype != first.dtype
                or cos.shape[-2] != x.shape[positions[layout]]
            ):
                return None
            if cos.ndim == 3 and cos.shape[0] not in (1, x.shape[0]):
                return None
        return (layout, compute) if rotated % 2 == 0 else None

    return choose


def _rotator(rotation: Rotation) -> Callable[..., torch.Tensor]:
    from llm_adapt.frameworks.transformers.rotations import COLUMNS
    from llm_adapt.ops.rope import rope

    pairs, inverse = rotation.pairs, rotation.inverse
    table, select = COLUMNS[rotation.columns]

    def rotate(x: Any, cos: Any, sin: Any, layout: Any, compute: Any) -> torch.Tensor:
        if compute == "promoted":
            x, compute = x.to(cos.dtype), "float32"
        return rope(x, select(cos), select(sin), None, None, layout, pairs, table, compute, inverse)  # type: ignore[arg-type]

    return rotate
