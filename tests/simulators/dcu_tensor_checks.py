"""Tensors of a simulated DCU; run by test_dcu_device.py."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch.nn import functional as F

from tests.simulators.dcu_process import check


def pair(*shape: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """The same random numbers on the CPU and on the device, both wanting a gradient."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    return values.clone().requires_grad_(), values.cuda().requires_grad_()


@check
def factories() -> None:
    """Tensors are made on the device, on the current one where none is named."""
    with torch.cuda.device(1):
        assert torch.zeros(2, device="cuda").device == torch.device("cuda:1")
    assert torch.arange(3, device="cuda:2").tolist() == [0, 1, 2]
    assert torch.full((2,), 7.0, device=0).device == torch.device("cuda:0")
    assert torch.tensor([1, 2], device="cuda").dtype == torch.int64
    assert torch.ones(2, 3, device="cuda").type() == "torch.cuda.FloatTensor"
    assert torch.empty(2, 3, device="cuda", memory_format=torch.contiguous_format).is_cuda
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.zeros(1, device="cuda:8")


@check
def moving() -> None:
    """Values survive the way to the device, between devices and back, in every dtype."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool, torch.complex64):
        values = torch.arange(6).reshape(2, 3).to(dtype)
        there = values.cuda()
        assert (there.device.type, there.dtype) == ("cuda", dtype)
        assert torch.equal(there.to("cuda:1").cpu(), values)
        assert torch.equal(values.t().to("cuda").cpu(), values.t())
    target = torch.zeros(2, 3, device="cuda")
    target.copy_(torch.ones(2, 3))
    assert float(target.sum()) == 6.0


@check
def views_alias() -> None:
    """Views share memory with their base: on the device a write to one is seen in the other."""
    base = torch.zeros(4, 4, device="cuda")
    for view in (base[1], base.t()[2], base.view(16)[3:5], base.unfold(0, 2, 2), base.diagonal(), base.expand(2, 4, 4)):
        assert view.untyped_storage().data_ptr() == base.untyped_storage().data_ptr()
    base.view(16)[3:5] += 1
    base[1].fill_(2)
    base.t()[0].mul_(3)
    assert base.cpu().tolist() == [[0, 0, 0, 1], [6, 2, 2, 2], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert base.reshape(2, 8)._base is base


@check
def in_place_and_out() -> None:
    """In-place operators return their tensor, out= grows where it must, and version counters move."""
    x = torch.ones(3, device="cuda")
    before, version = x.data_ptr(), x._version
    assert x.add_(1).mul_(2) is x
    assert (x.data_ptr(), x.tolist(), x._version > version) == (before, [4.0, 4.0, 4.0], True)
    out = torch.empty(0, device="cuda")
    assert torch.mm(torch.ones(2, 3, device="cuda"), torch.ones(3, 2, device="cuda"), out=out) is out
    assert out.tolist() == [[3.0, 3.0], [3.0, 3.0]]
    x.resize_(5)
    assert (x.shape, x[:3].tolist()) == ((5,), [4.0, 4.0, 4.0])


@check
def gradients_equal_the_cpus() -> None:
    """Forward and backward of common layers give the CPU's numbers."""
    layer = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.GELU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 4), torch.nn.SiLU()
    )
    twin = copy.deepcopy(layer).cuda()
    here, there = pair(5, 8)
    F.cross_entropy(layer(here), torch.arange(5) % 4).backward()
    F.cross_entropy(twin(there), (torch.arange(5) % 4).cuda()).backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad)
    for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(theirs.grad.cpu(), mine.grad)


