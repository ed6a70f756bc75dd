"""RCCL of simulated DCUs under the name nccl, on 2 ranks; run by test_dcu_rccl.py."""

from __future__ import annotations

import copy
import datetime
import os

import pytest
import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _coalescing_manager
from torch.nn.parallel import DistributedDataParallel

from tests.simulators.dcu_process import check


def rank() -> int:
    """This rank."""
    return int(os.environ["RANK"])


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of this rank's device."""
    return torch.ones(*shape, dtype=dtype, device="cuda")


@check
def starting() -> None:
    """init_process_group takes nccl with a device, and torch says that it has NCCL."""
    assert dist.is_nccl_available()
    torch.cuda.set_device(rank())
    store = dist.FileStore(os.environ["RCCL_STORE"], 2)
    device = torch.device("cuda", rank())
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group("nccl", store=store, rank=rank(), world_size=2, timeout=timeout, device_id=device)
    assert (dist.get_backend(), dist.get_world_size()) == ("nccl", 2)
    assert isinstance(dist.group.WORLD._get_backend(torch.device("cuda")), dist.ProcessGroupNCCL)
    dist.barrier()


@check
def reductions() -> None:
    """SUM, AVG, MIN, MAX and PRODUCT reduce in every dtype that RCCL carries."""
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8):
        for op, expected in (
            (dist.ReduceOp.SUM, 6), (dist.ReduceOp.AVG, 3), (dist.ReduceOp.MIN, 2), (dist.ReduceOp.MAX, 4),
            (dist.ReduceOp.PRODUCT, 8),
        ):  # fmt: skip
            x = ones(3, dtype=dtype) * (2 * rank() + 2)
            dist.all_reduce(x, op)
            assert x.tolist() == [expected] * 3, (dtype, op, x)
    flags = torch.tensor([rank() == 0, False], device="cuda")
    dist.all_reduce(flags)
    assert flags.tolist() == [True, False]
    x = ones(2) * (rank() + 1)
    dist.reduce(x, 1)
    assert rank() == 0 or x.tolist() == [3.0, 3.0]


@check
def gathering_and_scattering() -> None:
    """The collectives of lists and of whole tensors agree with each other."""
    x = torch.arange(2.0, device="cuda") + 10 * rank()
    parts = [torch.empty_like(x) for _ in range(2)]
    dist.all_gather(parts, x)
    whole = torch.empty(4, device="cuda")
    dist.all_gather_into_tensor(whole, x)
    assert torch.cat(parts).tolist() == whole.tolist() == [0.0, 1.0, 10.0, 11.0]
    mine, other = torch.empty(2, device="cuda"), torch.empty(2, device="cuda")
    dist.reduce_scatter_tensor(mine, whole, op=dist.ReduceOp.AVG)
    dist.reduce_scatter(other, list(whole.chunk(2)))
    assert torch.equal(mine, whole.chunk(2)[rank()])
    assert torch.equal(other, mine * 2)
    assert whole.tolist() == [0.0, 1.0, 10.0, 11.0]
    dist.broadcast(mine, 0)
    assert mine.tolist() == [0.0, 1.0]
    dist.scatter(other, [ones(2), ones(2) * 2] if rank() == 0 else None, src=0)
    assert other.tolist() == [rank() + 1.0] * 2
    found: list[object] = [None, None]
    dist.all_gather_object(found, {"rank": rank()})
    assert found == [{"rank": 0}, {"rank": 1}]


@check
def exchanging() -> None:
    """all_to_all, even and uneven, and batched sends and receives reach their rank."""
    x = torch.arange(4, device="cuda") + 10 * rank()
    y = torch.empty_like(x)
    dist.all_to_all_single(y, x)
    assert y.tolist() == [[0, 1, 10, 11], [2, 3, 12, 13]][rank()]
    parts = [torch.empty(2, dtype=torch.int64, device="cuda") for _ in range(2)]
    dist.all_to_all(parts, list(x.chunk(2)))
    assert torch.equal(torch.cat(parts), y)
    sizes = [[1, 3], [3, 1]][rank()]
    uneven = torch.empty(4, dtype=torch.int64, device="cuda")
    dist.all_to_all_single(uneven, x, sizes, sizes)  # rank 0 keeps 1 and sends 3
    assert uneven.tolist() == [[0, 10, 11, 12], [1, 2, 3, 13]][rank()]
    operations = [dist.P2POp(dist.isend, x, 1 - rank()), dist.P2POp(dist.irecv, y, 1 - rank())]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert y.tolist() == [10 * (1 - rank()) + i for i in range(4)]


