"""Who is told that CUDA is here: code that knows only CUDA; libraries that know the device are told the truth."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.frameworks.torch_cuda import availability

TABLE: dict[str, list[str]] = json.loads(
    resources.files(availability.__package__).joinpath("native_libraries.json").read_text(encoding="utf-8")
)
LIBRARIES = {name: devices for name, devices in TABLE.items() if name[0] != "_"}
ON_CPU = sorted(name for name, devices in LIBRARIES.items() if "cpu" in devices)
# What is asked, and the answers of code that knows CUDA only and of code that knows the CPU.
QUESTIONS: dict[str, tuple[Any, Any]] = {
    "torch.cuda.is_available()": (True, False),
    "torch.cuda.device_count()": (2, 0),
    "torch.distributed.is_nccl_available()": (True, False),
    "torch.ones(1).is_cuda": (True, False),
    "torch.ones(1).get_device()": (0, -1),
    "torch.ones(1).type()": ("torch.cuda.FloatTensor", "torch.FloatTensor"),
    "(lambda: torch.cuda.is_available())()": (True, False),
    "[torch.cuda.is_available() for _ in range(1)][0]": (True, False),
}


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize(("question", "answers"), QUESTIONS.items())
def test_the_rule(question: str, answers: tuple[Any, Any], as_module: Callable[..., Any]) -> None:
    """Every question has one rule: the top-level package of the module that asks."""
    told, truth = answers
    for module in ("__main__", "train", "megatron.core.utils", "accelerate.state", "torchvision.ops", "mytorch", ""):
        assert as_module(module, question) == told, module
    for module in ("torch", "torch.nn.functional", "deepspeed.accelerator", "bitsandbytes"):
        assert as_module(module, question) == truth, module


@pytest.mark.usefixtures("facade")
@pytest.mark.parametrize("library", sorted(LIBRARIES))
def test_a_library_on_the_cpu(library: str, as_module: Callable[..., Any]) -> None:
    """A library of the table is told the truth on the CPU exactly when the CPU is among its devices."""
    asked = as_module(f"{library}.some.module", "torch.cuda.is_available()")
    assert asked is (library not in ON_CPU)


@pytest.mark.parametrize("device", ["cpu", "npu", "mlu"])
@given(st.text(max_size=12))
def test_the_rule_is_exact(device: str, name: str) -> None:
    """Only a package of exactly that name is in the table; a name that merely begins with it is not."""
    is_told = availability.is_told_on(device)
    for library in availability.native_packages(device):
        assert not is_told(library)
        assert not is_told(f"{library}.{name}")
        if name and name[0] != ".":
            assert is_told(library + name) or (library + name).partition(".")[0] in LIBRARIES
            assert is_told(name + library) or (name + library).partition(".")[0] in LIBRARIES


@pytest.mark.parametrize(("library", "devices"), sorted(LIBRARIES.items()))
def test_the_rule_on_vendors(library: str, devices: list[str]) -> None:
    """On an NPU or MLU a library is told the truth exactly when its own code knows that device."""
    for device in ("npu", "mlu"):
        assert availability.is_told_on(device)(f"{library}.utils") is (device not in devices)


def test_every_library_is_documented() -> None:
    """docs/native_libraries.md has a row for every library of the table, with the same devices."""
    page = Path(__file__).parents[3] / "docs" / "native_libraries.md"
    rows = dict(re.findall(r"^\| `(\w+)` \| ([^|]*) \|", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert {name: [word.strip() for word in text.split(",")] for name, text in rows.items()} == LIBRARIES


def test_the_table_names_devices() -> None:
    """Every library names at least one device, and only devices that have a facade."""
    for library, devices in LIBRARIES.items():
        assert devices, library
        assert set(devices) <= {"cpu", "npu", "mlu"}, library
        assert library.isidentifier()


@pytest.mark.usefixtures("facade")
def test_torch_chooses_by_the_truth() -> None:
    """torch's own code is not told that host memory is CUDA's: it would hand it to numba and NCCL as such."""
    x = torch.ones(2)
    assert not hasattr(x, "__cuda_array_interface__")
    assert torch.typename(x) == "torch.FloatTensor"
    assert torch._utils._get_available_device_type() is None


@pytest.mark.usefixtures("facade")
def test_properties_are_asked_by_the_truth(as_module: Callable[..., Any]) -> None:
    """Properties of a device are the script's to see; torch, which takes them for a card's, gets torch's own error."""
    assert as_module("train", "torch.cuda.get_device_properties(0)").major == 8
    with pytest.raises(AssertionError, match="Invalid device id|CUDA"):
        as_module("torch._inductor.codecache", "torch.cuda.get_device_properties(0)")
    from torch._inductor.codecache import CacheBase

    # What every mode of torch.compile that tunes kernels asks first, with the flag of compilation on.
    for is_compiling in (False, True):
        torch.compiler._is_compiling_flag, before = is_compiling, torch.compiler._is_compiling_flag
        try:
            assert list(CacheBase.get_system.__wrapped__()) == ["hash"]
            for question in ("torch.cuda.is_available()", "torch.cuda.device_count()"):
                told, truth = QUESTIONS[question]
                assert as_module("train", question) == told
                assert as_module("torch._inductor.utils", question) == truth
        finally:
            torch.compiler._is_compiling_flag = before
