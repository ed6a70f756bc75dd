"""Norms of transformers' model files and of remote code: recognised by what they compute, and served by our ops.

About two hundred classes write RMSNorm down, in a dozen orders of roundings, under names that do not tell which. Each
class is tried once, when its module has been imported (norm_formulas.py); what is not recognised beyond doubt keeps
its own forward, and the report says why. A recognised class gets a forward that calls the op with what the instance
holds at that moment, so instances that exist already are reached, and weights may be swapped, sharded or wrapped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import MODEL_FILES, NOT_TRIED, VERSIONS, remote_code
from llm_adapt.patching import Patch, PlanItem, Survey

if TYPE_CHECKING:
    from llm_adapt.frameworks.transformers.norm_formulas import NormFormula

__all__ = ["classes", "examine", "replacement", "rows"]

# A norm by its name; that it is one is for the numbers to say. BatchNorm and GroupNorm are not over the last axis.
_LOOKS_LIKE_ONE = re.compile(r".*Norm(Gated|1P|\dd|Zero)?")
_IS_ANOTHER = re.compile(r".*(Batch|Group|Instance|Weight|Spectral)Norm\w*")


def rows(context: Context) -> list[PlanItem]:
    """One survey of all modules with models, those of remote code too; none where frameworks keep their operators."""
    if not context.serves_operators:
        return []

    def find(module: ModuleType) -> Iterator[Patch]:
        for cls, found in examine(module).items():
            target = f"{module.__name__}:{cls.__qualname__}"
            if isinstance(found, str):
                context.report.once(target, "left as it is", found)
                continue
            reason = f"computes {'; or '.join(formula.family for formula in found)}"
            # No one keeps a copy of a class's forward; to search for some would take longer than all of this.
            told = context.teller(target, "left to transformers at a call", NOT_TRIED)
            yield Patch(f"{target}.forward", replacement(cls, found, told), reason, versions=VERSIONS, rebind=False)

    return [Survey(MODEL_FILES, find, "norms that compute what an op computes"), *remote_code.rows(context)]


def classes(module: ModuleType) -> list[type]:
    """The classes of a module that look like norms and have a forward of their own making."""
    import torch

    found = [
        value
        for name, value in list(vars(module).items())
        if isinstance(value, type)
        and issubclass(value, torch.nn.Module)
        and (value.__module__, value.__qualname__) == (module.__name__, name)
        and _LOOKS_LIKE_ONE.fullmatch(name)
        and not _IS_ANOTHER.fullmatch(name)
    ]
    return [cls for cls in found if not str(getattr(cls.forward, "__module__", "")).startswith("torch.")]


def examine(module: ModuleType) -> Mapping[type, tuple[NormFormula, ...] | str]:
    """The formulas of each class of a module that looks like a norm, or why it is left as it is."""
    candidates = classes(module)
    if not candidates:
        return {}
    from llm_adapt.frameworks.transformers.norm_formulas import recognise
    from llm_adapt.frameworks.transformers.probe import NotRecognised, undisturbed

    found: dict[type, tuple[NormFormula, ...] | str] = {}
    for cls in candidates:
        try:
            with undisturbed():
                found[cls] = recognise(cls)
        except NotRecognised as reason:
            found[cls] = str(reason)
        except Exception as error:  # noqa: BLE001 - foreign code is tried out: said, and the class is left alone
            found[cls] = f"trying it raised {type(error).__name__}: {error}"
    return found


def replacement(cls: Any, formulas: tuple[NormFormula, ...], told: Callable[[], None]) -> Callable[..., Any]:
    """The class's forward with the op in it; what the formulas do not cover goes to the original.

    It holds no state, and torch.compile and torch.export trace it.
    """
    import torch

    from llm_adapt.frameworks.transformers.norm_candidates import forward_of
    from llm_adapt.frameworks.transformers.probe import parameters_of, written
    from llm_adapt.ops.layer_norm import layer_norm
    from llm_adapt.ops.rms_norm import rms_norm

    original = forward_of(cls)
    instance, x = (parameter.name for parameter in parameters_of(original))
    names: dict[str, Any] = {
        "_class": cls, "_Tensor": torch.Tensor, "_rms_norm": rms_norm, "_layer_norm": layer_norm,
        "_is_autocast": torch.is_autocast_enabled, "_told": told,
    }  # fmt: skip
    lines = []
    for number, formula in enumerate(formulas):
        lines.append(f"if {' and '.join(_conditions(cls, formula, instance, x, names, number))}:")
        lines.append(f"    return {_call(formula, x)}")
    lines.append("_told()")
    lines.append(f"return _original({instance}, {x})")
    forward = written("\n".join(lines), "forward", names, original)
    forward._llm_adapt_formulas = formulas  # type: ignore[attr-defined]
    return forward


def _conditions(
    cls: Any, formula: NormFormula, instance: str, x: str, names: dict[str, Any], number: int
) -> Iterator[str]:
    """What must hold for an instance, and a call, for a formula to be what the original computes."""
    yield f"isinstance({x}, _Tensor)"  # torch.fx hands over proxies
    if formula.methods:  # of a subclass, only what this forward does not go through may differ
        same = []
        for method in formula.methods:
            names[f"_{number}_{method}"] = getattr(cls, method)
            same.append(f"type({instance}).{method} is _{number}_{method}")
        yield f"(type({instance}) is _class or {' and '.join(same)})"
    for name, value in formula.flags:
        is_constant = value is None or isinstance(value, bool)
        yield f"{instance}.{name} {'is' if is_constant else '=='} {value!r}"
    for local, name in (("_weight", formula.weight), ("_bias", formula.bias)):
        if name:
            yield f"({local} := {instance}.{name}) is not None and {local}.ndim == 1"
    if formula.weight and not formula.is_mixed:
        yield f"{x}.dtype == _weight.dtype{' == _bias.dtype' if formula.bias else ''}"
    if not formula.weight:
        for name in formula.sizes:
            yield f"{instance}.{name} in ({x}.shape[-1], ({x}.shape[-1],))"
    if isinstance(formula.eps, str):
        yield f"(_eps := {instance}.{formula.eps}) is not None"
    if formula.casts:
        yield f"({x}.is_meta or not _is_autocast({x}.device.type))"  # torch knows no autocast of meta


def _call(formula: NormFormula, x: str) -> str:
    arguments = [x, "_weight" if formula.weight else "None"]
    if formula.op == "layer_norm":
        arguments.append("_bias" if formula.bias else "None")
    arguments.append("_eps" if isinstance(formula.eps, str) else repr(formula.eps))
    if formula.weight:
        arguments += [repr(formula.form), repr(formula.result_dtype)]
    return f"_{formula.op}({', '.join(arguments)})"
