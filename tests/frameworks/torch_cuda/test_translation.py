"""Which values are devices of CUDA, and which only look like it."""

from __future__ import annotations

import enum
import string
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import llm_adapt
from llm_adapt.adapters import adapters
from llm_adapt.errors import DeviceError
from llm_adapt.frameworks.torch_cuda.devices import REAL_DEVICE, DeviceTranslator, logical_devices

HOST = DeviceTranslator(adapters()["cpu"], 4)
WORDS = st.text(string.ascii_letters + string.digits + ":/._- ", max_size=12)
NOT_DEVICES = st.one_of(
    st.builds("{}cuda{}".format, WORDS.filter(bool), WORDS),
    st.builds("cuda{}".format, WORDS.filter(lambda tail: tail and not (tail[0] == ":" and tail[1:].isdigit()))),
    st.builds("cuda:{}{}".format, st.integers(0, 9), st.sampled_from([" ", "\n", "a", ":0", ".0"])),
    st.builds("cuda:0{}".format, st.integers(0, 99)),  # torch reads no leading zeros
    st.sampled_from(["Cuda", "CUDA", "CUDA:0", "cuda:", "cuda:-1", "cuda:\u0663", " cuda", "cuda ", "cuda\n", ""]),
    st.text(max_size=20).filter(lambda text: not text.startswith("cuda")),
)


@given(NOT_DEVICES)
def test_only_exact_strings_are_devices(text: str) -> None:
    """A path, a URL or a name that contains "cuda" comes back as the very same string."""
    assert HOST(text) is text


@given(st.integers(0, 3))
def test_every_spelling_of_an_ordinal_is_the_device(index: int) -> None:
    """`cuda:N`, torch.device of it and the integer N name one and the same device."""
    spellings = [f"cuda:{index}", REAL_DEVICE("cuda", index), REAL_DEVICE(f"cuda:{index}"), index]
    assert [HOST(value) for value in spellings] == [REAL_DEVICE("cpu")] * len(spellings)


@given(st.integers(4, 10**6))
def test_an_ordinal_that_does_not_exist_is_refused(index: int) -> None:
    """However it is written, an ordinal beyond the last raises, and the message says how many there are."""
    for value in (index, f"cuda:{index}", REAL_DEVICE("cuda", min(index, 127))):
        with pytest.raises(DeviceError, match=r"4 exist\(s\) on cpu \(0 to 3\)"):
            HOST(value)


@given(st.one_of(st.none(), st.booleans(), st.floats(), st.binary(), st.lists(st.just("cuda")), st.just({"cuda": 1})))
def test_other_values_stay(value: Any) -> None:
    """None, booleans, numbers that are no integers and containers are not devices."""
    assert HOST(value) is value


@given(st.sampled_from(["cpu", "meta", "xpu:0", "mps", "npu:1"]))
def test_other_devices_stay(text: str) -> None:
    """A device that is not CUDA is the script's own choice."""
    assert HOST(text) is text
    assert HOST(REAL_DEVICE("cpu")) == REAL_DEVICE("cpu")


def test_a_string_enum_is_a_string() -> None:
    """Configurations keep devices in enumerations of strings; their value counts."""

    class Place(str, enum.Enum):
        GPU = "cuda"
        PATH = "cuda_ckpt"

    assert HOST(Place.GPU) == REAL_DEVICE("cpu")
    assert HOST(Place.PATH) == "cuda_ckpt"
    assert HOST.index(Place.GPU, lambda: 3) == 3


@pytest.mark.parametrize("value", [None, "cuda", -1, REAL_DEVICE("cuda"), "cpu", REAL_DEVICE("cpu")])
def test_no_ordinal_means_the_current_one(value: Any) -> None:
    """None, "cuda", -1 and a tensor's own device mean the current ordinal to torch.cuda."""
    assert HOST.index(value, lambda: 2) == 2


