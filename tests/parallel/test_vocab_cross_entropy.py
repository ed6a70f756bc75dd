"""Vocabulary-parallel cross entropy on two real ranks over gloo."""

from __future__ import annotations

from pathlib import Path

import pytest
import vocab_cross_entropy_checks
from on_ranks import CHECKS, outcomes

pytestmark = pytest.mark.multiprocess
SCRIPT = Path(vocab_cross_entropy_checks.__file__)
NAMES = [name for name, function in CHECKS.items() if function.__module__ == vocab_cross_entropy_checks.__name__]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check on both ranks."""
    return outcomes(SCRIPT, 2, tmp_path_factory.mktemp("vocab_cross_entropy"))


@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(found: dict[str, str], name: str) -> None:
    """Each check of vocab_cross_entropy_checks.py holds on both ranks; its docstring says what it is."""
    assert found[name] == "", found[name]


def test_every_check_says_what_it_is() -> None:
    """Every check has a sentence that reads as the specification."""
    assert NAMES
    assert all((CHECKS[name].__doc__ or "").endswith(".") for name in NAMES)
