"""Tensors of a simulated MLU; run by test_mlu_device.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from tests.simulators.mlu_process import check


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random numbers on the CPU and on the device, both wanting a gradient."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.clone().requires_grad_(), values.to("mlu").requires_grad_()


@check
def factories() -> None:
    """Tensors are made on the device that is named, on the current one where only its kind is."""
    with torch.mlu.device(1):
        assert torch.zeros(2, device="mlu").device == torch.device("mlu:1")
    assert torch.arange(3, device="mlu:2").tolist() == [0, 1, 2]
    assert torch.tril_indices(2, 2, device="mlu").tolist() == [[0, 1, 1], [0, 0, 1]]
    assert torch.ones(2).mlu(3).device == torch.device("mlu:3")
    assert torch.nn.Linear(2, 2).mlu().weight.is_mlu
    with pytest.raises(RuntimeError, match="CNRT error: invalid device ordinal: mlu:8"):
        torch.zeros(1, device="mlu:8")


@check
def type_names() -> None:
    """Tensor.type() says torch.mlu.FloatTensor and so on, which Megatron does not expect."""
    assert torch.ones(1, device="mlu").type() == "torch.mlu.FloatTensor"
    assert torch.ones(1, device="mlu", dtype=torch.bfloat16).type() == "torch.mlu.BFloat16Tensor"


@check
def moving() -> None:
    """Values survive the way to the device, between devices and back, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int16, torch.bool, torch.complex64):
        values = torch.arange(6).reshape(2, 3).to(dtype)
        assert torch.equal(values.to("mlu").to("mlu:1").cpu(), values)
        assert torch.equal(values.t().to("mlu").cpu(), values.t())


