"""Which rotation a function applies: the options of rope, told apart by numbers on tables whose columns all differ.

B batch, H heads, S positions, D head size, W = width of the tables; x = queries or keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch

from llm_adapt.frameworks.transformers.probe import (
    NotRecognised,
    Watch,
    draw,
    gradients,
    is_close,
    parameters_of,
    share_apart,
)
from llm_adapt.ops.rope import rope

__all__ = ["COLUMNS", "Call", "Rotation", "recognise"]

Compute = Literal["x", "float32", "promoted", ""]
_B, _H, _S, _D = 2, 3, 5, 16  # all different: an axis that is taken for another does not fit
_SHAPES = {"bhsd": (_B, _H, _S, _D), "bshd": (_B, _S, _H, _D), "thd": (_S, _H, _D)}
_HEADS = {"bhsd": 1, "bshd": 2, "thd": 1}
# Which columns of the tables are used, and the table that they make for rope.
COLUMNS: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]] = {
    "all": ("full", lambda table: table),
    "one for each pair": ("half", lambda table: table),
    "the first half": ("half", lambda table: table[..., : table.shape[-1] // 2]),
    "every other": ("half", lambda table: table[..., ::2]),
}
_ROLES = {"cos", "sin", "unsqueeze_dim", "position_ids"}
_TABLE_AXES = {(4, 3): (_B, _S), (4, 2): (_S,), (3, 2): (_S,)}  # axes of x and of a table -> those before its columns
_WITH_AXIS = {(4, 3): {1: "bhsd", 2: "bshd"}, (4, 2): {0: "bhsd", 1: "bshd"}, (3, 2): {1: "thd"}}


class Call(NamedTuple):
    """A kind of call: axes of x, axes of the tables, and the value of unsqueeze_dim (None = no such parameter)."""

    x: int
    table: int
    unsqueeze_dim: int | None


@dataclass(frozen=True)
class Rotation:
    """What a function does to queries and keys.

    Attributes:
        tensors: its parameters that are rotated, in their order.
        pairs, inverse: as of rope.
        columns: one of COLUMNS.
        layouts: kind of call -> layout of rope.
        is_partial: it rotates the first features of x where the tables are narrower.
        same, mixed: compute of rope where the tables have the dtype of x, and where they are float32 and x is
            narrower; "promoted" = x is widened first, and the result is wide; "" = it computes something else.
        positions: its parameter position_ids has no effect.
    """

    tensors: tuple[str, ...]
    pairs: str
    columns: str
    inverse: bool
    layouts: tuple[tuple[Call, str], ...] = ()
    is_partial: bool = False
    same: Compute = ""
    mixed: Compute = ""
    positions: bool = False

    @property
    def family(self) -> str:
        """The rotation in a few words."""
        roundings = {
            "x": "rounds each step",
            "float32": "in float32",
            "promoted": "widen x",
            "": "left to the original",
        }
        parts = [self.pairs + (" reversed" if self.inverse else ""), f"columns: {self.columns}"]
        parts += ["partial"] if self.is_partial else []
        parts.append(roundings[self.same])
        if self.mixed != self.same:
            parts.append(f"float32 tables: {roundings[self.mixed]}")
        return ", ".join(parts)


class _Case(NamedTuple):
    """Tensors to try a function on."""

    call: Call
    layout: str
    width: int = _D
    x: torch.dtype = torch.float32
    table: torch.dtype = torch.float32

    def tensors(self, count: int) -> list[torch.Tensor]:
        """Queries, and keys with fewer heads."""
        shapes = [list(_SHAPES[self.layout]) for _ in range(count)]
        for shape in shapes[1:]:
            shape[_HEADS[self.layout]] = 1
        return [draw(30 + i, *shape, dtype=self.x) for i, shape in enumerate(shapes)]

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, which are neither: each column has numbers of its own."""
        shape = (*_TABLE_AXES[self.call.x, self.call.table], self.width)
        return draw(40, *shape, dtype=self.table), draw(41, *shape, dtype=self.table)


