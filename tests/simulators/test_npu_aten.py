"""aten over the simulated NPU: memory, views, devices, random numbers, and what it refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import refuses

pytestmark = pytest.mark.simulator("npu")
OTHER_DEVICE = "Expected all tensors to be on the same device"


def numbers(*shape: int, seed: int = 3) -> torch.Tensor:
    """Normal numbers on the CPU, the same ones for the same shape and seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The result is on the NPU, with the CPU's dtype, strides and numbers.

    Raises:
        AssertionError: one of them differs.
    """
    assert found.device.type == "npu"
    assert found.dtype == expected.dtype
    assert found.stride() == expected.stride()
    assert torch.equal(found.cpu(), expected)


def test_in_place_returns_its_argument() -> None:
    """An in-place operator writes through a view and returns the tensor it was given."""
    base, expected = numbers(4, 6).npu(), numbers(4, 6)
    view = base[1:3, ::2]
    assert view.mul_(2).add_(1) is view
    expected[1:3, ::2].mul_(2).add_(1)
    same(base, expected)
    assert view._version == base._version > 0


def test_in_place_on_overlapping_memory_is_refused() -> None:
    """Writing to expanded memory raises as on any device."""
    with refuses("more than one element of the written-to tensor refers to a single memory location"):
        torch.zeros(1).npu().expand(3).add_(1)


def test_out_grows() -> None:
    """out= that must grow gets memory of the device, and a view of the old memory keeps it."""
    out = torch.empty(0, device="npu")
    found = torch.add(numbers(3, 5).npu(), 1, out=out)
    assert found is out
    same(out, numbers(3, 5) + 1)


def test_out_of_the_wrong_size_warns() -> None:
    """A filled out= of another size is resized with torch's warning."""
    out = torch.ones(2, device="npu")
    with pytest.warns(UserWarning, match="was resized"):
        torch.mul(numbers(7).npu(), 2, out=out)
    same(out, numbers(7) * 2)


def test_out_into_strides() -> None:
    """out= with strides of its own is written where it lies."""
    memory, expected = torch.zeros(3, 4).npu(), torch.zeros(3, 4)
    torch.exp(numbers(3, 2).npu(), out=memory[:, ::2])
    torch.exp(numbers(3, 2), out=expected[:, ::2])
    same(memory, expected)


def test_out_on_another_device_is_refused() -> None:
    """out= on the CPU for operands on the NPU."""
    with refuses(OTHER_DEVICE):
        torch.add(numbers(3).npu(), 1, out=torch.empty(3))


@pytest.mark.parametrize("size", [(2, 2), (20, 3)], ids=["smaller", "larger"])
def test_resize(size: tuple[int, int]) -> None:
    """resize_ keeps what was there."""
    x = torch.arange(12.0).npu()
    x.resize_(*size)
    assert x.shape == size
    kept = min(12, x.numel())
    assert torch.equal(x.flatten()[:kept].cpu(), torch.arange(12.0)[:kept])


def test_views_share_memory() -> None:
    """Views of every kind write through to their base, and share its storage."""
    base, expected = numbers(4, 6).npu(), numbers(4, 6)
    for change in (
        lambda x: x.t()[2].fill_(7),
        lambda x: x.view(6, 4)[1:2].zero_(),
        lambda x: x.unfold(1, 2, 2)[0].neg_(),
        lambda x: x.diagonal().fill_(-1),
        lambda x: x.chunk(3, 1)[2].mul_(3),
        lambda x: x.as_strided((2, 2), (12, 1), 5).add_(1),
        lambda x: x.view(torch.int32)[3, 3].fill_(0),
    ):
        change(base)
        change(expected)
        assert torch.equal(base.cpu(), expected)
    assert base.t().untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    assert base.t()._base is base


def test_aliasing_arguments() -> None:
    """The same memory as input and output, and an operand given twice."""
    x, expected = numbers(6).npu(), numbers(6)
    torch.add(x, x, out=x)
    torch.add(expected, expected, out=expected)
    same(x, expected)
    torch._foreach_add_([x[:3], x[3:]], 1.0)
    same(x, expected + 1)


