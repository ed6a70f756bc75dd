"""Collectives and data-parallel training over the real ProcessGroupHCCL and the simulated HCCL."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hccl_ranks import outcomes

pytestmark = pytest.mark.multiprocess
FOLDER = Path(__file__).parent
VARIABLES = {"HCCL_BUFFSIZE": "64", "P2P_HCCL_BUFFSIZE": "8"}


def checks_of(module: str) -> list[str]:
    """Names of a module's checks, read without importing it: it needs a device."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    return [one.name for one in functions if any(getattr(by, "id", "") == "check" for by in one.decorator_list)]


COLLECTIVES, TRAINING = checks_of("hccl_checks"), checks_of("hccl_training_checks")
BY_BATCH_CALL = ["messages"]  # what P2P_HCCL_BUFFSIZE=0 sends over the group's own communicator


@pytest.fixture(scope="module")
def on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every collective on two ranks."""
    return outcomes("hccl_checks", COLLECTIVES, 2, tmp_path_factory.mktemp("two"), VARIABLES)


@pytest.fixture(scope="module")
def on_four_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every collective on four ranks."""
    return outcomes("hccl_checks", COLLECTIVES, 4, tmp_path_factory.mktemp("four"), VARIABLES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every training on two ranks."""
    return outcomes("hccl_training_checks", TRAINING, 2, tmp_path_factory.mktemp("training"), VARIABLES)


@pytest.mark.parametrize("name", COLLECTIVES)
def test_on_two_ranks(on_two_ranks: dict[str, str], name: str) -> None:
    """Each check of hccl_checks.py holds on two ranks; its docstring says what it is."""
    assert on_two_ranks[name] == "", on_two_ranks[name]


@pytest.mark.parametrize("name", COLLECTIVES)
def test_on_four_ranks(on_four_ranks: dict[str, str], name: str) -> None:
    """Each check of hccl_checks.py holds on four ranks."""
    assert on_four_ranks[name] == "", on_four_ranks[name]


@pytest.mark.parametrize("name", TRAINING)
def test_training(trained: dict[str, str], name: str) -> None:
    """Each check of hccl_training_checks.py holds on two ranks."""
    assert trained[name] == "", trained[name]


def test_messages_over_the_groups_own_communicator(tmp_path: Path) -> None:
    """With P2P_HCCL_BUFFSIZE=0 messages share the communicator of the collectives, and a batch is one call."""
    found = outcomes("hccl_checks", BY_BATCH_CALL, 2, tmp_path, {"HCCL_BUFFSIZE": "64", "P2P_HCCL_BUFFSIZE": "0"})
    assert found == dict.fromkeys(BY_BATCH_CALL, "")


def test_without_the_task_queue(tmp_path: Path) -> None:
    """With TASK_QUEUE_ENABLE=0, where the calling thread launches, the results are the same."""
    names = ["asynchronous", "coalesced"]
    assert outcomes("hccl_checks", names, 2, tmp_path, {"TASK_QUEUE_ENABLE": "0"}) == dict.fromkeys(names, "")


@pytest.mark.parametrize("module", ["hccl_checks", "hccl_training_checks", "hccl_mismatches", "hccl_endings"])
def test_every_check_says_what_it_is(module: str) -> None:
    """Every check has a sentence that reads as the specification."""
    tree = ast.parse((FOLDER / f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    assert checks_of(module)
    assert all((ast.get_docstring(one) or "").endswith(".") for one in functions)
