"""RCCL of the DCU simulator on two ranks."""

from __future__ import annotations

import pytest

from tests.simulators.dcu_process import checks_of, outcomes

pytestmark = pytest.mark.multiprocess
MODULE = "dcu_rccl_checks"


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every check on both ranks."""
    return outcomes(MODULE, tmp_path_factory.mktemp("rccl"), num_ranks=2)


@pytest.mark.parametrize("name", list(checks_of(MODULE)))
def test_on_two_ranks(found: dict[str, str], name: str) -> None:
    """Each check of dcu_rccl_checks.py holds on both ranks; its docstring says what it is."""
    assert found[name] == "", found[name]
