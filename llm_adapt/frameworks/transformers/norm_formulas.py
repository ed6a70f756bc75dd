"""Which formula a class of norms computes: the forms of rms_norm and layer_norm, told apart by their numbers.

x [..., H] = hidden states, weight and bias [H]; a flag is an attribute that changes what forward does.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from llm_adapt.frameworks.transformers.norm_candidates import OTHER_SIZE, SIZE, Candidate, flips
from llm_adapt.frameworks.transformers.probe import (
    NotRecognised,
    draw,
    gradients,
    is_close,
    only_close_one,
    share_apart,
)
from llm_adapt.ops.layer_norm import layer_norm
from llm_adapt.ops.rms_norm import rms_norm

__all__ = ["NormFormula", "recognise", "reference"]

_OPS: dict[str, Any] = {"rms_norm": rms_norm, "layer_norm": layer_norm}
_ORDERS = {
    ("rms_norm", "standard"): ("standard", "cast_first"),
    ("rms_norm", "one_plus"): ("one_plus", "one_plus_rounded"),
    ("layer_norm", "standard"): ("standard",),
    ("layer_norm", "one_plus"): ("one_plus", "one_plus_rounded"),
}
_CONSTANTS = (1e-5, 1e-6, 1e-8, 1e-12)  # what eps is where no attribute holds it
_SHAPES = ((5, SIZE), (2, 3, 2, SIZE), (3, OTHER_SIZE), (2, 3, OTHER_SIZE), (1, SIZE))


@dataclass(frozen=True)
class NormFormula:
    """One formula of a class, and the instances for which it holds.

    Attributes:
        op, form, result_dtype: the op and its options.
        weight, bias: attributes of the instance, "" = none.
        eps: attribute that holds it, or a constant.
        flags: attribute -> the value for which this holds.
        sizes: attributes that hold H, or (H,).
        methods: attributes of the class that forward goes through; a subclass may override one.
        is_mixed: it also holds where x and weight differ in dtype.
        casts: under autocast the original does something else.
    """

    op: str
    form: str
    result_dtype: str = "x"
    weight: str = ""
    bias: str = ""
    eps: str | float = ""
    flags: tuple[tuple[str, Any], ...] = ()
    sizes: tuple[str, ...] = ()
    methods: tuple[str, ...] = ()
    is_mixed: bool = False
    casts: bool = False

    @property
    def family(self) -> str:
        """The formula in a few words."""
        parts = [self.op, self.form if self.weight else "no weight", *(["bias"] if self.bias else [])]
        if self.weight:
            parts.append(f"result dtype {self.result_dtype}" if self.is_mixed else "x and weight of one dtype")
        return ", ".join(parts)


class _Rows(NamedTuple):
    """Rows that a class is tried on."""

    sizes: tuple[int, ...]
    x_dtype: torch.dtype = torch.float32
    vector_dtype: torch.dtype = torch.float32
    scale: float = 1.0
    eps: float = 0.03

    @property
    def x(self) -> torch.Tensor:
        return _scaled(self.sizes, self.x_dtype, self.scale)

    def vectors(self, tensors: list[str]) -> dict[str, torch.Tensor]:
        """Values for the tensors of an instance: nothing that a formula could hide behind, as ones would be."""
        return {name: draw(20 + i, self.sizes[-1], dtype=self.vector_dtype) for i, name in enumerate(tensors)}


@functools.cache
def _scaled(sizes: tuple[int, ...], dtype: torch.dtype, scale: float) -> torch.Tensor:
    return (draw(2, *sizes) * scale).to(dtype)


def reference(formula: NormFormula, x: torch.Tensor, eps: float, **vectors: torch.Tensor | None) -> torch.Tensor:
    """What the op's reference makes of x, weight and bias."""
    given = {name: vector for name, vector in vectors.items() if vector is not None}
    options = {"form": formula.form, "result_dtype": formula.result_dtype}
    result: torch.Tensor = _OPS[formula.op].op.reference(x, eps=eps, **given, **options)
    return result


