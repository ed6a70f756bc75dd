"""Plan: resolve every row, refuse what does not fit, and only then write; remember how to undo exactly."""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib.util
import inspect
import logging
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Literal

from llm_adapt.errors import PatchError
from llm_adapt.patching.fingerprint import fingerprint_object
from llm_adapt.patching.import_hook import ImportHook
from llm_adapt.patching.rebinding import rebind
from llm_adapt.patching.rows import Entry, Loan, Patch, Row, split_target

__all__ = ["Outcome", "Plan"]

log = logging.getLogger("llm_adapt")

_ABSENT: Any = object()


@dataclass(frozen=True)
class Outcome:
    """What became of one row. `detail` is the reason of a skip, or what could not be rebound."""

    row: Row
    status: Literal["applied", "waiting", "skipped", "stale"]
    detail: str = ""


@dataclass(frozen=True)
class _Place:
    """Where a row writes: an attribute of a module or class, with what is there now."""

    owner: Any
    name: str
    original: Any  # as stored: staticmethod, classmethod, property and slots stay what they are
    is_own: bool  # False when the class inherits it, so that undo deletes instead of writing back


class Plan:
    """Rows of one patch(): applied now for modules that are imported, and at import for the others.

    Args:
        rows: all rows; two of one target are refused.
        strict: a skip or a stale copy becomes an error.
        before_import: called with the name of a module in `refused` just before its import.
        refused: modules whose import `before_import` forbids.
    """

    def __init__(
        self,
        rows: Iterable[Row],
        strict: bool = False,
        refused: Iterable[str] = (),
        before_import: Callable[[str], None] = lambda name: None,
    ) -> None:
        self.rows = list(rows)
        self.strict = strict
        self.outcomes: dict[int, Outcome] = {}
        self._undo: list[Callable[[], None]] = []
        self._check_claims()
        watched = {row.module for row in self.rows} | set(refused)
        self._hook = ImportHook(watched, after=self._on_import, before=before_import, around=self._lend)

    def _check_claims(self) -> None:
        """Refuse two rows with one target before anything is written."""
        claims: dict[Any, Row] = {}
        for row in self.rows:
            claim: Any = row.target
            if isinstance(row, Entry):
                claim = (row.target, id(row) if row.key is None else row.key)
            if claim in claims:
                raise PatchError(
                    f"Two rows claim {row.target}: '{claims[claim].reason}' and '{row.reason}'. Remove one of them."
                )
            claims[claim] = row

    def apply(self) -> None:
        """Write every row whose module is imported, and wait for the others; all or nothing.

        Raises:
            PatchError: a target is missing, or a fingerprint is refused; everything written is undone first.
        """
        loaded = [row for row in self.rows if row.module in sys.modules]
        for row in self.rows:
            self.outcomes[id(row)] = Outcome(row, "waiting", f"{row.module} is not imported yet")
        try:
            self._write(loaded)
            self._hook.install()
        except BaseException:
            self.undo()
            raise

    def undo(self) -> None:
        """Put everything back, last write first; a second call does nothing."""
        self._hook.remove()
        while self._undo:
            self._undo.pop()()

    def _on_import(self, module: str) -> None:
        self._write([row for row in self.rows if row.module == module])

    @contextlib.contextmanager
    def _lend(self, module: str) -> Iterator[None]:
        """Put lent packages into sys.modules while `module` is executed."""
        lent: dict[str, ModuleType] = {}
        for row in self.rows:
            if isinstance(row, Loan) and row.module == module:
                if importlib.util.find_spec(row.package) is None:
                    lent.update(row.make())
                    self._note(Outcome(row, "applied"))
                else:
                    self._note(Outcome(row, "skipped", f"{row.package} is installed"))
        sys.modules.update(lent)
        try:
            yield
        finally:
            for name in lent:
                sys.modules.pop(name, None)

    def _write(self, rows: list[Row]) -> None:
        rows = [row for row in rows if not isinstance(row, Loan)]  # a loan ends with the import
        resolved = [(row, self._resolve(row)) for row in rows]  # every row is checked before the first write
        swaps: list[tuple[Any, Any, str]] = []
        for row, place in resolved:
            if place is None:
                continue
            if isinstance(row, Entry):
                self._write_entry(row, place)
            else:
                new = self._write_patch(row, place)
                if row.rebind and place.original is not _ABSENT:
                    swaps.append((_plain(place.original), _plain(new), row.target))
            self._note(Outcome(row, "applied"))
        copies, stale = rebind(swaps, self._undo)
        if copies:
            log.debug("replaced %d copies that were taken before the patch", copies)
        for line in stale:
            row = next(row for row in rows if row.target in line)
            self._note(Outcome(row, "stale", line))

    def _note(self, outcome: Outcome) -> None:
        self.outcomes[id(outcome.row)] = outcome
        if outcome.status in ("skipped", "stale"):
            if self.strict:
                raise PatchError(f"{outcome.row.target}: {outcome.detail} (strict mode).")
            log.warning("%s: %s", outcome.row.target, outcome.detail)
        else:
            log.debug("%s: %s (%s)", outcome.row.target, outcome.status, outcome.row.reason)

    def _resolve(self, row: Row) -> _Place | None:
        place = _find(row)
        if isinstance(row, Entry):
            if not isinstance(place.original, (dict, list)):
                raise PatchError(f"{row.target} was asked as a dict or list; found {type(place.original).__name__}.")
            return place
        if place.original is _ABSENT:
            if row.kind == "add":
                return place
            detail = _missing(row, place)
            if not row.optional:
                raise PatchError(detail)
            self._note(Outcome(row, "skipped", detail))
            return None
        return place if self._fingerprint_fits(row, place) else None

    def _fingerprint_fits(self, row: Patch, place: _Place) -> bool:
        if not row.fingerprints:
            return True
        found = fingerprint_object(_plain(place.original))
        if found in row.fingerprints.values():
            return True
        known = ", ".join(f"{version}: {value}" for version, value in row.fingerprints.items())
        detail = (
            f"its source has changed (fingerprint {found}; known {known}), so '{row.reason}' may no longer hold; "
            f"use one of those versions or report this one"
        )
        if row.on_mismatch == "refuse":
            raise PatchError(f"{row.target}: {detail}.")
        self._note(Outcome(row, "skipped", detail))
        return False

    def _write_patch(self, row: Patch, place: _Place) -> Any:
        original = None if place.original is _ABSENT else place.original
        new = row.new(_plain(original)) if row.kind == "wrap" else row.new
        if isinstance(original, (staticmethod, classmethod)) and not isinstance(new, (staticmethod, classmethod)):
            new = type(original)(new)
        setattr(place.owner, place.name, new)
        if place.is_own:
            self._undo.append(functools.partial(setattr, place.owner, place.name, place.original))
        else:
            self._undo.append(functools.partial(delattr, place.owner, place.name))
        return new

    def _write_entry(self, row: Entry, place: _Place) -> None:
        box = place.original
        if isinstance(box, list):
            saved = list(box)
            box.append(row.value)
            if row.sort_key is not None:
                box.sort(key=row.sort_key)
            self._undo.append(functools.partial(box.__setitem__, slice(None), saved))
        elif row.key in box:
            self._undo.append(functools.partial(box.__setitem__, row.key, box[row.key]))
            box[row.key] = row.value
        else:
            self._undo.append(functools.partial(box.pop, row.key, None))
            box[row.key] = row.value


