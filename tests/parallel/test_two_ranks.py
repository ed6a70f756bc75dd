"""torch.distributed as CUDA scripts use it, on two real ranks over gloo."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.multiprocess
SCRIPT = Path(__file__).with_name("two_ranks.py")
ROOT = SCRIPT.parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What both ranks found; the script knows nothing of llm_adapt."""
    folder = tmp_path_factory.mktemp("found")
    command = [sys.executable, "-m", "llm_adapt.cli", "run", "--device", "cpu", "--nproc", "2", str(SCRIPT)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FOUND": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


def test_nccl_is_gloo_and_every_rank_has_its_device(found):
    """A hybrid backend with nccl runs on gloo, and each rank keeps the ordinal that it set."""
    assert [item["backend"] for item in found] == ["cpu:gloo", "cpu:gloo"]
    assert [item["device"] for item in found] == [0, 1]


def test_requests_for_one_set_of_ranks_share_one_group(found):
    """Eight requests for the same ranks make one group, and no eight sets of threads."""
    for item in found:
        assert item["distinct groups"] == 1
        assert item["threads for 8 groups"] <= 8
        assert item["own group"]
        assert item["other's group"]


def test_premul_sum(found):
    """PREMUL_SUM multiplies before it sums and leaves the input of reduce_scatter alone."""
    for item in found:
        assert item["premul all_reduce"] == [1.5] * 4
        assert item["premul reduce_scatter"] == [6.0] * 2
        assert item["input kept"]


def test_flat_collectives_and_float8(found):
    """Flat collectives take any shape of the right size by keyword, and float8 tensors move."""
    for item in found:
        assert item["gather"] == [[1.0] * 4, [2.0] * 4]
        assert item["float8"] == [1.0] * 4 + [2.0] * 4
        assert item["average"] == [1.5] * 4


def test_ddp_and_fsdp2_give_the_gradient_of_the_whole_batch(found):
    """DDP with device_ids and FSDP2 on a cuda mesh give the gradient of the whole batch."""
    for item in found:
        assert item["ddp gradient"]
        assert item["fsdp2 gradient"]
