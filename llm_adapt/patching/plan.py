"""Plan: resolve every row, refuse what does not fit, and only then write; remember how to undo exactly."""

from __future__ import annotations

import itertools
import logging
import sys
import threading
import weakref
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import FunctionType, ModuleType
from typing import Any, Literal, NamedTuple

from llm_adapt.errors import PatchError
from llm_adapt.patching.claims import check_places, check_rows
from llm_adapt.patching.fingerprint import fingerprint_object
from llm_adapt.patching.holders import holders
from llm_adapt.patching.import_hook import ImportHook, is_missing, wait_for_begun_imports, wait_for_import
from llm_adapt.patching.journal import ABSENT, Journal
from llm_adapt.patching.loans import Lender
from llm_adapt.patching.places import MissingTarget, Place, find, like, missing, plain
from llm_adapt.patching.rebinding import Stuck, Swap, in_scope, rebind
from llm_adapt.patching.rows import Entry, Loan, Patch, PlanItem, Row, Survey
from llm_adapt.patching.surveys import Surveys
from llm_adapt.patching.writes import Write, prepare

__all__ = ["Outcome", "Plan"]

log = logging.getLogger("llm_adapt")
# Replacements of plans that were undone. Code that was compiled with them keeps them; that is no copy of an original.
_former: weakref.WeakSet[Any] = weakref.WeakSet()


class Outcome(NamedTuple):
    """What became of one row. `detail` is the reason of a skip, or what could not be rebound."""

    row: PlanItem
    status: Literal["applied", "waiting", "unneeded", "skipped", "stale"]
    detail: str = ""