def _plain(original: Any) -> Any:
    """The function inside a staticmethod or classmethod."""
    return original.__func__ if isinstance(original, (staticmethod, classmethod)) else original


def _find(row: Row) -> _Place:
    """Look a target up without running descriptors or a module's lazy __getattr__.

    Raises:
        PatchError: something before the last name does not exist.
    """
    module, qualname = split_target(row.target)
    owner: Any = sys.modules[module]
    *parents, name = qualname.split(".")
    for parent in parents:
        step = _static(owner, parent)
        if step is _ABSENT:
            if isinstance(row, Patch) and row.optional:
                return _Place(owner, parent, _ABSENT, False)
            raise PatchError(_missing(row, _Place(owner, parent, _ABSENT, False)))
        owner = step
    is_own = name in vars(owner)
    return _Place(owner, name, _static(owner, name), is_own)


def _static(owner: Any, name: str) -> Any:
    if isinstance(owner, ModuleType):
        return vars(owner).get(name, _ABSENT)
    return inspect.getattr_static(owner, name, _ABSENT)


def _missing(row: Row, place: _Place) -> str:
    where = getattr(place.owner, "__name__", str(place.owner))
    near = difflib.get_close_matches(place.name, list(vars(place.owner)), n=3, cutoff=0.6)
    version = getattr(sys.modules[row.module.partition(".")[0]], "__version__", "of unknown version")
    hint = f"; nearest names: {', '.join(near)}" if near else ""
    written = f" (written for {row.versions})" if isinstance(row, Patch) and row.versions else ""
    return f"{row.target} does not exist: {where} ({version}) has no {place.name!r}{hint}{written}"
