"""Gated MLPs of transformers: y = down(act(gate(x)) * up(x)), whatever the class and its projections are called.

A class is recognised by its numbers: its forward runs on an instance without __init__ that has tiny projections under
the names that it asks for, and is compared with the formula in float64, for several activations. A class that is
recognised gets a forward that calls the same submodules in the same order and leaves act and product to `glu`. It never
reads a weight: PEFT, bitsandbytes and tensor parallelism put other modules in the place of the projections.

Rounding: with 16 bits transformers rounds act(gate) before the product; a fused kernel rounds the product alone.
Source: Shazeer 2020, equations 5 and 6; models/*/modeling_*.py of transformers 5.23 and 5.24.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import MODEL_FILES
from llm_adapt.patching import Patch, PlanItem, Survey

__all__ = ["Form", "recognise", "rows"]

_MOST_NAMES = 10  # that such a forward speaks of
_ROLES = {2: ("packed", "down"), 3: ("packed", "down", "act"), 4: ("gate", "up", "down", "act")}
_FIXED_ROLES = ("gate", "up", "down")


class Form(NamedTuple):
    """What a forward was found to compute.

    Attributes:
        roles: gate, up, packed, down, act -> name of the submodule; without act the activation is a fixed one.
        order: names of the submodules as they are called.
        activation: of a fixed activation, its name.
        layout: of a packed projection, as `glu` calls it.
    """

    roles: dict[str, str]
    order: tuple[str, ...]
    activation: str = ""
    layout: str = "halves"

    def __str__(self) -> str:
        """The formula, with the names of the class."""
        act = self.roles.get("act", self.activation)
        gate, up = (f"{self.roles[role]}(x)" if role in self.roles else role for role in ("gate", "up"))
        packed = f" of {self.roles['packed']}(x)" if "packed" in self.roles else ""
        return f"{self.roles['down']}({act}({gate}) * {up}{packed})"


def rows(context: Context) -> list[PlanItem]:
    """One survey of all model files."""
    from llm_adapt.frameworks.transformers.activations import reporter

    tell = reporter(context.report)
    reason = "gated MLPs call glu"

    def find(module: ModuleType) -> Iterator[Patch]:
        for cls in _classes(module):
            form, doubt = recognise(cls)
            if form is not None:
                new = forward(cls, form, tell)
                yield Patch(f"{module.__name__}:{cls.__qualname__}.forward", new, f"{form}: glu", rebind=False)
            elif doubt:
                context.report.once(f"{module.__name__}:{cls.__qualname__}", "its own code", doubt)

    return [Survey(MODEL_FILES, find, reason)]


def _classes(module: ModuleType) -> Iterator[type]:
    """Classes that a module defines, with a forward of their own."""
    import torch

    for cls in list(vars(module).values()):
        is_home = isinstance(cls, type) and cls.__module__ == module.__name__ and "." not in cls.__qualname__
        if is_home and issubclass(cls, torch.nn.Module) and isinstance(vars(cls).get("forward"), FunctionType):
            yield cls


def recognise(cls: Any) -> tuple[Form | None, str]:
    """The form of a class, or None and, of one that speaks of gate and down projections, why not."""
    from llm_adapt.frameworks.transformers.mlp_probe import asked_names, computes
    from llm_adapt.frameworks.transformers.probe import NotRecognised, undisturbed

    function = vars(cls)["forward"]
    try:
        if _cannot_be(cls, function):
            return None, ""
        with undisturbed():
            names = asked_names(cls)
            for form in _forms(names):
                if computes(cls, form):
                    return form, ""
        doubt = "is not down(act(gate(x)) * up(x))"
    except NotRecognised as reason:
        doubt = str(reason)
    says_so = any(part in name for name in function.__code__.co_names for part in ("gate_", "w3", "wi_1"))
    return None, doubt if says_so and "down" in " ".join(function.__code__.co_names) else ""


def _cannot_be(cls: Any, function: FunctionType) -> bool:
    """Whether a look at its code says that it is something else: most are, and running foreign code costs more."""
    code = function.__code__
    is_plain = code.co_argcount == 2 and not code.co_kwonlyargcount and not code.co_flags & 0x0C  # *args, **kwargs
    return hasattr(function, "__wrapped__") or not is_plain or not 2 <= len(code.co_names) <= _MOST_NAMES


def _forms(names: Sequence[str]) -> Iterator[Form]:
    """Every form that a forward which calls these submodules, in this order, may have."""
    from llm_adapt.ops.activation import FUNCTIONS
    from llm_adapt.ops.glu import LAYOUTS

    order = tuple(names)
    for given in itertools.permutations(order):
        if len(order) == 3:
            fixed = dict(zip(_FIXED_ROLES, given, strict=True))
            yield from (Form(fixed, order, activation=activation) for activation in FUNCTIONS)
        roles = dict(zip(_ROLES[len(order)], given, strict=True))
        layouts = LAYOUTS if "packed" in roles else ("halves",)
        for layout in layouts:
            if "act" in roles:
                yield Form(roles, order, layout=layout)
            else:
                yield from (Form(roles, order, activation, layout) for activation in FUNCTIONS)


def forward(cls: Any, form: Form, tell: Callable[[str, str, str], None]) -> Callable[..., Any]:
    """The forward of a class of that form, with the parameter name of its own."""
    from llm_adapt.frameworks.transformers.activations import name_of
    from llm_adapt.frameworks.transformers.gates import defined
    from llm_adapt.ops.glu import glu, split

    original = vars(cls)["forward"]
    x = original.__code__.co_varnames[1]
    roles = form.roles
    act = f"self.{roles['act']}" if "act" in roles else "_fixed"
    if "packed" in roles:
        calls = [f"packed = self.{roles['packed']}({x})"]
        gated, parts = f"_glu(packed, activation=name, layout={form.layout!r})", f"_split(packed, {form.layout!r})"
        fits = ""
    else:
        calls = [f"{role} = self.{roles[role]}({x})" for role in sorted(("gate", "up"), key=_place(form))]
        gated, parts, fits = "_glu(gate, up, activation=name)", "gate, up", " and gate.dtype == up.dtype"
    lines = [
        f"name = {f'_name_of({act})' if 'act' in roles else '_fixed'}",
        *calls,
        f"if name is not None{fits}:",
        f"    return self.{roles['down']}({gated})",
        f"_tell({cls.__name__!r}, 'its own product', _why(name, {act}))",
        f"gate, up = {parts}",
        f"return self.{roles['down']}({'_function(gate)' if act == '_fixed' else f'{act}(gate)'} * up)",
    ]
    names = {"_glu": glu, "_split": split, "_name_of": name_of, "_tell": tell, "_why": _why, "_fixed": form.activation}
    source = "\n    ".join([f"def forward(self, {x}):", *lines])
    return defined(source, "forward", names | {"_function": _function(form.activation)}, original)


def _place(form: Form) -> Callable[[str], int]:
    return lambda role: form.order.index(form.roles[role])


def _function(activation: str) -> Any:
    from llm_adapt.ops.activation import FUNCTIONS

    return FUNCTIONS.get(activation)


def _why(name: str | None, act: Any) -> str:
    """Why a module that was recognised computes the formula by itself."""
    if name is not None:
        return "its projections give two dtypes"
    return f"{type(act).__name__} is no activation of glu, or has hooks"