MIXED: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "add": torch.add,
    "mm": torch.mm,
    "cat": lambda x, y: torch.cat([x, y]),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "in place": lambda x, y: x.add_(y),
    "lerp": lambda x, y: torch.lerp(x, y, 0.5),
    "index_add": lambda x, y: x.index_add(0, torch.tensor([0, 1], device=x.device), y),
    "linear": torch.nn.functional.linear,
    "foreach": lambda x, y: torch._foreach_add([x], [y]),
}


@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("where", ["cpu", "npu:1"])
def test_mixed_devices_are_refused(name: str, where: str) -> None:
    """Operands on npu:0 and on the CPU or npu:1, in either order."""
    here, there = numbers(2, 2).npu(), numbers(2, 2).to(where)
    for pair in ((here, there), (there, here)):
        with pytest.raises(RuntimeError, match="same device|on the same device|on CPU|same type"):
            MIXED[name](*pair)
            torch.npu.synchronize()


def test_numbers_of_the_host_are_taken() -> None:
    """A 0-dim tensor of the CPU is a number to a pointwise operator, as on CUDA; an index may be on the CPU."""
    x = numbers(3).npu()
    same(x * torch.tensor(2.0), numbers(3) * 2)
    same(torch.tensor(2.0) - x, 2 - numbers(3))
    same(x[torch.tensor([2, 0])], numbers(3)[[2, 0]])
    with refuses(OTHER_DEVICE):
        numbers(3)[torch.tensor([2, 0]).npu()]


def test_copies_between_devices() -> None:
    """A second NPU has its own tensors; `to` and copy_ cross."""
    x = numbers(4).to("npu:1")
    assert (x * 2).device == torch.device("npu", 1)
    y = torch.zeros(4, device="npu:0").copy_(x)
    assert y.device == torch.device("npu", 0)
    assert torch.equal(y.cpu(), numbers(4))
    assert torch.arange(3, device="npu:5").tolist() == [0, 1, 2]  # the first that this device is asked


@pytest.mark.parametrize("operator", ["add", "mul", "sub", "div", "maximum"])
def test_foreach(operator: str) -> None:
    """foreach on lists of several shapes, new and in place."""
    shapes = [(3,), (2, 4), (), (0, 2)]
    left, right = [numbers(*s) for s in shapes], [numbers(*s, seed=5) for s in shapes]
    foreach = getattr(torch, f"_foreach_{operator}")
    in_place = getattr(torch, f"_foreach_{operator}_")
    here = [x.npu() for x in left]
    for found, expected in zip(foreach(here, [x.npu() for x in right]), foreach(left, right), strict=True):
        same(found, expected)
    in_place(here, [x.npu() for x in right])
    in_place(left, right)
    for found, expected in zip(here, left, strict=True):
        same(found, expected)


def test_random_numbers_follow_seed_and_offset() -> None:
    """The same seed gives the same numbers, each draw moves the Philox offset, and set_state goes back."""
    torch.npu.manual_seed(7)
    first = torch.randn(5, device="npu")
    state = torch.npu.get_rng_state()
    second = torch.rand(5, device="npu")
    torch.npu.set_rng_state(state)
    assert torch.equal(torch.rand(5, device="npu"), second)
    torch.npu.manual_seed(7)
    assert torch.equal(torch.randn(5, device="npu"), first)
    assert not torch.equal(torch.randn(5, device="npu"), first)


def test_random_numbers_leave_the_cpu_alone() -> None:
    """Dropout on the NPU draws nothing from the CPU's generator."""
    before = torch.get_rng_state()
    torch.nn.functional.dropout(numbers(10).npu(), 0.5)
    torch.randn(3, device="npu")
    torch.randperm(3, device="npu")
    assert torch.equal(torch.get_rng_state(), before)


def test_a_generator_of_the_device() -> None:
    """A generator of its own; one of the CPU is refused."""
    generator = torch.Generator("npu").manual_seed(3)
    first = torch.randn(4, generator=generator, device="npu")
    assert torch.equal(torch.randn(4, generator=generator.manual_seed(3), device="npu"), first)
    with refuses("device type for generator"):
        torch.zeros(4, device="npu").normal_(generator=torch.Generator())


