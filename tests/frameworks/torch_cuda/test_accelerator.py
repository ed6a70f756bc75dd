"""torch.accelerator beside torch.cuda: the same answers, on a device that torch does not call an accelerator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import llm_adapt
from llm_adapt.errors import DeviceError

pytestmark = pytest.mark.usefixtures("facade")


def test_the_usual_preamble() -> None:
    """What training scripts do first gives a device, an ordinal and a backend."""
    assert torch.accelerator.is_available()
    place = torch.accelerator.current_accelerator(check_available=True)
    assert torch.ones(1, device=place).is_cuda
    assert torch.accelerator.device_count() == torch.cuda.device_count() == 2
    torch.accelerator.set_device_index(1)
    assert torch.accelerator.current_device_index() == torch.cuda.current_device() == 1
    with torch.accelerator.device_index(0):
        assert torch.accelerator.current_device_index() == 0
    torch.accelerator.set_device_index("cuda:0")
    assert torch.accelerator.current_device_index() == 0
    with pytest.raises(DeviceError, match="Device ordinal 5"):
        torch.accelerator.set_device_index(5)


def test_streams_and_memory() -> None:
    """Streams and figures are those of torch.cuda."""
    stream = torch.cuda.Stream()
    torch.accelerator.set_stream(stream)
    assert torch.accelerator.current_stream() is torch.cuda.current_stream() is stream
    torch.cuda.set_stream(torch.cuda.default_stream())
    torch.accelerator.synchronize()
    torch.accelerator.synchronize(torch.device("cuda", 1))
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() >= torch.accelerator.memory_allocated() // 2 > 0
    assert torch.accelerator.memory_stats()["allocated_bytes.all.current"] > 0
    assert torch.accelerator.get_memory_info()[1] == torch.cuda.mem_get_info()[1]


def test_the_rule(as_module: Callable[..., Any]) -> None:
    """torch and libraries that know the CPU are told the truth: there is no accelerator."""
    for module in ("torch.utils.data.dataloader", "deepspeed.accelerator"):
        assert as_module(module, "torch.accelerator.is_available()") is False
        assert as_module(module, "torch.accelerator.current_accelerator()") is None
        assert as_module(module, "torch.accelerator.device_count()") == 0
    assert as_module("train", "torch.accelerator.is_available()") is True


def test_compiled_code_is_told_the_same() -> None:
    """Compiled code asks as the script does."""

    @torch.compile(backend="eager", fullgraph=True)
    def code(x: torch.Tensor) -> torch.Tensor:
        return x + torch.accelerator.device_count() if torch.accelerator.is_available() else x

    assert code(torch.ones(1)).item() == 3.0


def test_all_is_taken_back(facade: Any) -> None:
    """unpatch() leaves torch.accelerator as it was."""
    ours = dict(vars(torch.accelerator))
    llm_adapt.unpatch()
    assert torch.accelerator.is_available() is False
    assert torch.accelerator.is_available is not ours["is_available"]
    assert isinstance(torch.accelerator.device_index, type)