@check
def convolutions_and_embeddings() -> None:
    """Convolution, depthwise too, batch norm, embedding and index_put have forward and backward."""
    here, there = pair(2, 4, 6, 6)
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3, groups=4), torch.nn.BatchNorm2d(4), torch.nn.Conv2d(4, 2, 1))
    twin = copy.deepcopy(model).cuda()
    model(here).square().sum().backward(), twin(there).square().sum().backward()
    assert there.grad is not None
    torch.testing.assert_close(there.grad.cpu(), here.grad, rtol=1e-4, atol=1e-5)
    table = torch.nn.Embedding(5, 3).cuda()
    table(torch.tensor([1, 1, 2], device="cuda")).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad.sum(1).tolist() == [0.0, 6.0, 3.0, 0.0, 0.0]
    x = torch.zeros(4, device="cuda")
    x[torch.tensor([0, 2])] = 1.0  # indices of the host are taken, as on CUDA
    x.index_add_(0, torch.tensor([0], device="cuda"), torch.ones(1, device="cuda"))
    assert x.tolist() == [2.0, 0.0, 1.0, 0.0]


@check
def mixed_devices_raise() -> None:
    """Tensors of the host and of the device, or of two devices, do not meet; numbers of 0 dimensions may."""
    x, host, other = torch.ones(3, device="cuda"), torch.ones(3), torch.ones(3, device="cuda:1")
    for act in (lambda: x + host, lambda: host + x, lambda: x @ host, lambda: torch.cat([x, host])):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device.*cpu"):
            act()
    with pytest.raises(RuntimeError, match=r"same device.*cuda:0.*cuda:1|same device.*cuda:1.*cuda:0"):
        _ = x + other
    with pytest.raises(RuntimeError, match="same device"):
        host.add_(x)
    assert (x + torch.tensor(2.0)).tolist() == [3.0, 3.0, 3.0]
    with pytest.raises(TypeError, match="can't convert cuda:0 device type tensor to numpy"):
        x.numpy()


@check
def what_the_cpu_has_not_raises() -> None:
    """Operators without a kernel of the CPU, and layouts other than strided, say that they are not modelled."""
    x = torch.ones(2, 2, device="cuda")
    with pytest.raises(NotImplementedError, match="aten::_fused_dropout was called on cuda"):
        torch.ops.aten._fused_dropout(x, 0.5)
    with pytest.raises((NotImplementedError, RuntimeError), match="Sparse"):
        x.to_sparse()
    with pytest.raises(NotImplementedError, match="no float8 matrix product"):
        eight = torch.ones(16, 16, device="cuda").to(torch.float8_e4m3fn)
        one = torch.ones((), device="cuda")
        torch._scaled_mm(eight, eight.t(), one, one)


@check
def checkpoints() -> None:
    """torch.save and torch.load keep devices, and map_location moves them."""
    file = io.BytesIO()
    torch.save({"w": torch.arange(3.0, device="cuda:1"), "n": 2}, file)
    for location, device in ((None, "cuda:1"), ("cpu", "cpu"), ("cuda:0", "cuda:0"), ({"cuda:1": "cuda:2"}, "cuda:2")):
        file.seek(0)
        found = torch.load(file, map_location=location, weights_only=True)
        assert (str(found["w"].device), found["w"].tolist()) == (device, [0.0, 1.0, 2.0])
    file = io.BytesIO()
    torch.save(torch.ones(2), file)
    file.seek(0)
    assert torch.load(file, map_location=lambda storage, tag: storage.cuda(3)).device.index == 3
    assert copy.deepcopy(torch.ones(2, device="cuda")).device.type == "cuda"


@check
def storages() -> None:
    """A storage of the device can be emptied and filled again, as FSDP does."""
    x = torch.arange(4.0, device="cuda")
    x.untyped_storage().resize_(32)
    assert (x.tolist(), x.untyped_storage().nbytes()) == ([0.0, 1.0, 2.0, 3.0], 32)
    x.untyped_storage().resize_(0)
    assert x.untyped_storage().nbytes() == 0
    x.untyped_storage().resize_(16)
    x.copy_(torch.ones(4))
    assert (x.sum().item(), x.untyped_storage().device) == (4.0, torch.device("cuda:0"))


@check
def printing_and_interpreting() -> None:
    """A tensor prints its device, item() and control flow read it, and eager torch.compile runs it."""
    x = torch.tensor([1.0, 2.0], device="cuda")
    assert repr(x) == "tensor([1., 2.], device='cuda:0')"
    assert bool(x.sum() > 2)
    assert float(torch.compile(lambda t: t * 2 + 1, backend="eager")(x).sum()) == 8.0
