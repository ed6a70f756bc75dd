"""Factories of torch with device=: every one of them, in every spelling."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from llm_adapt.errors import DeviceError
from llm_adapt.frameworks.torch_cuda.tensors import factory_targets

pytestmark = pytest.mark.usefixtures("facade")

PLACES = st.sampled_from(["cuda", "cuda:0", "cuda:1", 0, 1])
INDICES, VALUES, CROW = torch.tensor([[0, 1], [1, 0]]), torch.ones(2), torch.tensor([0, 1, 2])
BLOCKS = torch.ones(2, 1, 1)
with warnings.catch_warnings(action="ignore"):
    QUANTIZED = torch.quantize_per_tensor(VALUES, 0.1, 0, torch.quint8)
FACTORIES = factory_targets()  # from torch's own functions, so before patch()
ARGUMENTS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "arange": ((3,), {}),
    "as_nested_tensor": (([VALUES, VALUES],), {}),
    "as_tensor": (([1.0],), {}),
    "asarray": (([1.0],), {}),
    "bartlett_window": ((3,), {}),
    "blackman_window": ((3,), {}),
    "empty": ((3,), {}),
    "empty_like": ((VALUES,), {}),
    "empty_permuted": (((2, 3), (1, 0)), {}),
    "empty_quantized": (((2,), QUANTIZED), {}),
    "empty_strided": (((2,), (1,)), {}),
    "eye": ((2,), {}),
    "fftfreq": ((3,), {}),
    "full": (((2,), 1.0), {}),
    "full_like": ((VALUES, 1.0), {}),
    "hamming_window": ((3,), {}),
    "hann_window": ((3,), {}),
    "kaiser_window": ((3,), {}),
    "linspace": ((0, 1, 3), {}),
    "logspace": ((0, 1, 3), {}),
    "nested_tensor": (([VALUES, VALUES],), {}),
    "normal": ((0.0, 1.0, (2,)), {}),
    "ones": ((3,), {}),
    "ones_like": ((VALUES,), {}),
    "rand": ((3,), {}),
    "rand_like": ((VALUES,), {}),
    "randint": ((5, (3,)), {}),
    "randint_like": ((VALUES, 5), {}),
    "randn": ((3,), {}),
    "randn_like": ((VALUES,), {}),
    "randperm": ((3,), {}),
    "range": ((0, 3), {}),
    "rfftfreq": ((3,), {}),
    "scalar_tensor": ((1.0,), {}),
    "sparse_bsc_tensor": ((CROW, INDICES[0], BLOCKS), {}),
    "sparse_bsr_tensor": ((CROW, INDICES[0], BLOCKS), {}),
    "sparse_compressed_tensor": ((CROW, INDICES[0], VALUES), {"layout": torch.sparse_csr}),
    "sparse_coo_tensor": ((INDICES, VALUES), {}),
    "sparse_csc_tensor": ((CROW, INDICES[0], VALUES), {}),
    "sparse_csr_tensor": ((CROW, INDICES[0], VALUES), {}),
    "tensor": (([1.0],), {}),
    "tril_indices": ((2, 2), {}),
    "triu_indices": ((2, 2), {}),
    "zeros": ((3,), {}),
    "zeros_like": ((VALUES,), {}),
}
NEW: dict[str, tuple[Any, ...]] = {
    "new": (3,),
    "new_empty": ((3,),),
    "new_empty_strided": ((2,), (1,)),
    "new_full": ((3,), 1.0),
    "new_ones": ((3,),),
    "new_tensor": ([1.0],),
    "new_zeros": ((3,),),
}


def _factory(target: str) -> Callable[..., torch.Tensor]:
    module, _, name = target.partition(":")
    owner = {"torch": torch, "torch.fft": torch.fft, "torch.nested": torch.nested}[module]
    return getattr(owner, name)  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("target", FACTORIES)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES)
def test_a_factory_takes_cuda(target: str, place: Any) -> None:
    """Every public factory of torch makes its tensor on this device when it is asked for a CUDA device."""
    args, kwargs = ARGUMENTS[target.partition(":")[2]]
    assert _factory(target)(*args, **kwargs, device=place).is_cuda
    with pytest.raises(DeviceError, match="Device ordinal 7"):
        _factory(target)(*args, **kwargs, device="cuda:7")


@pytest.mark.parametrize("name", NEW)
@settings(max_examples=5, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(place=PLACES)
def test_a_tensor_makes_tensors_on_cuda(name: str, place: Any) -> None:
    """`Tensor.new_*` take every spelling of a CUDA device."""
    assert getattr(torch.ones(1), name)(*NEW[name], device=place).is_cuda


def test_no_factory_is_forgotten() -> None:
    """Every operator of torch with a device argument and a public Python name is in the table of factories."""
    names = {
        schema.name.removeprefix("aten::").removeprefix("fft_")
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("aten::") and any(argument.name == "device" for argument in schema.arguments)
    }
    covered = {target.partition(":")[2] for target in FACTORIES} | set(NEW)
    other_rows = {"to", "pin_memory", "is_pinned", "Generator"}  # rows of their own
    host_only = {"from_file"}  # maps a file into host memory; CUDA's torch refuses a device there too
    public = {name for name in names if hasattr(torch, name) or hasattr(torch.Tensor, name) if name[0] != "_"}
    assert public - covered - other_rows - host_only == set()
    functions = {name: function for name, function in vars(torch.nested).items() if inspect.isfunction(function)}
    nested = {name for name, function in functions.items() if "device" in inspect.signature(function).parameters}
    assert nested
    assert nested <= covered


def test_other_devices_are_left_alone() -> None:
    """A factory asked for another device, or for none, does what torch does."""
    assert torch.zeros(1, device="meta").device.type == "meta"
    assert torch.zeros(1, device=None).device.type == "cpu"
    with pytest.raises(AssertionError, match="XPU"):
        torch.zeros(1, device="xpu")


def test_pinned_factories(noted: Callable[[], list[str]]) -> None:
    """pin_memory=True makes an ordinary tensor of host memory, and is noted once."""
    for _ in range(2):
        assert torch.empty(3, device="cpu", pin_memory=True).shape == (3,)
        assert torch.zeros_like(VALUES, pin_memory=True).tolist() == [0.0, 0.0]
    assert noted() == ["pin_memory"]


def test_modules_are_born_on_cuda() -> None:
    """Modules and parameters with device= lie on this device."""
    made = [torch.nn.Linear(2, 2, device="cuda").weight, torch.nn.Embedding(2, 2, device="cuda:1").weight]
    made += [torch.nn.utils.skip_init(torch.nn.Linear, 2, 2, device="cuda").weight]
    made += [torch.nn.LSTM(2, 2, device=0).weight_ih_l0, torch.nn.LayerNorm(2, device="cuda").weight]
    assert all(tensor.is_cuda for tensor in made)


def test_an_rnn_runs() -> None:
    """nn.LSTM, which asks is_cuda of its weights to call cuDNN, computes."""
    assert torch.nn.LSTM(2, 3).cuda()(torch.ones(4, 1, 2, device="cuda"))[0].shape == (4, 1, 3)
