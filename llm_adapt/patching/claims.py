"""Claims: two rows may not want the same thing; refused before anything is written."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from llm_adapt.errors import PatchError
from llm_adapt.patching.places import Place
from llm_adapt.patching.rows import Entry, Loan, Patch, Row

__all__ = ["check_places", "check_rows"]


def check_rows(rows: Iterable[Row]) -> None:
    """Compare the targets as they are written.

    Raises:
        PatchError: two rows have one target, one is replaced whole while the other changes a part of it, or a
            loan is not of a top-level package.
    """
    claims: dict[Any, Row] = {}
    for row in rows:
        claim: Any = row.target
        if isinstance(row, Entry):
            claim = (row.target, "key", id(row) if row.key is None else row.key)
        elif isinstance(row, Loan):
            claim = (row.target, "loan")
            if "." in row.name:
                raise PatchError(f"{row.target} was asked as a loan; lend a top-level package, with its submodules.")
        if claim in claims:
            raise _conflict(claims[claim], row)
        claims[claim] = row
    for row in claims.values():
        for whole in _wholes(row):
            if whole in claims:
                raise _conflict(claims[whole], row)


def _wholes(row: Row) -> list[str]:
    """Targets of which this row changes a part: the class of a method, the dict of an entry."""
    found = [row.target] if isinstance(row, Entry) else []
    whole = row.target.rpartition(".")[0]
    while ":" in whole:
        found.append(whole)
        whole = whole.rpartition(".")[0]
    return found


def check_places(resolved: Iterable[tuple[Row, Place]]) -> None:
    """Compare the places that targets lead to: a class may be reached through two modules.

    Raises:
        PatchError: two rows lead to one place.
    """
    claims: dict[tuple[int, str], Row] = {}
    for row, place in resolved:
        if isinstance(row, Patch) and claims.setdefault((id(place.owner), place.name), row) is not row:
            raise _conflict(claims[id(place.owner), place.name], row)


def _conflict(first: Row, second: Row) -> PatchError:
    targets = first.target if first.target == second.target else f"{first.target} and {second.target}, one place"
    return PatchError(f"Two rows claim {targets}: '{first.reason}' and '{second.reason}'. Remove one of them.")
