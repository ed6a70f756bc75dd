"""Tensor.to, .cuda, .cpu, .type, is_cuda, get_device, pin_memory; Module.to, .cuda, .to_empty."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.adapters import adapters
from llm_adapt.errors import DeviceError
from llm_adapt.frameworks.torch_cuda.devices import DeviceTranslator
from llm_adapt.frameworks.torch_cuda.tensor_types import own_type

pytestmark = pytest.mark.usefixtures("facade")


class Place(str):
    """A string of one's own, as configurations have."""


CUDA = ["cuda", "cuda:0", "cuda:1", 0, 1, Place("cuda")]


@pytest.mark.parametrize("place", CUDA)
def test_to_cuda_is_the_tensor_itself(place: Any) -> None:
    """A tensor that is on this device already comes back itself, as on CUDA."""
    x = torch.ones(3)
    assert x.to(place) is x
    assert x.to(device=place) is x
    assert x.to(place, non_blocking=True) is x
    assert x.cuda(place) is x
    assert x.cuda() is x


@pytest.mark.parametrize("place", CUDA)
def test_to_cuda_converts(place: Any) -> None:
    """The other arguments of Tensor.to keep their meaning."""
    x = torch.ones(3)
    assert x.to(place, torch.float16).dtype == torch.float16
    assert x.to(place, dtype=torch.float16).dtype == torch.float16
    assert x.to(device=place, dtype=torch.float16).dtype == torch.float16
    assert x.to(place, torch.float32, False, True) is not x
    assert x.to(place, copy=True) is not x


def test_to_without_a_device() -> None:
    """A dtype, a tensor, or keywords alone do what torch does."""
    x = torch.ones(3)
    assert x.to(torch.float64).dtype == torch.float64
    assert x.to(torch.ones(1, dtype=torch.int64)).dtype == torch.int64
    assert x.to(dtype=torch.float16).dtype == torch.float16
    assert x.to(memory_format=torch.preserve_format) is x
    assert x.to("meta").device.type == "meta"
    assert x.to() is x


def test_to_refuses_an_ordinal_that_does_not_exist() -> None:
    """Tensor.to and Tensor.cuda name the ordinals there are."""
    for act in (lambda x: x.to("cuda:2"), lambda x: x.to(2), lambda x: x.cuda(2), lambda x: x.cuda("cuda:2")):
        with pytest.raises(DeviceError, match="Device ordinal 2"):
            act(torch.ones(1))
    with pytest.raises(DeviceError, match="pass 'cuda', 'cuda:N', an ordinal or nothing"):
        torch.ones(1).cuda("cpu")


SNAPSHOTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "cpu()": lambda x: x.cpu(),
    'to("cpu")': lambda x: x.to("cpu"),
    'to(device="cpu")': lambda x: x.to(device="cpu"),
    'to("cpu", dtype)': lambda x: x.to("cpu", torch.float32),
    'to("cpu", dtype, False, False)': lambda x: x.to("cpu", torch.float32, False, False),
    'to(string of its own, "cpu")': lambda x: x.to(Place("cpu")),
    "detach().cpu()": lambda x: x.detach().cpu(),
    "cpu(memory_format)": lambda x: x.cpu(memory_format=torch.contiguous_format),
}