@functools.lru_cache(maxsize=4096)
def _expected(
    case: _Case, count: int, pairs: str, columns: str, inverse: bool, compute: str, is_exact: bool
) -> list[torch.Tensor]:
    """What rope makes of a case, in float64 or as it rounds."""
    table, select = COLUMNS[columns]
    cos, sin = (select(t) for t in case.tables())
    tensors = case.tensors(count)
    if is_exact:
        cos, sin, *tensors = (t.double() for t in (cos, sin, *tensors))
    if compute == "promoted":
        tensors, compute = [x.to(cos.dtype) for x in tensors], "float32"
    options = {"layout": case.layout, "pairs": pairs, "table": table, "compute": compute, "inverse": inverse}
    return [rope.op.reference(x, cos, sin, **options) for x in tensors]  # type: ignore[attr-defined]


class _Trial:
    """One function, tried."""

    def __init__(self, function: Any) -> None:
        self.function = function
        names = {p.name: p.default for p in parameters_of(function)}
        self.tensors = tuple(name for name in names if name not in _ROLES)
        if not {"cos", "sin"} <= names.keys() or len(self.tensors) not in (1, 2):
            raise NotRecognised(f"takes ({', '.join(names)})")
        self.has_axis, self.has_positions = "unsqueeze_dim" in names, "position_ids" in names
        if self.has_positions and names["position_ids"] is not None:
            raise NotRecognised(f"takes ({', '.join(names)}), of which position_ids is no option")

    def run(self, case: _Case, **more: Any) -> list[torch.Tensor] | None:
        """What the function makes of a case; None where it raises, or returns something else."""
        # The next function gets the same numbers, whatever this one does to its own.
        *tensors, cos, sin = (t.clone() for t in (*case.tensors(len(self.tensors)), *case.tables()))
        try:
            with torch.no_grad():
                found: list[torch.Tensor] | None = self.call(case.call, tensors, cos, sin, **more)
        except Exception:  # noqa: BLE001 - the function does not take such tensors, which is an answer
            return None
        return found

    def call(self, call: Call, tensors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, **more: Any) -> Any:
        if call.unsqueeze_dim is not None:
            more["unsqueeze_dim"] = call.unsqueeze_dim
        result = self.function(**dict(zip(self.tensors, tensors, strict=True)), cos=cos, sin=sin, **more)
        if len(tensors) == 1:
            return [result]
        return list(result) if isinstance(result, tuple) and len(result) == len(tensors) else None

    def calls(self) -> Iterator[tuple[Call, str]]:
        """Kinds of call, with the layout that each would have."""
        for (x, table), axes in _WITH_AXIS.items():
            for axis, layout in axes.items():
                yield Call(x, table, axis if self.has_axis else None), layout

    def fits(self, found: list[torch.Tensor] | None, case: _Case, rotation: Rotation) -> bool:
        """Whether that is, in float32, what a rotation gives."""
        if found is None:
            return False
        key = (rotation.pairs, rotation.columns, rotation.inverse)
        expected = _expected(case, len(self.tensors), *key, "float32", is_exact=True)
        return all(is_close(y, z) for y, z in zip(found, expected, strict=True))

    def rotations(self) -> list[Rotation]:
        """The rotations that fit one kind of call, the first that any fits."""
        for call, layout in self.calls():
            for width in (_D, _D // 2):
                case = _Case(call, layout, width)
                found = self.run(case)
                fitting = [one for one in self.candidates(width) if found and self.fits(found, case, one)]
                if fitting:
                    return fitting
        return []

    def candidates(self, width: int) -> Iterator[Rotation]:
        """Rotations of all features by tables of that width."""
        for pairs in ("half", "interleaved", "interleaved_to_half"):
            for columns in COLUMNS:
                if (columns == "one for each pair") == (width == _D // 2):
                    for inverse in (False, True):
                        yield Rotation(self.tensors, pairs, columns, inverse)

    def layouts(self, rotation: Rotation) -> list[tuple[Call, str]]:
        """The kinds of call that it serves so."""
        width = _width(rotation, _D)
        cases = [_Case(call, layout, width) for call, layout in self.calls()]
        return [(case.call, case.layout) for case in cases if self.fits(self.run(case), case, rotation)]

    def compute(self, rotation: Rotation, table: torch.dtype | None) -> Compute:
        """The order of its roundings for 16-bit x; table: dtype of the tables, None = that of x."""
        call, layout = rotation.layouts[0]
        fitting: set[Compute] = {"x", "float32", "promoted"} if table else {"x", "float32"}
        for dtype in (torch.bfloat16, torch.float16):
            case = _Case(call, layout, _width(rotation, _D), dtype, table or dtype)
            found = self.run(case)
            for compute in list(fitting):
                key = (rotation.pairs, rotation.columns, rotation.inverse, compute)
                expected = _expected(case, len(self.tensors), *key, is_exact=False)
                pairs = zip(found or [], expected, strict=bool(found))
                if not found or max(share_apart(y, z) for y, z in pairs) > 0.01:
                    fitting.discard(compute)
        return fitting.pop() if len(fitting) == 1 else ""

    def ignores_positions(self, rotation: Rotation) -> bool:
        """Whether position_ids changes nothing."""
        call, layout = rotation.layouts[0]
        case = _Case(call, layout, _width(rotation, _D))
        given = [
            self.run(case, position_ids=ids) for ids in (torch.arange(_S).flip(0)[None], torch.zeros(1, _S).long())
        ]
        return all(self.fits(found, case, rotation) for found in given)

    def check(self, rotation: Rotation) -> None:
        """Raise NotRecognised for a function that does more than rotate."""
        call, layout = rotation.layouts[0]
        case, watch = _Case(call, layout, _width(rotation, _D)), Watch()
        copies = [t.clone() for t in (*case.tensors(len(self.tensors)), *case.tables())]
        with watch, torch.no_grad():
            first = self.call(call, copies[:-2], copies[-2], copies[-1])
        watch.check_steady()
        if any(t._version for t in copies):
            raise NotRecognised("it changes its input")
        with torch.autocast("cpu", dtype=torch.bfloat16):
            second = self.run(case)
        if not self.fits(first, case, rotation) or not self.fits(second, case, rotation):
            raise NotRecognised("it computes something else the second time, or under autocast")
        one_for_all = [t[:1] for t in copies[-2:]] if call.table == 3 else copies[-2:]
        alike = [torch.cat([t, t]) for t in one_for_all] if call.table == 3 else copies[-2:]
        pairs = zip(self.call(call, copies[:-2], *one_for_all), self.call(call, copies[:-2], *alike), strict=True)
        if not all(torch.equal(y, z) for y, z in pairs):
            raise NotRecognised("tables for the whole batch are something else to it")
        self.check_gradients(rotation, case)

    def check_gradients(self, rotation: Rotation, case: _Case) -> None:
        """Raise NotRecognised for a function with other gradients."""
        table, select = COLUMNS[rotation.columns]
        options = {"layout": case.layout, "pairs": rotation.pairs, "table": table, "inverse": rotation.inverse}
        cos, sin = (select(t.double()) for t in case.tables())
        leaves = [t.clone().requires_grad_() for t in case.tensors(len(self.tensors))]
        for y, x in zip(self.call(case.call, leaves, *case.tables()), leaves, strict=True):
            exact = x.detach().double().requires_grad_()
            expected = rope.op.reference(exact, cos, sin, **options)  # type: ignore[attr-defined]
            dy = draw(9, *y.shape)
            mine, other = gradients(y, dy, [x])[0], gradients(expected, dy.double(), [exact])[0]
            if mine is None or other is None or not is_close(mine, other):
                raise NotRecognised("its gradient is not that of its rotation")


def _width(rotation: Rotation, rotated: int) -> int:
    """The width of tables that rotate so many features."""
    return rotated // 2 if rotation.columns == "one for each pair" else rotated


def recognise(function: Any) -> Rotation:
    """What a function does to queries and keys.

    Raises:
        NotRecognised: it is none of the rotations of rope, or does more than rotate.
    """
    trial = _Trial(function)
    rotations = trial.rotations()
    if len(rotations) != 1:
        raise NotRecognised("its rotation is ambiguous" if rotations else "it computes none of the rotations")
    rotation = replace(rotations[0], layouts=tuple(trial.layouts(rotations[0])))
    if not rotation.layouts:
        raise NotRecognised("it does not rotate twice alike")
    partial = _Case(*rotation.layouts[0], _width(rotation, _D // 2))
    rotation = replace(
        rotation,
        is_partial=trial.fits(trial.run(partial), partial, rotation),
        same=trial.compute(rotation, None),
        mixed=trial.compute(rotation, torch.float32),
        positions=trial.has_positions and trial.ignores_positions(rotation),
    )
    if not rotation.same and not rotation.mixed:
        raise NotRecognised("it rounds in another order in 16 bits")
    trial.check(rotation)
    return rotation
