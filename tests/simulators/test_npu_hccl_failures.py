"""What goes wrong between ranks of the simulated HCCL is an error that names call, communicator and ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from hccl_ranks import outcomes, run
from test_npu_hccl import checks_of

pytestmark = pytest.mark.multiprocess
TIMEOUTS = {"HCCL_EXEC_TIMEOUT": "3", "HCCL_CONNECT_TIMEOUT": "3", "HCCL_BUFFSIZE": "64"}
MISMATCHES = checks_of("hccl_mismatches")
NO_TEAR_DOWN = {"TORCH_HCCL_ASYNC_ERROR_HANDLING": "0"}


@pytest.fixture(scope="module")
def mismatches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Outcome of every mismatch on two ranks."""
    folder = tmp_path_factory.mktemp("mismatches")
    return outcomes("hccl_mismatches", MISMATCHES, 2, folder, TIMEOUTS | NO_TEAR_DOWN)


@pytest.mark.parametrize("name", MISMATCHES)
def test_mismatch(mismatches: dict[str, str], name: str) -> None:
    """Each check of hccl_mismatches.py: the error says what was called where."""
    assert mismatches[name] == "", mismatches[name]


def test_the_watchdog_hears_of_it(tmp_path: Path) -> None:
    """A script that does not wait for its collectives is ended by torch_npu's watchdog, with both calls named."""
    for ended in run("hccl_endings", ["other_order"], 2, tmp_path, TIMEOUTS):
        assert ended.status != 0
        assert "rank 0 is in all_reduce #1 (4 x fp32, sum)" in ended.text
        assert "rank 1 is in all_gather #1 (4 x fp32)" in ended.text
        assert "slept well" not in ended.text


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    """A rank that dies is named at once, long before the timeout."""
    alive, dead = run("hccl_endings", ["dead"], 2, tmp_path, {"HCCL_EXEC_TIMEOUT": "100"} | NO_TEAR_DOWN)
    assert (alive.status, dead.status) == (1, 3)
    assert "all_reduce #1 (4 x fp32, sum) on communicator" in alive.text
    assert "rank 1 closed its connection: its process ended" in alive.text


def test_a_rank_that_never_joins_is_named(tmp_path: Path) -> None:
    """Setting a communicator up ends after HCCL_CONNECT_TIMEOUT with the ranks that did not come."""
    waited, _ = run("hccl_endings", ["nobody_comes"], 2, tmp_path, TIMEOUTS)
    assert waited.status == 1
    assert "rank 0 of 2 waited 3 s (HCCL_CONNECT_TIMEOUT)" in waited.text
    assert "these ranks did not come: 1" in waited.text


def test_buffers_need_room(tmp_path: Path) -> None:
    """Buffers that do not fit into the device's memory are torch_npu's OutOfMemoryError."""
    (ended,) = run("hccl_endings", ["first_call"], 1, tmp_path, {"HCCL_BUFFSIZE": "200", "NPU_SIM_HBM_GB": "0.3"})
    assert ended.status == 1
    assert "OutOfMemoryError" in ended.text
    assert "419430400 bytes" in ended.text


def test_rank_tables_are_not_modelled(tmp_path: Path) -> None:
    """A RANK_TABLE_FILE, which torch_npu would quietly go without, is refused by name."""
    table = tmp_path / "table.json"
    table.write_text("{}", encoding="utf-8")
    (ended,) = run("hccl_endings", ["first_call"], 1, tmp_path, {"RANK_TABLE_FILE": str(table)})
    assert ended.status != 0
    assert "HcclCommInitClusterInfoConfig" in ended.text


@pytest.mark.parametrize("value", ["soon", "-1"])
def test_a_timeout_must_be_a_number(tmp_path: Path, value: str) -> None:
    """HCCL_CONNECT_TIMEOUT that is no number of seconds is refused, with the variable's name."""
    (ended,) = run("hccl_endings", ["first_call"], 1, tmp_path, {"HCCL_CONNECT_TIMEOUT": value})
    assert ended.status == 1
    assert f'HCCL_CONNECT_TIMEOUT is "{value}"' in ended.text


def test_the_end_of_a_process_is_not_held_up(tmp_path: Path) -> None:
    """A script that fails during a collective ends soon, without destroying anything, and leaves no file."""
    before = set(os.listdir("/dev/shm"))
    started = time.monotonic()
    first, second = run("hccl_endings", ["ends_in_the_middle"], 2, tmp_path, {"HCCL_EXEC_TIMEOUT": "100"})
    assert time.monotonic() - started < 60
    assert (first.status, second.status) == (1, 0)
    assert "the script's own error" in first.text
    left = {name for name in set(os.listdir("/dev/shm")) - before if "npusim" in name or "hccl" in name}
    assert left == set()
