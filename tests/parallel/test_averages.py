"""ReduceOp.AVG for libraries without it, on two real ranks."""

from __future__ import annotations

from pathlib import Path

import averages_checks
import pytest
from on_ranks import CHECKS, outcomes

pytestmark = pytest.mark.multiprocess
SCRIPT = Path(averages_checks.__file__)
NAMES = [name for name, function in CHECKS.items() if function.__module__ == averages_checks.__name__]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check on both ranks."""
    return outcomes(SCRIPT, 2, tmp_path_factory.mktemp("averages"))


@pytest.mark.parametrize("name", NAMES)
def test_on_two_ranks(found: dict[str, str], name: str) -> None:
    """Each check of averages_checks.py holds on both ranks; its docstring says what it is."""
    assert found[name] == "", found[name]
