"""Limits of the simulated HCCL itself, below those that torch_npu checks on its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from llm_adapt.simulators import prepare

FOLDER = Path(__file__).parent
REDUCIBLE = {"int8", "int16", "int32", "int64", "fp16", "bf16", "fp32"}
MOVABLE = REDUCIBLE | {"uint8", "uint16", "uint32", "uint64", "fp64", "fp8e4m3", "fp8e5m2"}
REDUCIBLE_ON = {"Ascend910B3": REDUCIBLE, "Ascend910_9391": REDUCIBLE, "Ascend950": REDUCIBLE | {"uint64", "fp64"}}
REDUCING = ("all_reduce", "reduce", "reduce_scatter", "reduce_scatter_v")
MOVING = ("all_gather", "all_gather_v", "broadcast", "scatter", "all_to_all")


@cache
def answers(soc: str) -> dict[str, Any]:
    """What the library says on a chip."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("HCCL_")}
    command = [sys.executable, str(FOLDER / "hccl_api.py"), str(prepare("npu"))]
    done = subprocess.run(
        command, env=environment | {"NPU_SIM_SOC": soc}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("soc", REDUCIBLE_ON)
@pytest.mark.parametrize("name", REDUCING)
def test_dtypes_of_a_reduction(soc: str, name: str) -> None:
    """A reduction takes the dtypes documented for the chip; others are refused with the chip's name and a way out."""
    found = answers(soc)["calls"][name]
    assert {dtype for dtype, text in found.items() if text == ""} == REDUCIBLE_ON[soc]
    refused = {dtype: text for dtype, text in found.items() if text and dtype in MOVABLE}
    assert refused
    assert all(
        text.startswith("5: ") and f"a reduction of {dtype} was asked; on {soc}" in text
        for dtype, text in refused.items()
    )


@pytest.mark.parametrize("soc", REDUCIBLE_ON)
@pytest.mark.parametrize("name", MOVING)
def test_dtypes_of_a_copy(soc: str, name: str) -> None:
    """What only moves bytes takes every documented dtype; int128, hif8 and fp8e8m0 are not documented."""
    found = answers(soc)["calls"][name]
    assert {dtype for dtype, text in found.items() if text == ""} == MOVABLE
    assert answers(soc)["drained"] == ""


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("reduction 7", "HCCL has sum, prod, max and min"),
        ("root 1", "root 1 of 1 ranks"),
        ("reduce root 1", "root 1 of 1 ranks"),
        ("own count", "sendCount is 1, the array of counts says 2"),
        ("two dtypes", "it sends fp32 and receives int32"),
        ("null buffer", "sendBuf is null"),
        ("send to itself", "it needs a send and a recv of the same size in one batch"),
        ("send to rank 1", "rank 1 was asked; the communicator has 1 ranks"),
        ("group end alone", "no HcclGroupStart came before it"),
        ("other setting", "HcclSetConfig of setting 1 is not modelled"),
        ("after destroy", "the communicator is not alive"),
        ("destroy twice", "a communicator that is not alive"),
    ],
)
def test_misuse(what: str, says: str) -> None:
    """A call that cannot be is refused with the reason."""
    assert says in answers("Ascend910B3")["misuse"][what]


def test_destroy_is_no_misuse() -> None:
    """Destroying a communicator once succeeds."""
    assert answers("Ascend910B3")["misuse"]["destroy"] == ""