@functools.lru_cache(maxsize=1024)
def _expected(op: str, form: str, result: str, places: tuple[int, int], rows: _Rows, is_exact: bool) -> torch.Tensor:
    """The reference on rows, in float64 or as it rounds. places: which of the tensors are weight and bias, -1 none."""
    x, vectors = rows.x, list(rows.vectors(["", "b"]).values())
    weight, bias = (None if place < 0 else vectors[place] for place in places)
    if is_exact:
        x, weight, bias = (None if t is None else t.double() for t in (x, weight, bias))  # type: ignore[assignment]
    vectors_of = {"weight": weight, **({"bias": bias} if op == "layer_norm" else {})}
    return reference(NormFormula(op, form, result), x, rows.eps, **vectors_of)


class _Trial:
    """One candidate, tried against what the formulas give."""

    def __init__(self, candidate: Candidate) -> None:
        self.candidate = candidate

    def run(self, eps: str | float, rows: _Rows) -> Any:
        """What the original makes of rows."""
        x = rows.x.clone()  # the next candidate gets the same rows, whatever this one does to its own
        vectors = {name: vector.clone() for name, vector in rows.vectors(self.candidate.tensors).items()}
        with torch.no_grad():
            y = self.candidate.run(x, self.setting(eps, rows), vectors, rows.sizes[-1])
        if x._version:
            raise NotRecognised("its forward changes its instance, or its input")
        return y

    def setting(self, eps: str | float, rows: _Rows) -> tuple[str, float]:
        """The attribute that holds eps, and its value for these rows."""
        return (eps, rows.eps) if isinstance(eps, str) else ("", 0.0)

    def expected(self, formula: NormFormula, rows: _Rows, is_exact: bool = True) -> torch.Tensor:
        """What a formula makes of them."""
        tensors = self.candidate.tensors
        places = tuple(tensors.index(name) if name else -1 for name in (formula.weight, formula.bias))
        return _expected(formula.op, formula.form, formula.result_dtype, places, rows, is_exact)  # type: ignore[arg-type]

    def kinds(self) -> Iterator[NormFormula]:
        """Formulas that are told apart in float32."""
        tensors = self.candidate.tensors
        named = [*tensors, "", ""][: max(len(tensors), 2)]
        for op, form in [key for key in _ORDERS if tensors or key[1] == "standard"]:
            for weight, bias in sorted({(*named,), (*named[::-1],)}) if len(named) == 2 else ():
                if (weight or not tensors) and (op == "layer_norm" or not bias):
                    yield NormFormula(op, form, weight=weight, bias=bias)

    def kind(self) -> NormFormula:
        """The formula in float32, and where its eps is: from rows for which eps matters much."""
        numbers: list[str | float] = [*self.candidate.numbers]
        found = [kind for eps in numbers or _CONSTANTS for kind in self.kinds_with(eps)]
        if len(found) != 1:
            raise NotRecognised("it computes none of the formulas" if not found else "its formula is ambiguous")
        return found[0]

    def kinds_with(self, eps: str | float) -> list[NormFormula]:
        """The formulas in float32, if this is eps."""
        if isinstance(eps, str):
            trials = [_Rows((8, SIZE), eps=value) for value in (0.5, 2.0)]
        else:
            trials = [_Rows((8, SIZE), scale=eps**0.5 * factor, eps=eps) for factor in (0.3, 1.0)]
        kinds = list(self.kinds())
        for rows in trials:
            y = self.run(eps, rows)
            kinds = [kind for kind in kinds if is_close(y, self.expected(kind, rows))]
        return [replace(kind, eps=eps) for kind in kinds]

    def with_roundings(self, kind: NormFormula) -> NormFormula:
        """The formula with the order of its roundings, and the dtype of its result where two dtypes meet.

        Raises:
            NotRecognised: in 16 bits it is none of the forms.
        """
        forms = _ORDERS[kind.op, kind.form] if kind.weight else ("standard",)
        orders = [replace(kind, form=form) for form in forms]
        fitting = set()
        for dtype in (torch.bfloat16, torch.float16):
            # Squares of these overflow in float16, and where they are rounded to bfloat16 it shows.
            rows = _Rows((4, 64, SIZE), dtype, dtype, scale=300.0, eps=_eps(kind))
            y = self.run(kind.eps, rows)
            fitting.add(only_close_one(y, {order: self.expected(order, rows, is_exact=False) for order in orders}))
        if len(fitting) != 1 or None in fitting:
            raise NotRecognised("it rounds in another order in 16 bits")
        order = fitting.pop()
        return self.with_mixed_dtypes(order) if kind.weight else order

    def with_mixed_dtypes(self, order: NormFormula) -> NormFormula:
        """The formula for x and weight of two dtypes, if it has one."""
        fitting = [replace(order, result_dtype=result, is_mixed=True) for result in ("x", "weight", "promoted")]
        for x, vectors in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)):
            rows = _Rows((4, 64, SIZE), x, vectors, eps=_eps(order))
            try:
                y = self.run(order.eps, rows)
            except NotRecognised:  # an operator that wants one dtype
                return order
            fitting = [one for one in fitting if share_apart(y, self.expected(one, rows, is_exact=False)) <= 0.02]
        return fitting[0] if len(fitting) == 1 else order

    def check_shapes(self, formula: NormFormula) -> None:
        """Raise NotRecognised where other shapes give something else, or the same call does."""
        for sizes in _SHAPES:
            rows = _Rows(sizes, eps=_eps(formula))
            if not is_close(self.run(formula.eps, rows), self.expected(formula, rows)):
                raise NotRecognised(f"it computes something else for x of {len(sizes)} axes")

    def is_cast(self, formula: NormFormula) -> bool:
        """Whether autocast changes what it computes."""
        rows = _Rows(_SHAPES[0], eps=_eps(formula))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = self.run(formula.eps, rows)
        return not is_close(found, self.expected(formula, rows))

    def check_gradients(self, formula: NormFormula) -> None:
        """Raise NotRecognised where a gradient is not that of the formula."""
        rows = _Rows((3, SIZE), eps=_eps(formula))
        names = [name for name in (formula.weight, formula.bias) if name]
        values = rows.vectors(self.candidate.tensors)
        leaves = [t.clone().requires_grad_() for t in (rows.x, *(values[name] for name in names))]
        given = dict(zip(names, leaves[1:], strict=True))
        y = self.candidate.run(leaves[0], self.setting(formula.eps, rows), given)
        mine = [leaves[0], *(self.candidate.instance._parameters[name] for name in names)]
        exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
        vectors = dict(zip(("weight", "bias"), exact[1:], strict=False))
        z = reference(replace(formula, result_dtype="x"), exact[0], rows.eps, **vectors)
        dy = draw(9, 3, SIZE)
        for found, expected in zip(gradients(y, dy, mine), gradients(z, dy.double(), exact), strict=True):
            if found is None or expected is None or not is_close(found, expected):
                raise NotRecognised("its gradient is not that of its formula")