class Plan:
    """Rows of one patch(): applied now for modules that are imported, and at import for the others.

    Args:
        rows: all rows; two of one target are refused.
        strict: a skip or a stale copy becomes an error.
        before_import: module -> called with its name when it is about to be imported; may raise.

    Raises:
        PatchError: two rows claim one target.
    """

    def __init__(
        self,
        rows: Iterable[PlanItem],
        strict: bool = False,
        before_import: Mapping[str, Callable[[str], None]] | None = None,
    ) -> None:
        rows = list(rows)
        self.rows: list[Row] = [row for row in rows if not isinstance(row, Survey)]
        self.strict = strict
        check_rows(self.rows)
        self._surveys = Surveys(row for row in rows if isinstance(row, Survey))
        self._by_survey: list[Patch | Entry] = []  # the rows that surveys found
        self._by_module: dict[str, list[Row]] = {}
        for row in self.rows:
            self._by_module.setdefault(row.module, []).append(row)
        self._before = dict(before_import or {})
        self._outcomes: dict[PlanItem, Outcome] = {}
        self._journal = Journal()
        self._written: dict[Row, Write] = {}
        self._new: dict[int, Any] = {}  # every object that was written, by id
        self._stands_for: dict[int, Swap | None] = {}  # new objects by id; None: for two originals, so for neither
        self._modules_before: frozenset[str] = frozenset()
        self._known_before: dict[str, frozenset[str]] = {}  # module that is being surveyed -> those imported before it
        self._lender = Lender()
        self._hook = ImportHook(
            {*self._by_module, *self._before},
            after=self._on_import,
            before=self._on_creation,
            around=self._lend,
            covers=self._surveys.cover,
        )
        self._is_active = False
        self._lock = threading.RLock()  # never held while waiting for an import

    def apply(self) -> None:
        """Write every row whose module is imported, and wait for the others; all or nothing.

        Raises:
            PatchError: a target is missing, or a fingerprint is refused; everything written is undone first.
        """
        self._modules_before = frozenset(sys.modules)
        self._is_active = True
        self._hook.install()  # first, so that what another thread imports meanwhile is not missed
        try:
            wait_for_begun_imports(self._by_module)
            loaded = [name for name in self._by_module if sys.modules.get(name) is not None]
            surveyed = [name for name in list(sys.modules) if self._surveys.cover(name)]
            for name in (*loaded, *surveyed):
                wait_for_import(name)
            found = [row for name in surveyed for row in self._survey(name, is_new=False)]
            with self._lock:
                self._write([*(row for name in loaded for row in self._by_module[name]), *found], is_late=True)
        except BaseException:
            self.undo()
            raise

    def undo(self) -> list[str]:
        """Put everything back, last write first; a second call does nothing.

        Returns:
            One line, also logged as a warning, for everything that could not be put back.
        """
        self._hook.remove()
        with self._lock:
            self._is_active = False
            lines = self._journal.reverse()
            # Copies of the replacements, taken while they were in place, also by parts of torch imported since.
            known = [swap for swap in self._stands_for.values() if swap is not None and swap.original is not ABSENT]
            back = [Swap(swap.new, swap.original, swap.row) for swap in known]
            since = {name for name in sys.modules.keys() - self._modules_before if name[:9] != "llm_adapt"}
            stuck = rebind(back, Journal(), also=since)
            lines += [f"{item.row.target} stays patched in a copy: {item.where}" for item in stuck]
            _former.update(new for new in self._new.values() if isinstance(new, (FunctionType, type)))
            for memory in (self._written, self._new, self._stands_for):
                memory.clear()
        for line in lines:
            log.warning("%s", line)
        return lines

    def outcomes(self) -> list[Outcome]:
        """What has become of every row so far, in the order of the rows."""
        known = [self._outcomes.get(row) or _whereabouts(row) for row in self.rows]
        return known + [Outcome(*told) for told in self._surveys.outcomes()]

    def _on_creation(self, module: str) -> None:
        if self._is_active and module in self._before:
            self._before[module](module)

    def _lend(self, module: str) -> AbstractContextManager[None]:
        if self._surveys.cover(module):
            self._known_before[module] = frozenset(sys.modules)
        loans = [row for row in self._by_module.get(module, ()) if isinstance(row, Loan)]
        return self._lender.lending(module, loans if self._is_active else [], self._on_loan)

    def _on_loan(self, loan: Loan, is_made: bool, detail: str) -> None:
        self._note(Outcome(loan, "applied" if is_made else "unneeded", detail))

    def _on_import(self, module: str) -> None:
        found = self._survey(module, is_new=True)
        # What a survey found is new: only what was imported meanwhile can have a copy. A search in all that is
        # imported would take longer than the import.
        since = sys.modules.keys() - self._known_before.pop(module, frozenset()) | {module}
        with self._lock:
            if self._is_active and sys.modules.get(module) is not None:
                self._write(self._by_module.get(module, []), is_late=False)
                self._write(found, is_late=False, within=since)

    def _survey(self, module: str, is_new: bool) -> list[Patch | Entry]:
        """The rows that surveys find in a module, known from now on. Holds no lock: finding may import."""
        found, problems = self._surveys.look(module, is_new)
        for problem in problems:
            self._complain(problem)
        with self._lock:
            targets = {row.target for row in found}
            earlier = {row for row in self._by_survey if row.target in targets}  # its module was imported anew
            self._by_survey += found
            self.rows = [*(row for row in self.rows if row not in earlier), *found]
            for row in earlier:
                write = self._written.pop(row, None)
                if write is not None and isinstance(write.place.owner, ModuleType):
                    self._journal.forget(write.slot)  # as in _write
            check_rows(self.rows)
        return found

    def _write(self, rows: Sequence[Row], is_late: bool, within: Container[str] | None = None) -> None:
        """Check every row, then write them all, or none.

        Args:
            is_late: the modules were imported before the patch, and whoever asked has been given the originals.
            within: the only modules that may hold copies of the originals; None = all.
        """
        resolved = [(row, place) for row in rows if not isinstance(row, Loan) and (place := self._resolve(row))]
        check_places([*((row, write.place) for row, write in self._written.items()), *resolved])
        writes = [prepare(row, place) for row, place in resolved]
        mark = len(self._journal)
        try:
            for write in writes:
                self._put(write)
            swaps = [write.swap for write in writes if write.has_copies]
            # Generators, since the search for holders would find a list of originals.
            originals = (write.swap.original for write in writes if in_scope(write.row.module))
            stuck = rebind(swaps, self._journal, ours=self._new, roots=originals, within=within)
            if is_late:
                memory = (part for act in self._journal.acts for part in (act.old, *act.slot))
                stuck += holders(swaps, own=itertools.chain(self._new.values(), memory, _former))
            for row, _ in resolved:
                self._note(_result(row, stuck))
        except BaseException:
            self._journal.reverse(down_to=mark)
            raise
        for write in writes:
            earlier = self._written.get(write.row)
            if earlier is not None and isinstance(write.row, Patch) and earlier.place.owner is write.place.owner:
                self._journal.forget(earlier.slot)  # the module was reloaded: its first original is gone for good
            self._written[write.row] = write

    def _put(self, write: Write) -> None:
        name = id(write.swap.new)
        self._new[name] = write.swap.new
        if write.is_new or name in self._stands_for:
            known = self._stands_for.setdefault(name, write.swap)
            if known is None or known.original is not write.swap.original:
                self._stands_for[name] = None
        try:
            self._journal.write(write.slot, write.old, write.new, write.row.target)
        except (AttributeError, TypeError) as error:
            raise PatchError(f"{write.row.target} was asked; it cannot be set: {error}.") from error

    def _resolve(self, row: Patch | Entry) -> Place | None:
        """Where the row writes; None when it is written there already, or skipped."""
        try:
            place = find(row)
            if place.original is ABSENT and (isinstance(row, Entry) or row.kind != "add"):
                raise missing(row, place.owner, place.name)
        except MissingTarget as error:
            if isinstance(row, Entry) or not row.optional:
                raise
            self._note(Outcome(row, "skipped", str(error)))
            return None
        if row in self._written and self._written[row].stands(place):
            return None
        if isinstance(row, Entry):
            return place
        # A module that was imported after the patch copied the replacement; without the patch, the original.
        swap = self._stands_for.get(id(plain(place.original)))
        if swap is not None:
            place = place._replace(original=like(place.original, swap.original))
        return place if place.original is ABSENT or self._fits(row, place) else None

    def _fits(self, row: Patch, place: Place) -> bool:
        if not row.fingerprints:
            return True
        found = fingerprint_object(plain(place.original))
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

    def _note(self, outcome: Outcome) -> None:
        self._outcomes[outcome.row] = outcome
        if outcome.status in ("skipped", "stale"):
            self._complain(f"{outcome.row.target}: {outcome.detail}")

    def _complain(self, text: str) -> None:
        if self.strict:
            raise PatchError(f"{text} (strict mode).")
        log.warning("%s", text)


def _result(row: Row, stuck: list[Stuck]) -> Outcome:
    places = dict.fromkeys(item.where for item in stuck if item.row is row) if stuck else ()
    if places:
        return Outcome(row, "stale", f"replaced, and these copies keep the original: {'; '.join(places)}")
    return Outcome(row, "applied")


def _whereabouts(row: Row) -> Outcome:
    if is_missing(row.module):
        return Outcome(row, "skipped", f"{row.module} does not exist in the installed version")
    return Outcome(row, "waiting", f"{row.module} is not imported yet")