@check
def views_alias() -> None:
    """Views share memory with their base: a write to one is seen in the other."""
    base = torch.zeros(4, 4, device="mlu")
    for view in (base[1], base.t()[2], base.view(16)[3:5], base.unfold(0, 2, 2), base.diagonal(), base.expand(2, 4, 4)):
        assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
        assert view._base is base
    base.view(16)[3:5] += 1
    base[1].fill_(2)
    base.t()[0].mul_(3)
    assert base.cpu().tolist() == [[0, 0, 0, 1], [6, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert torch.view_as_real(torch.zeros(2, dtype=torch.complex64, device="mlu")).shape == (2, 2)
    halves = torch.ones(2, device="mlu").view(torch.uint8)
    assert halves.shape == (8,)


@check
def conjugates_stay_lazy() -> None:
    """conj() and imag of it are views that know they are conjugated or negated."""
    z = torch.tensor([1 + 2j], device="mlu")
    assert z.conj().is_conj()
    assert z.conj().imag.is_neg()
    assert (z.conj() * 1).cpu().tolist() == [1 - 2j]


@check
def written_tensors_are_the_caller_s() -> None:
    """In-place operators and out= return the tensor they were given, resized where it had to grow."""
    x = torch.ones(3, device="mlu")
    assert x.add_(1) is x
    out = torch.empty(0, device="mlu")
    alias = out.detach()
    assert torch.add(x, x, out=out) is out
    assert out.tolist() == [4, 4, 4]
    assert out.untyped_storage().data_ptr() == alias.untyped_storage().data_ptr()
    values, where = torch.empty(0, device="mlu"), torch.empty(0, dtype=torch.int64, device="mlu")
    torch.max(torch.eye(3, device="mlu"), 0, out=(values, where))
    assert where.tolist() == [0, 1, 2]
    torch._foreach_mul_([x, x], 2.0)
    assert x.tolist() == [8, 8, 8]


@check
def other_devices_raise() -> None:
    """Tensors of the host, or of another MLU, do not mix with this one's."""
    there, here, other = torch.ones(2, 2, device="mlu"), torch.ones(2, 2), torch.ones(2, 2, device="mlu:1")
    for stranger in (here, other):
        for act in (
            lambda: there + stranger,  # noqa: B023 - called at once
            lambda: there.mm(stranger),  # noqa: B023
            lambda: there.add_(stranger),  # noqa: B023
            lambda: torch.cat([there, stranger]),  # noqa: B023
            lambda: F.linear(there, stranger),  # noqa: B023
            lambda: torch._foreach_add([there], [stranger]),  # noqa: B023
        ):
            with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
                act()
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        here.add_(there)
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        F.embedding(torch.tensor([0]), there)
    with pytest.raises(RuntimeError):
        F.conv1d(torch.ones(1, 1, 3, device="mlu"), torch.ones(1, 1, 1))
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        torch.tensor(1.0).add_(torch.tensor(1.0, device="mlu"))
    with pytest.raises(RuntimeError, match="indices should be either on cpu"):
        here[torch.tensor([0], device="mlu")]


@check
def numbers_of_the_host_mix() -> None:
    """0-dim tensors of the host serve as numbers, and index tensors may be on the host, as on CUDA."""
    there = torch.ones(2, 2, device="mlu")
    assert (there + torch.tensor(1.0)).tolist() == [[2, 2], [2, 2]]
    assert torch.where(there > 0, there, torch.tensor(0.0)).is_mlu
    there.mul_(torch.tensor(3.0))
    there[torch.tensor([0])] = 7.0
    there.index_put_((torch.tensor([1]), torch.tensor([0])), torch.tensor(5.0, device="mlu"))
    assert there[torch.tensor([1])].tolist() == [[5, 3]]
    with pytest.raises(RuntimeError, match="Expected all tensors"):
        F.embedding(torch.tensor(0), there)


@check
def gradients_are_the_cpu_s() -> None:
    """A small network has the CPU's outputs and gradients, through views and in-place operators too."""
    (x, x_there), (w, w_there) = pair(4, 6), pair(5, 6, seed=1)

    def loss(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        h = F.gelu(F.linear(x, w)).clone()
        h[:, 1:3].mul_(2)
        h = F.layer_norm(h, (5,)).t().reshape(-1).sort().values
        return F.cross_entropy(h.view(4, 5), torch.arange(4, device=x.device)) + x.cumsum(0).abs().mean()

    on_cpu, on_mlu = loss(x, w), loss(x_there, w_there)
    on_cpu.backward()
    on_mlu.backward()
    torch.testing.assert_close(on_mlu.cpu(), on_cpu)
    torch.testing.assert_close(x_there.grad.cpu(), x.grad)
    torch.testing.assert_close(w_there.grad.cpu(), w.grad)


@check
def convolutions() -> None:
    """Convolutions and their gradients are the CPU's."""
    (x, x_there), (w, w_there) = pair(2, 4, 6, 6), pair(8, 2, 3, 3, seed=1)
    for at, weight in ((x, w), (x_there, w_there)):
        F.conv2d(at, weight, padding=1, stride=2, groups=2).square().sum().backward()
    torch.testing.assert_close(x_there.grad.cpu(), x.grad)
    torch.testing.assert_close(w_there.grad.cpu(), w.grad)


@check
def zero_tensors() -> None:
    """Gradients that torch knows to be zero have no memory and still serve."""
    x = torch.ones(3, device="mlu", requires_grad=True)
    (grad,) = torch.autograd.grad(x.sgn().sum() + x.sum(), x)
    assert grad.tolist() == [1, 1, 1]
    zeros = torch._efficientzerotensor((3,), device="mlu")
    assert (zeros + 1).tolist() == [1, 1, 1]
    assert torch.add(x.detach()[:0], 1).resize_(2).shape == (2,)


@check
def versions_guard_saved_tensors() -> None:
    """A tensor that backward needs and that was changed in place is found out."""
    x = torch.ones(2, device="mlu", requires_grad=True)
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@check
def inference_mode() -> None:
    """Results are inference tensors inside, and views of ordinary tensors stay ordinary."""
    x = torch.ones(2, 2, device="mlu")
    with torch.inference_mode():
        assert (x + 1).is_inference()
        assert not x.t().is_inference()


@check
def float64_is_float32_inside() -> None:
    """float64 keeps its name and has float32's values, also after a copy and in place."""
    third = torch.ones(1, dtype=torch.float64, device="mlu") / 3
    assert third.dtype == torch.float64
    assert third.item() == torch.tensor(1 / 3, dtype=torch.float32).item()
    copied = torch.tensor([0.1], dtype=torch.float64).to("mlu")
    assert copied.item() == torch.tensor(0.1, dtype=torch.float32).item()
    total = torch.ones(1, dtype=torch.float64, device="mlu").add_(1e-9)
    assert total.item() == 1.0
    assert torch.ones(1, dtype=torch.float64, device="mlu").expand(3).sum().item() == 3


@check
def dtypes_without_a_record_raise() -> None:
    """complex128 raises, and so does arithmetic in float8 on a chip of capability 5; bytes may be moved."""
    with pytest.raises(NotImplementedError, match="complex128 was asked on an MLU"):
        torch.zeros(1, dtype=torch.complex128, device="mlu")
    with pytest.raises(NotImplementedError, match="complex128"):
        torch.zeros(1, dtype=torch.complex64, device="mlu").to(torch.complex128)
    eighth = torch.ones(2, device="mlu").to(torch.float8_e4m3fn)
    assert eighth.view(torch.uint8).cpu().view(torch.float8_e4m3fn).float().tolist() == [1, 1]
    with pytest.raises(NotImplementedError, match="from capability 6 on"):
        eighth.sum()
    with pytest.raises(NotImplementedError, match="strided"):
        torch.eye(2, device="mlu").to_sparse()


@check
def checkpoints() -> None:
    """torch.save and torch.load keep the device, or take the one that map_location names."""
    file = io.BytesIO()
    torch.save({"x": torch.arange(3, device="mlu:1")}, file)
    for where, wanted in ((None, "mlu:1"), ("cpu", "cpu"), ("mlu:2", "mlu:2")):
        file.seek(0)
        assert str(torch.load(file, map_location=where)["x"].device) == wanted


@check
def storages() -> None:
    """Storages grow, shrink to nothing and are shared by set_, as FSDP needs it."""
    x = torch.arange(4.0, device="mlu")
    storage = x.untyped_storage()
    storage.resize_(0)
    assert storage.size() == 0
    storage.resize_(16)
    x.fill_(3)
    y = torch.empty(0, device="mlu").set_(storage, 0, (2, 2))
    y[0, 0] = 9
    assert x.tolist() == [9, 3, 3, 3]
    assert copy.deepcopy(x).untyped_storage().data_ptr() != storage.data_ptr()


@check
def pinned_memory() -> None:
    """pin_memory() gives host tensors that know that they are pinned."""
    pinned = torch.ones(3).pin_memory()
    assert pinned.is_pinned()
    assert not torch.ones(3).is_pinned()
    assert pinned.to("mlu", non_blocking=True).tolist() == [1, 1, 1]
    with pytest.raises(RuntimeError, match="pinned"):
        torch.empty(3, device="mlu", pin_memory=True)
