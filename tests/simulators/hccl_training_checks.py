"""Data-parallel training on the simulated NPU against the same training on one CPU; run by test_npu_hccl.py."""

from __future__ import annotations

import torch
import torch.distributed as dist
from hccl_ranks import check
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

BATCH, WIDTH, STEPS = 4, 32, 3


def model() -> torch.nn.Sequential:
    """Two layers, the same on every rank and device."""
    torch.manual_seed(0)
    gelu = torch.nn.GELU("tanh")  # an NPU computes no other without TORCH_NPU_USE_COMPATIBLE_IMPL
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 2 * WIDTH), gelu, torch.nn.Linear(2 * WIDTH, WIDTH))


def batches(size: int) -> torch.Tensor:
    """Inputs of all ranks, [steps, size * batch, width]."""
    return torch.randn(STEPS, size * BATCH, WIDTH, generator=torch.Generator().manual_seed(1))


def own(x: torch.Tensor, rank: int) -> torch.Tensor:
    """A rank's part of a batch, on its device."""
    return x[rank * BATCH : (rank + 1) * BATCH].to("npu")


def trained_on_cpu(size: int) -> tuple[torch.nn.Module, list[float]]:
    """The model after all steps on the whole batch, and its losses."""
    net = model()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for x in batches(size):
        optimizer.zero_grad()
        loss = net(x).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return net, losses


@check
def ddp_gradients(rank: int, size: int) -> None:
    """DDP's gradients are those of the whole batch on one CPU, also with several buckets and no_sync."""
    whole = batches(size)[0]
    plain = model()
    plain(whole).square().mean().backward()
    net = DistributedDataParallel(model().to("npu"), device_ids=[rank], bucket_cap_mb=0.005)
    net(own(whole, rank)).square().mean().backward()
    expected = dict(plain.named_parameters())
    for name, parameter in net.module.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), expected[name].grad)
    with net.no_sync():
        net(own(whole, rank)).square().mean().backward()
    net(own(whole, rank)).square().mean().backward()
    for name, parameter in net.module.named_parameters():
        torch.testing.assert_close(parameter.grad.cpu(), 3 * expected[name].grad)


@check
def fsdp2_steps(rank: int, size: int) -> None:
    """Three AdamW steps under FSDP2 give the losses and the parameters of one CPU."""
    expected, losses = trained_on_cpu(size)
    net = model().to("npu")
    mesh = init_device_mesh("npu", (size,))
    for layer in (net[0], net[2]):
        fully_shard(layer, mesh=mesh)
    fully_shard(net, mesh=mesh)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    for x, expected_loss in zip(batches(size), losses, strict=True):
        optimizer.zero_grad()
        loss = net(own(x, rank)).square().mean()
        loss.backward()
        optimizer.step()
        dist.all_reduce(mean := loss.detach().clone(), dist.ReduceOp.AVG)
        torch.testing.assert_close(mean.cpu(), torch.tensor(expected_loss))
    for (name, parameter), reference in zip(net.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(parameter.full_tensor().cpu(), reference, rtol=1e-4, atol=1e-5, msg=name)