@pytest.mark.parametrize("value", ["mps", "cuda_ckpt", 1.0, True, [0]])
def test_torch_cuda_takes_cuda_devices_only(value: Any) -> None:
    """A value that is no CUDA device is refused, with the spellings that are."""
    with pytest.raises(DeviceError, match="Pass 'cuda', 'cuda:N' or an ordinal"):
        HOST.index(value, lambda: 0)


def test_one_ordinal_per_local_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU presents as many ordinals as processes run on this machine, unless it is told otherwise."""
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert logical_devices(None) == 1
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert logical_devices(None) == 8
    assert logical_devices(3) == 3


@pytest.mark.usefixtures("facade")
class TestTorchDevice:
    """torch.device after patch()."""

    def test_its_constructor_translates(self) -> None:
        """torch.device names this device in every spelling, and other devices as before."""
        here = torch.device("cpu")
        found = [
            torch.device("cuda"),
            torch.device("cuda:1"),
            torch.device("cuda", 1),
            torch.device("cuda", index=1),
            torch.device(type="cuda", index=0),
            torch.device(0),
            torch.device(torch.device("cuda")),
        ]
        assert found == [here] * len(found)
        assert torch.device("meta").type == "meta"

    def test_it_refuses_what_torch_refuses(self) -> None:
        """An ordinal that does not exist and a malformed string are errors."""
        with pytest.raises(DeviceError, match="Device ordinal 2"):
            torch.device("cuda:2")
        with pytest.raises(DeviceError, match="Device ordinal 2"):
            torch.device("cuda", 2)
        with pytest.raises(RuntimeError, match="Invalid device string|device type"):
            torch.device("cudaX")

    def test_isinstance_holds(self) -> None:
        """A tensor's device is an instance of torch.device, and torch.device is a class of its own name."""
        place = torch.ones(1).device
        assert isinstance(place, torch.device)
        assert not isinstance("cuda", torch.device)
        assert type(place) == torch.device  # the spelling that scripts use
        assert issubclass(type(place), torch.device)
        assert {type(place): 1}[torch.device] == 1
        assert (torch.device.__module__, torch.device.__name__) == ("torch", "device")

    def test_it_annotates(self) -> None:
        """Unions and hints with torch.device are written as before."""
        assert isinstance(torch.ones(1).device, torch.device | None)

    def test_it_is_a_context(self) -> None:
        """`with torch.device("cuda")` places what factories make."""
        with torch.device("meta"), torch.device("cuda"):
            assert torch.ones(1).device.type == "cpu"

    def test_the_default_device(self) -> None:
        """torch.set_default_device takes every spelling, and None ends it."""
        for value in ("cuda", "cuda:1", 0, torch.device("cuda")):
            torch.set_default_device("meta")
            torch.set_default_device(value)
            assert torch.get_default_device() == torch.device("cpu")
            assert torch.ones(1).is_cuda
        torch.set_default_device(None)
        assert torch.ones(1).device == torch.device("cpu")

    def test_the_module_of_cuda(self, as_module: Callable[..., Any]) -> None:
        """The device module of the device that stands for cuda is torch.cuda; for torch and others it is theirs."""
        place = torch.device("cuda")
        for device in ("cuda", "cuda:1", place, place.type, None):
            assert torch.get_device_module(device) is torch.cuda
            compiled = torch.compile(
                lambda x, device=device: x + torch.get_device_module(device).device_count(),
                backend="eager",
                fullgraph=True,
            )
            assert compiled(torch.ones(1)).item() == 3.0
        assert torch.get_device_module("mps") is torch.mps
        assert as_module("torch.distributed.fsdp", "torch.get_device_module('cpu')") is torch.cpu


def test_copies_taken_before_are_translated() -> None:
    """`from torch import device`, written before patch(), is translated as well, and is torch's own after unpatch()."""
    with llm_adapt.patched(device="cpu"):
        assert taken_before("cuda") == REAL_DEVICE("cpu")
    assert taken_before is REAL_DEVICE
    assert taken_before("cuda").type == "cuda"


taken_before = torch.device
