"""Gates of experts: y [R, I] of x [R, 2I], recognised by their numbers and computed by `glu`.

The families: act(gate) * up on halves, silu with clamped parts, and GPT-OSS's (up + 1) * gate * sigmoid(alpha * gate)
on neighbours or halves. A gate reads its numbers (limit, alpha) and its act_fn of the module at each call, and so does
what replaces it.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from llm_adapt.frameworks.transformers.activations import name_of
from llm_adapt.frameworks.transformers.probe import NotRecognised, undisturbed
from llm_adapt.ops.activation import FUNCTIONS
from llm_adapt.ops.glu import LAYOUTS, glu, split

__all__ = ["Gate", "default_gate", "defined", "gate", "recognise"]

_ALPHA, _LIMIT = 1.3, 0.7
_MOST_ASKED = 3
_ACTS: tuple[Any, ...] = (torch.nn.SiLU(), torch.nn.ReLU(), torch.nn.GELU())


class Gate(NamedTuple):
    """What a gate computes, and the attributes of the module that it reads.

    Attributes:
        layout, up_offset: as of `glu`.
        activation: a fixed activation; "" = what the attribute `act` of the module is.
        act, alpha, limit: names of attributes, "" = none.
    """

    layout: str
    up_offset: float = 0.0
    activation: str = ""
    act: str = ""
    alpha: str = ""
    limit: str = ""

    def __str__(self) -> str:
        """What `glu` is asked for."""
        parts = {"activation": self.act or self.activation, "alpha": self.alpha, "limit": self.limit}
        told = [f"{name} {value}" for name, value in parts.items() if value]
        return ", ".join([f"glu of {self.layout}", *told, *([f"up + {self.up_offset:g}"] if self.up_offset else [])])


class _Asked:
    """Stands for a module whose attributes are found out by being asked for."""

    def __init__(self, values: dict[str, Any]) -> None:
        self.values, self.asked = values, dict[str, None]()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.asked[name] = None
        return self.values.get(name, torch.nn.SiLU() if "act" in name else _LIMIT)


def recognise(cls: Any) -> Gate | None:
    """The gate of a class, None when it is none of the families."""
    function = vars(cls)["_apply_gate"]
    with undisturbed(), torch.no_grad():
        try:
            asked = _Asked({})
            _run(function, asked, _inputs()[0])
            names = list(asked.asked)
            fitting = [form for form in _forms(names) if _computes(function, form)] if len(names) <= _MOST_ASKED else []
        except NotRecognised:
            return None
    return fitting[0] if len(fitting) == 1 else None


def _forms(names: list[str]) -> Iterator[Gate]:
    """Every gate that reads these attributes of its module."""
    roles = ("act", "alpha", "limit")
    for chosen in itertools.permutations(roles, len(names)):
        given = dict(zip(chosen, names, strict=True))
        for layout, offset in itertools.product(LAYOUTS, (0.0, 1.0)):
            if "act" in given:
                if "alpha" not in given:
                    yield Gate(layout, offset, **given)
            elif "alpha" in given:
                yield Gate(layout, offset, "silu", **given)
            else:
                yield from (Gate(layout, offset, activation, **given) for activation in FUNCTIONS)


def _computes(function: Callable[..., Any], form: Gate) -> bool:
    acts = _ACTS if form.act else (None,)
    for act, x in itertools.product(acts, _inputs()):
        values = {form.act: act, form.alpha: _ALPHA, form.limit: _LIMIT}
        try:
            found = _run(function, _Asked(values), x)
        except NotRecognised:  # it asks for these attributes in other roles
            return False
        expected = _formula(form, act, x)
        if not isinstance(found, torch.Tensor) or (found.shape, found.dtype) != (expected.shape, expected.dtype):
            return False
        if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
            return False
    return True


def _formula(form: Gate, act: Any, x: torch.Tensor) -> torch.Tensor:
    left, up = split(x, form.layout)
    if form.limit:
        left, up = left.clamp(max=_LIMIT), up.clamp(-_LIMIT, _LIMIT)
    if form.alpha:
        left = left * torch.sigmoid(_ALPHA * left)
    else:
        left = act(left) if form.act else FUNCTIONS[form.activation](left)
    found: torch.Tensor = left * (up + form.up_offset)
    return found


def _inputs() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    x = torch.randn(5, 8, generator=generator, dtype=torch.float64, device="cpu")
    return [x, 20.0 * x]


def _run(function: Callable[..., Any], module: Any, x: torch.Tensor) -> Any:
    try:
        return function(module, x.clone())
    except Exception as error:  # foreign code on a module that it was not written for
        raise NotRecognised(f"raises {type(error).__name__}") from error


def gate(cls: Any, form: Gate) -> Callable[..., Any]:
    """The gate of a class as one call of `glu`; an act_fn that is none of its activations has the original."""
    original = vars(cls)["_apply_gate"]
    x = original.__code__.co_varnames[1]
    options = [f"layout={form.layout!r}", f"activation={'_name' if form.act else repr(form.activation)}"]
    options += [f"{option}=self.{name}" for option, name in (("alpha", form.alpha), ("limit", form.limit)) if name]
    options += [f"up_offset={form.up_offset!r}"] if form.up_offset else []
    lines = []
    if form.act:
        lines = [f"_name = _name_of(self.{form.act})", "if _name is None:", f"    return _original(self, {x})"]
    lines += [f"return _glu({x}, {', '.join(options)})"]
    source = "\n    ".join([f"def _apply_gate(self, {x}):", *lines])
    return defined(source, "_apply_gate", {"_glu": glu, "_name_of": name_of}, original)


def default_gate(original: Callable[..., Any], tell: Callable[[str, str, str], None]) -> Callable[..., Any]:
    """act_fn(first half) * second half."""

    def apply_gate(self: Any, gate_up_out: torch.Tensor) -> torch.Tensor:
        name: Any = name_of(self.act_fn)
        if name is None:
            tell(
                f"{type(self).__name__}: gate", "its own code", f"{type(self.act_fn).__name__} is no activation of glu"
            )
            found: torch.Tensor = original(self, gate_up_out)
            return found
        return glu(gate_up_out, activation=name)

    return apply_gate


def defined(source: str, name: str, names: dict[str, Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function from the text of its definition, documented and named as the original, which it knows as `_original`.

    What it uses is in its closure, where the search for copies of the original expects it.
    """
    inside = names | {"_original": original}
    lines = [f"def make({', '.join(inside)}):", *(f"    {line}" for line in source.splitlines()), f"    return {name}"]
    space: dict[str, Any] = {}
    exec(compile("\n".join(lines), f"<llm_adapt for {original.__module__}.{original.__qualname__}>", "exec"), space)
    return functools.wraps(original)(space["make"](**inside))
