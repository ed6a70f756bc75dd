"""What torch_npu's own C++ calls of the simulated NPU without the dispatcher: copies, casts, one_hot, padding."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, agrees, refuses

pytestmark = pytest.mark.simulator("npu")

DTYPES = (*FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)


def _npu() -> Any:
    import torch_npu

    return torch_npu


@pytest.mark.parametrize("target", DTYPES, ids=str)
@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_casts(source: torch.dtype, target: torch.dtype) -> None:
    """`to` and npu_dtype_cast between any two dtypes give what the CPU gives."""
    x = torch.tensor([0.0, 1.0, 2.0, 100.0]).to(source)
    assert torch.equal(x.npu().to(target).cpu(), x.to(target))
    assert torch.equal(_npu().npu_dtype_cast(x.npu(), target).cpu(), x.to(target))


def test_npu_dtype_cast_has_a_gradient() -> None:
    """The gradient of a cast has the dtype of its input."""
    x = torch.randn(4).npu().requires_grad_()
    y = _npu().npu_dtype_cast(x, torch.bfloat16)
    y.backward(torch.tensor([1.0, 2.0, 3.0, 4.0]).bfloat16().npu())
    assert x.grad is not None
    assert x.grad.dtype == torch.float32
    assert x.grad.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_copies_between_layouts() -> None:
    """Copies read and write strided, sliced and expanded tensors where they lie."""
    x = torch.arange(24.0).reshape(4, 6)
    target = torch.zeros(6, 8).npu()
    target[:, ::2].copy_(x.npu().t())
    expected = torch.zeros(6, 8)
    expected[:, ::2] = x.t()
    assert torch.equal(target.cpu(), expected)
    target[1:3] = x.npu()[0, :1]
    expected[1:3] = x[0, :1]
    assert torch.equal(target.cpu(), expected)
    assert torch.equal(target[::2, 1:7:3].half().cpu(), expected[::2, 1:7:3].half())


def test_copy_of_a_conjugate() -> None:
    """A lazy conjugate is resolved by the copy."""
    x = torch.complex(torch.tensor([1.0, 2.0]), torch.tensor([3.0, -4.0]))
    target = torch.zeros(2, dtype=torch.complex64).npu()
    target.copy_(x.npu().conj())
    assert torch.equal(target.cpu(), x.conj().resolve_conj())


@pytest.mark.parametrize("classes", [5, -1])
def test_one_hot(classes: int) -> None:
    """one_hot with a given number of classes, or the smallest that fits."""
    index = torch.tensor([[0, 3], [1, 2]])
    found = torch.nn.functional.one_hot(index.npu(), classes)
    assert torch.equal(found.cpu(), torch.nn.functional.one_hot(index, classes))


def test_one_fills_in_place() -> None:
    """one_ fills its argument."""
    x = torch.zeros(3, 4).npu()
    _npu().one_(x)
    assert torch.equal(x.cpu(), torch.ones(3, 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_npu_linear(bias: bool, dtype: torch.dtype) -> None:
    """npu_linear is x W^T + b, with gradients of all three."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.randn(shape, generator=generator) for shape in ((6, 32), (5, 32), (5,))][: 2 + bias]

    def formula(x: torch.Tensor, weight: torch.Tensor, *bias: torch.Tensor) -> torch.Tensor:
        return x @ weight.t() + sum(bias)

    agrees(_npu().npu_linear, formula, tensors, dtype, node="NpuLinearBackward")


def test_npu_linear_refuses() -> None:
    """Two dtypes, and integers."""
    x = torch.ones(2, 4)
    with refuses("must have the dtype of the left matrix"):
        _npu().npu_linear(x.npu(), x.half().npu())
    with refuses("must be float32, float16 or bfloat16"):
        _npu().npu_linear(x.int().npu(), x.int().npu())


def test_padding_as_collectives_ask_for_it() -> None:
    """aclnnConstantPadNd, which torch_npu's all_gather calls for tensors of odd byte counts, by its C interface."""
    library = ctypes.CDLL("libopapi.so")
    library.aclCreateTensor.restype = ctypes.c_void_p
    library.aclCreateIntArray.restype = ctypes.c_void_p
    library.aclCreateScalar.restype = ctypes.c_void_p
    source, target = torch.tensor([1.0, 2.0, 3.0]), torch.zeros(5)

    def described(tensor: torch.Tensor) -> ctypes.c_void_p:
        sizes = (ctypes.c_int64 * 1)(tensor.numel())
        strides = (ctypes.c_int64 * 1)(1)
        data = ctypes.c_void_p(tensor.data_ptr())
        made = library.aclCreateTensor(
            sizes, ctypes.c_uint64(1), 0, strides, ctypes.c_int64(0), 2, sizes, ctypes.c_uint64(1), data
        )
        return ctypes.c_void_p(made)

    padding = ctypes.c_void_p(library.aclCreateIntArray((ctypes.c_int64 * 2)(0, 2), ctypes.c_uint64(2)))
    value = ctypes.c_float(7.0)
    number = ctypes.c_void_p(library.aclCreateScalar(ctypes.byref(value), 0))
    bytes_wanted, executor = ctypes.c_uint64(), ctypes.c_void_p()
    status = library.aclnnConstantPadNdGetWorkspaceSize(
        described(source), padding, number, described(target), ctypes.byref(bytes_wanted), ctypes.byref(executor)
    )
    assert status == 0
    assert library.aclnnConstantPadNd(None, bytes_wanted, executor, None) == 0
    assert target.tolist() == [1.0, 2.0, 3.0, 7.0, 7.0]


def test_an_operator_that_is_not_there_names_itself() -> None:
    """What libopapi.so does not have is an error that names it, not a result."""
    with refuses("aclnnSleep"):
        torch.npu._sleep(10)