def recognise(cls: type) -> tuple[NormFormula, ...]:
    """The formulas of a class: as it is constructed by default, and with each of its flags turned over.

    Raises:
        NotRecognised: it computes none of the formulas, or does more than compute one.
    """
    found = [_formula(Candidate(cls, {}))]
    for arguments in flips(cls):
        try:
            other = _formula(Candidate(cls, arguments))
        except NotRecognised:  # instances of that kind keep the original
            continue
        if other not in found:
            found.append(other)
    if any(_meet(a, b) for i, a in enumerate(found) for b in found[:i]):
        raise NotRecognised("a flag changes what it computes, and its instances do not tell it")
    return tuple(found)


def _eps(formula: NormFormula) -> float:
    """A value for eps: where it is a constant, that."""
    return 0.03 if isinstance(formula.eps, str) else formula.eps


def _meet(a: NormFormula, b: NormFormula) -> bool:
    """Whether one instance could fit both."""
    mine, others = dict(a.flags), dict(b.flags)
    is_told = any(name in others and others[name] != value for name, value in mine.items())
    is_absent = any(
        flags.get(name, 0) is None for one, flags in ((a, others), (b, mine)) for name in (one.weight, one.bias)
    )
    return not is_told and not is_absent


def _formula(candidate: Candidate) -> NormFormula:
    trial = _Trial(candidate)
    formula = trial.with_roundings(trial.kind())
    trial.check_shapes(formula)
    trial.check_gradients(formula)
    others = {name: value for name, value in candidate.numbers.items() if name != formula.eps}
    return replace(
        formula,
        flags=tuple(sorted((candidate.flags | others).items())),
        sizes=tuple(candidate.sizes),
        methods=tuple(candidate.methods),
        casts=candidate.casts or trial.is_cast(formula),
    )