@check
def asynchronous_work() -> None:
    """Work can be awaited later, in groups, and by its future."""
    x, y = ones(3), ones(2, dtype=torch.bfloat16)
    work = dist.all_reduce(x, async_op=True)
    assert work is not None
    work.wait()
    assert work.is_completed()
    with _coalescing_manager(async_ops=True) as manager:
        dist.all_reduce(x)
        dist.all_reduce(y)
    manager.wait()
    assert (x.tolist(), y.tolist()) == ([4.0] * 3, [2.0] * 2)
    future = dist.all_reduce(x, op=dist.ReduceOp.AVG, async_op=True).get_future()
    assert future.wait()[0].tolist() == [4.0] * 3


@check
def groups() -> None:
    """Groups take NCCL's options; gloo serves the host beside them, and hybrid backends split by device."""
    options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 4
    group = dist.new_group([0, 1], pg_options=options)
    x = ones(2)
    dist.all_reduce(x, group=group)
    assert x.tolist() == [2.0, 2.0]
    hybrid = dist.new_group([0, 1], backend="cpu:gloo,cuda:nccl")
    host = torch.ones(2)
    dist.all_reduce(x, group=hybrid)
    dist.all_reduce(host, group=hybrid)
    assert (x.tolist(), host.tolist()) == ([4.0, 4.0], [2.0, 2.0])
    with pytest.raises(AttributeError, match="stream_ptr"):
        _ = options.stream_ptr


@check
def limits() -> None:
    """Reductions and dtypes that RCCL has not, or that are not public, raise on every rank; so do host tensors."""
    x = ones(2, dtype=torch.int64)
    for op in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        with pytest.raises(ValueError, match="BAND, BOR or BXOR"):
            dist.all_reduce(x, op)
    with pytest.raises(TypeError, match="AVG with Boolean"):
        dist.all_reduce(x.bool(), dist.ReduceOp.AVG)
    for dtype in (torch.int16, torch.float8_e4m3fn):
        with pytest.raises(TypeError, match="Unconvertible NCCL type"):
            dist.all_reduce(x.to(dtype))
    with pytest.raises(RuntimeError, match="cpu|CPU"):
        dist.all_reduce(torch.ones(2))
    with pytest.raises((RuntimeError, ValueError), match="contiguous"):
        dist.all_reduce(ones(4, 4).t()[1:, :2])
    with pytest.raises(NotImplementedError, match="PREMUL_SUM"):
        dist.all_reduce(ones(2), dist._make_nccl_premul_sum(2.0))


@check
def data_parallel_training() -> None:
    """DDP and FSDP2 on two ranks end at the parameters of one process that sees both halves."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 2))
    data = torch.randn(4, 2, 6, 8)
    ddp = DistributedDataParallel(copy.deepcopy(model).cuda(), device_ids=[rank()])
    sharded = fully_shard(copy.deepcopy(model).cuda())
    ends = []
    for net, batches in ((model, data.flatten(1, 2)), (ddp, data[:, rank()].cuda()), (sharded, data[:, rank()].cuda())):
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
        for batch in batches:
            optimizer.zero_grad()
            net(batch).square().mean().backward()
            optimizer.step()
        ends.append([p.full_tensor() if hasattr(p, "full_tensor") else p for p in net.parameters()])
    for expected, *others in zip(*ends, strict=True):
        for found in others:
            torch.testing.assert_close(found.detach().cpu(), expected.detach(), rtol=1e-5, atol=1e-6)


@check
def ending() -> None:
    """The group is destroyed without a rest."""
    dist.barrier()
    dist.destroy_process_group()
    assert not dist.is_initialized()