@pytest.mark.parametrize("take", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
def test_a_snapshot_stays_what_it_was(take: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """A copy brought to the CPU does not change with the tensor of the device, as on CUDA."""
    x = torch.ones(3)
    taken = take(x)
    x.zero_()
    assert taken.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("take", SNAPSHOTS.values(), ids=SNAPSHOTS.keys())
def test_a_snapshot_has_a_gradient(take: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Autograd passes through a copy to the CPU."""
    x = torch.ones(3, requires_grad=True)
    taken = take(x)
    if taken.requires_grad:
        (taken * 2).sum().backward()
        assert x.grad is not None
        assert x.grad.tolist() == [2.0, 2.0, 2.0]


def test_a_torch_device_does_not_copy() -> None:
    """torch.device objects alias as in torch: its own code moves tensors with them."""
    x = torch.ones(3)
    assert x.to(torch.device("cpu")) is x
    assert x.to(device=torch.device("cuda")) is x


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.eye(3).to_sparse_csr(),
        lambda: torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8),
        lambda: torch.ones(2, dtype=torch.complex64).conj(),
        lambda: torch.ones(2).to(torch.float8_e4m3fn),
        lambda: torch.ones((), dtype=torch.bool),
    ],
)
def test_every_kind_of_tensor_comes_to_the_cpu(make: Callable[[], torch.Tensor]) -> None:
    """Sparse, nested, quantized, conjugated and float8 tensors can be copied to the CPU."""
    x = make()
    assert x.cpu() is not x
    assert x.cpu().layout == x.layout
    assert x.cuda() is x


def test_is_cuda() -> None:
    """Tensors of this device are cuda tensors to the script; tensors of other devices are not."""
    assert torch.ones(1).is_cuda
    assert not torch.ones(1, device="meta").is_cuda
    assert torch.nn.Parameter(torch.ones(1)).is_cuda


def test_get_device() -> None:
    """get_device() is the current ordinal, and can be handed back to everything that takes one."""
    x = torch.ones(1)
    with torch.cuda.device(1):
        assert x.get_device() == 1
        assert torch.zeros(1, device=x.get_device()).is_cuda
        assert torch.cuda.get_device_properties(x.get_device()).major == 8
    assert x.get_device() == 0


TYPES = {
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Double": torch.float64,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


@pytest.mark.parametrize(("name", "dtype"), TYPES.items())
def test_legacy_types(name: str, dtype: torch.dtype) -> None:
    """type() says torch.cuda.*Tensor, takes it as a string or class, and isinstance and calls agree."""
    x = torch.ones(2, dtype=dtype)
    legacy = getattr(torch.cuda, f"{name}Tensor")
    assert x.type() == f"torch.cuda.{name}Tensor"
    assert torch.ones(2).type(f"torch.cuda.{name}Tensor").dtype == dtype
    assert torch.ones(2).type(legacy).dtype == dtype
    assert isinstance(x, legacy)
    assert not isinstance(torch.ones(2, dtype=torch.complex64), legacy)
    assert legacy(2).dtype == dtype
    assert legacy([1, 0]).tolist() == [1, 0]


@given(st.text(max_size=8), st.sampled_from(["torch.cuda.FloatTensor", "torch.cuda.sparse.HalfTensor"]))
def test_only_exact_type_names(text: str, name: str) -> None:
    """Only the full name of a tensor type of torch.cuda is translated; every other text comes back as it is."""
    host = DeviceTranslator(adapters()["cpu"], 1)
    assert own_type(name, host) == name.replace("cuda.", "")
    for other in (text, text + name if text else "x", name + (text or "X"), name.replace("Tensor", ""), name[6:]):
        if other != name:
            assert own_type(other, host) is other


def test_type_of_others() -> None:
    """Conversions by dtype, and tensors of other devices, are torch's."""
    assert torch.ones(1).type(torch.float16).dtype == torch.float16
    assert torch.ones(1).type("torch.DoubleTensor").dtype == torch.float64
    assert torch.ones(1, device="meta").type() == "torch.meta.FloatTensor"


@pytest.mark.filterwarnings("ignore:torch.sparse|Sparse|torch.set_default_tensor_type")
def test_sparse_and_default_types() -> None:
    """torch.cuda.sparse.*Tensor and torch.set_default_tensor_type with a CUDA type work."""
    sparse = torch.cuda.sparse.FloatTensor(torch.tensor([[0], [1]]), torch.ones(1), torch.Size([2, 2]))
    assert sparse.type() == "torch.cuda.sparse.FloatTensor"
    assert torch.ones(2, 2).to_sparse().type("torch.cuda.sparse.DoubleTensor").dtype == torch.float64
    torch.set_default_tensor_type("torch.cuda.DoubleTensor")
    assert torch.ones(1).type() == "torch.cuda.DoubleTensor"
    torch.set_default_tensor_type(torch.cuda.FloatTensor)
    assert torch.ones(1).type() == "torch.cuda.FloatTensor"


def test_a_subclass_stays_itself() -> None:
    """Moving a tensor of a subclass gives that subclass, and a type name is prefixed once."""

    class Mine(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return super().__torch_function__(func, types, args, kwargs or {})

    x = torch.ones(2).as_subclass(Mine)
    assert [type(y) for y in (x.to("cuda"), x.cuda(), x.cpu(), x.to("cpu"))] == [Mine] * 4
    assert x.is_cuda
    assert x.type() == "torch.cuda.FloatTensor"


def test_pin_memory(noted: Callable[[], list[str]]) -> None:
    """A pinned tensor is the tensor itself, it says that it is pinned, and that is noted once."""
    x = torch.ones(3)
    assert x.pin_memory() is x
    assert x.pin_memory("cuda") is x
    assert x.is_pinned()
    assert noted() == ["pin_memory"]


def test_modules_move() -> None:
    """Module.to, .cuda and .to_empty take every spelling, and keep parameters and buffers."""
    module = torch.nn.BatchNorm1d(2)
    for place in (*CUDA, torch.device("cuda")):
        assert module.to(place) is module
        assert module.to(device=place, dtype=torch.float16).weight.dtype == torch.float16
        assert module.to(place, torch.float32).running_mean.is_cuda
        assert module.cuda(place) is module
        assert module.to_empty(device=place) is module
    assert module.cuda().float().half().to(torch.float32).weight.dtype == torch.float32
    assert module.to(torch.ones(1)).weight.is_cuda
    with pytest.raises(DeviceError, match="Device ordinal 2"):
        module.cuda(2)


def test_a_module_on_the_cpu_is_a_snapshot() -> None:
    """Module.cpu() copies: a tensor that was the parameter's memory is the module's no more, as on CUDA."""
    module = torch.nn.Linear(2, 2)
    memory = module.weight.data
    module.cpu()
    memory.zero_()
    assert module.weight.abs().sum() > 0


def test_meta_modules_materialize() -> None:
    """A model made on meta is given memory of this device."""
    with torch.device("meta"):
        module = torch.nn.Linear(2, 2)
    assert module.to_empty(device="cuda").weight.is_cuda


def test_storages() -> None:
    """A storage goes to cuda and stays, as `map_location=lambda storage, _: storage.cuda()` asks."""
    storage = torch.ones(2).untyped_storage()
    assert storage.cuda().device.type == "cpu"
    assert storage.cuda(1).nbytes() == 8


@pytest.mark.parametrize("name", ["Adadelta", "Adam", "AdamW", "Adamax", "ASGD", "NAdam", "RAdam", "RMSprop", "Rprop"])
def test_optimizers_that_can_be_captured(name: str) -> None:
    """capturable=True, which a checkpoint may bring along, gives the numbers of capturable=False."""
    found = []
    for capturable in (False, True):
        weight = torch.nn.Parameter(torch.ones(3, device="cuda"))
        optimizer = getattr(torch.optim, name)([weight], lr=0.1, capturable=capturable)
        for _ in range(3):
            weight.grad = weight.detach().square()
            optimizer.step()
        found.append(weight.detach())
    torch.testing.assert_close(*found)


def test_optimizers_are_scripted() -> None:
    """torch compiles functional optimizers as TorchScript, and with them the question what can be captured where."""
    for name in ("optimizer", "adam", "adadelta"):
        devices = sys.modules[f"torch.optim.{name}"]._get_capturable_supported_devices
        assert torch.jit.script(devices)() == devices()
        assert {"cpu", "cuda"} <= set(devices(supports_xla=False))


def test_data_parallel_is_one_replica(noted: Callable[[], list[str]]) -> None:
    """nn.DataParallel gives the whole batch to the one device, and it is noted."""
    module = torch.nn.Linear(2, 3).cuda()
    x = torch.ones(4, 2, device="cuda")
    parallel = torch.nn.DataParallel(module, device_ids=[0, 1], output_device=0)
    assert torch.equal(parallel(x), module(x))
    assert noted() == ["nn.DataParallel"]