def test_float64_is_stored_and_to_makes_it_float32() -> None:
    """torch_npu's `to` makes float32 of float64 and says so; a float64 tensor made on the device stays one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.ones(2).npu().double().dtype == torch.float32
    x = torch.full((3,), 1 / 3, dtype=torch.float64, device="npu")
    same(x + x, torch.full((3,), 2 / 3, dtype=torch.float64))


def test_index_operators() -> None:
    """Gather, scatter, index_put with and without accumulation, index_select, masked_select and nonzero."""
    x, index = numbers(4, 5), torch.tensor([[0, 2], [3, 3], [1, 0]])
    rows, mask = torch.tensor([3, 0, 3]), numbers(4, 5, seed=9) > 0
    values = numbers(3, 5, seed=11)
    for act in (
        lambda x, m: x.gather(0, m(index)),
        lambda x, m: x.scatter(1, m(index), m(numbers(3, 2))),
        lambda x, m: x.scatter_add(0, m(index), m(numbers(3, 2))),
        lambda x, m: x.index_put((m(rows),), m(values), accumulate=True),
        lambda x, m: x.index_select(0, m(rows)),
        lambda x, m: x[m(rows), 1:3],
        lambda x, m: x[m(mask)],
        lambda x, m: x.masked_select(m(mask)),
        lambda x, m: x.masked_fill(m(mask), 2.0),
        lambda x, m: m(mask).nonzero(),
        lambda x, m: torch.take_along_dim(x[:3], m(index), 1),
    ):
        same(act(x.npu(), lambda one: one.npu()), act(x, lambda one: one))
    assert [one.device.type for one in torch.where(mask.npu())] == ["npu", "npu"]


def test_an_index_out_of_range_is_refused() -> None:
    """The host kernel checks indices where hardware would read what lies there."""
    with pytest.raises((RuntimeError, IndexError), match="out of (range|bounds)"):
        numbers(3).npu()[torch.tensor([5]).npu()].cpu()


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_sparse_csr], ids=["coo", "csr"])
def test_sparse_is_refused(make: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Sparse layouts are not modelled, and say so."""
    with pytest.raises((RuntimeError, NotImplementedError), match=r"(?i)sparse"):
        make(torch.eye(3).npu()).matmul(torch.eye(3).npu()).cpu()


def test_complex_numbers() -> None:
    """Complex arithmetic, the lazy conjugate and real views."""
    x = torch.complex(numbers(3), numbers(3, seed=5))
    here = x.npu()
    same(here * here, x * x)
    assert here.conj().is_conj()
    same(here.conj().mul(2), x.conj().mul(2))
    same(torch.view_as_real(here), torch.view_as_real(x))
    assert torch.equal(here.imag.cpu(), x.imag)


def test_channels_last() -> None:
    """Strides of channels_last go through pointwise operators and convolutions as on the CPU."""
    x = numbers(2, 3, 8, 8).contiguous(memory_format=torch.channels_last)
    weight = numbers(4, 3, 3, 3)
    here = x.npu()
    assert here.is_contiguous(memory_format=torch.channels_last)
    same(here.relu() + 1, x.relu() + 1)
    found = torch.nn.functional.conv2d(here, weight.npu(), padding=1)
    torch.testing.assert_close(found.cpu(), torch.nn.functional.conv2d(x, weight, padding=1))


def test_operators_without_a_kernel_are_counted() -> None:
    """An operator that the NPU lacks runs on the CPU, and its calls are counted by name."""
    kernels = __import__("llm_adapt_npu_kernels")
    before = kernels.fallback_counts().get("aten::geqrf", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = torch.geqrf(numbers(3, 3).npu())
    torch.testing.assert_close([one.cpu() for one in found], list(torch.geqrf(numbers(3, 3))))
    assert kernels.fallback_counts()["aten::geqrf"] == before + 1


def test_zero_tensors() -> None:
    """A tensor of zeros without memory, as forward-mode gradients use, goes through operators on the NPU."""
    zeros = torch._efficientzerotensor((40, 50), device="npu")
    for _ in range(50):
        assert (zeros * numbers(40, 50).npu()).device.type == "npu"
    same(zeros + numbers(40, 50).npu(), numbers(40, 50))
