"""Rows: how a target is written."""

from __future__ import annotations

import pytest

from llm_adapt.errors import PatchError
from llm_adapt.patching import Entry, Loan, Patch, split_target


def test_a_target_is_a_module_a_colon_and_a_name() -> None:
    """The colon separates what is imported from what is looked up."""
    assert split_target("package.module:Class.attribute") == ("package.module", "Class.attribute")
    row = Patch("package.module:Class.attribute", None, "why")
    assert (row.module, row.name) == ("package.module", "Class.attribute")


@pytest.mark.parametrize("target", ["package.module.name", "module:", ":name", "a:b:c", ""])
def test_any_other_target_is_refused(target: str) -> None:
    """A target without exactly one colon between two texts is an error that shows how it is written."""
    with pytest.raises(PatchError, match=r"was asked; a target is written 'package\.module:Class\.attribute'"):
        split_target(target)


def test_rows_are_told_apart_by_identity() -> None:
    """Two rows with the same content are two rows, and any row can be a key."""
    for kind in (lambda: Patch("m:f", [], "why"), lambda: Entry("m:d", {}, "why"), lambda: Loan("m:p", dict, "why")):
        first, second = kind(), kind()
        assert len({first: 1, second: 2}) == 2
