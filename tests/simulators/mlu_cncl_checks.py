"""Collectives of two simulated MLUs; run on both ranks by test_mlu_cncl.py."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.simulators.mlu_process import check

RANK = int(os.environ.get("RANK", "0"))
DEVICE = f"mlu:{RANK}"


def here(*values: float, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor on this rank's device."""
    return torch.tensor(values, device=DEVICE).to(dtype)


def backend() -> Any:
    """The process group's part for MLUs."""
    return dist.distributed_c10d._get_default_group()._get_backend(torch.device(DEVICE))


@check
def starts() -> None:
    """init_process_group("cncl") makes a ProcessGroupCNCL; its options are ignored."""
    torch.mlu.set_device(RANK)
    options = dist.ProcessGroupCNCL.Options(is_high_priority_stream=True)
    store = f"file://{os.environ['CNCL_STORE']}"
    dist.init_process_group("cncl", init_method=store, rank=RANK, world_size=2, pg_options=options)
    assert dist.get_backend() == "cncl"
    assert type(backend()) is dist.ProcessGroupCNCL
    assert isinstance(backend().get_cncl_comm(RANK), int)
    with pytest.raises(ValueError, match="takes this rank"):
        backend().get_cncl_comm(1 - RANK)
    with pytest.raises(TypeError):
        dist.ProcessGroupCNCL.Options(config=None)


@check
def reductions() -> None:
    """SUM, MIN, MAX and PRODUCT reduce every dtype of CNCL; SUM of bools is their MAX."""
    kinds = (torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
    for dtype in (*kinds, torch.float64):
        for op, wanted in (("SUM", 5), ("MIN", 2), ("MAX", 3), ("PRODUCT", 6)):
            x = here(2 + RANK, dtype=dtype)
            dist.all_reduce(x, getattr(dist.ReduceOp, op))
            assert (x.item(), x.dtype) == (wanted, dtype)
    flags = here(1, RANK, 0).bool()
    dist.all_reduce(flags)
    assert flags.view(torch.uint8).tolist() == [1, 1, 0]


@check
def float64_travels_as_float32() -> None:
    """CNCL reduces double as float."""
    x = here(1.0 if RANK else 2.0**-30, dtype=torch.float64)
    dist.all_reduce(x)
    assert x.item() == 1.0


@check
def other_reductions_raise() -> None:
    """AVG, the bitwise ones and PREMUL_SUM raise in every collective that reduces."""
    ops = {name: getattr(dist.ReduceOp, name) for name in ("AVG", "BAND", "BOR", "BXOR")}
    for name, op in (ops | {"PREMUL_SUM": dist._make_nccl_premul_sum(2.0)}).items():
        for act in (
            lambda op=op: dist.all_reduce(here(1, 2), op),
            lambda op=op: dist.reduce(here(1, 2), 0, op),
            lambda op=op: dist.reduce_scatter_tensor(here(1), here(1, 2), op),
            lambda op=op: dist.reduce_scatter(here(1), [here(1), here(2)], op),
        ):
            with pytest.raises(ValueError, match=f"Cannot use ReduceOp.{name} with CNCL"):
                act()


@check
def other_tensors_raise() -> None:
    """int16, complex and float8 raise, and so do the host's tensors and those that are not contiguous."""
    for dtype in (torch.int16, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2):
        with pytest.raises(TypeError, match="not supported for CNCL"):
            backend().broadcast([here(1, 2, dtype=dtype)], dist.BroadcastOptions())
    with pytest.raises(RuntimeError, match="No backend type associated with device type cpu"):
        dist.all_reduce(torch.ones(2))
    with pytest.raises(RuntimeError, match="takes tensors on mlu"):
        backend().allreduce([torch.ones(2)], dist.AllreduceOptions())
    with pytest.raises((RuntimeError, ValueError), match="must be contiguous"):
        dist.all_reduce(torch.ones(2, 4, device=DEVICE).t())
    with pytest.raises(NotImplementedError, match="recvAnysource"):
        dist.recv(here(1))
    with pytest.raises(NotImplementedError, match="Not supported yet"):
        backend().allgather_coalesced([[here(1), here(1)]], [here(1)])


@check
def gathers_and_scatters() -> None:
    """Gathers and scatters, whole tensors and lists, give each rank its part and leave inputs alone."""
    mine = here(RANK, RANK + 10)
    whole = torch.empty(4, device=DEVICE)
    dist.all_gather_into_tensor(whole, mine)
    assert whole.tolist() == [0, 10, 1, 11]
    parts = [torch.empty(2, device=DEVICE) for _ in range(2)]
    dist.all_gather(parts, mine)
    assert [part.tolist() for part in parts] == [[0, 10], [1, 11]]
    part = torch.empty(1, device=DEVICE)
    for act in (dist.reduce_scatter_tensor, lambda to, x: dist.reduce_scatter(to, list(x.chunk(2)))):
        act(part, mine)
        assert part.tolist() == [[1], [21]][RANK]
        assert mine.tolist() == [RANK, RANK + 10]
    dist.gather(mine, parts if RANK == 0 else None)
    dist.scatter(part, [here(5), here(6)] if RANK == 0 else None)
    assert part.tolist() == [5 + RANK]
    dist.broadcast(mine, 1)
    assert mine.tolist() == [1, 11]


@check
def all_to_all() -> None:
    """all_to_all exchanges equal and unequal parts, of one tensor and of lists."""
    whole = torch.empty(2, device=DEVICE)
    dist.all_to_all_single(whole, here(10 * RANK, 10 * RANK + 1))
    assert whole.tolist() == [RANK, 10 + RANK]
    sizes = [[1, 1], [2, 2]][RANK]
    uneven = torch.empty(sum(sizes), device=DEVICE)
    dist.all_to_all_single(uneven, here(*(10 * RANK + i for i in range(3))), sizes, [1, 2])
    assert uneven.tolist() == [[0, 10], [1, 2, 11, 12]][RANK]
    parts = [torch.empty(2, device=DEVICE), torch.empty(2, device=DEVICE)]
    dist.all_to_all(parts, [here(RANK, 0), here(RANK, 1)])
    assert [part.tolist() for part in parts] == [[0, RANK], [1, RANK]]


@check
def point_to_point() -> None:
    """send and recv, alone and in a batch."""
    other = torch.empty(3, device=DEVICE)
    acts = [dist.P2POp(dist.isend, here(RANK, RANK, RANK), 1 - RANK), dist.P2POp(dist.irecv, other, 1 - RANK)]
    for work in dist.batch_isend_irecv(acts):
        work.wait()
    assert other.tolist() == [1 - RANK] * 3
    if RANK == 0:
        dist.send(here(7), 1)
    else:
        dist.recv(other[:1], 0)
        assert other[0].item() == 7


@check
def work_in_flight() -> None:
    """Async work has futures on the device, and coalesced collectives finish together."""
    x, y = here(1, 2), here(3)
    work = dist.all_reduce(x, async_op=True)
    assert work.get_future().wait()[0].tolist() == [2, 4]
    assert work.is_completed()
    with dist._coalescing_manager(device=torch.device(DEVICE), async_ops=True) as both:
        dist.all_reduce(x)
        dist.all_reduce(y)
    both.wait()
    assert (x.tolist(), y.tolist()) == ([4, 8], [6])
    gathered = [torch.empty(2, device=DEVICE), torch.empty(4, device=DEVICE)]
    with dist._coalescing_manager(device=torch.device(DEVICE)):
        dist.all_gather_into_tensor(gathered[0], here(RANK))
        dist.all_gather_into_tensor(gathered[1], here(RANK, 2))
    assert [t.tolist() for t in gathered] == [[0, 1], [0, 2, 1, 2]]
    dist.barrier()


@check
def objects_and_hybrid_groups() -> None:
    """Objects travel over the device; a group "cpu:gloo,mlu:cncl" takes both kinds of tensor."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, {"rank": RANK})
    assert found == [{"rank": 0}, {"rank": 1}]
    group = dist.new_group(backend="cpu:gloo,mlu:cncl")
    for x in (torch.ones(1), here(1)):
        dist.all_reduce(x, group=group)
        assert x.item() == 2


def network() -> torch.nn.Module:
    """A small network, the same every time."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))


def batch() -> torch.Tensor:
    """What the ranks share."""
    return torch.randn(4, 4, generator=torch.Generator().manual_seed(1))


def expected_gradients() -> list[torch.Tensor]:
    """Of the whole batch on the CPU."""
    net = network()
    net(batch()).square().mean().backward()
    return [parameter.grad for parameter in net.parameters()]


@check
def data_parallel() -> None:
    """DistributedDataParallel averages gradients to those of the whole batch, with buckets overlapping."""
    net = DistributedDataParallel(network().to(DEVICE), device_ids=[RANK], bucket_cap_mb=1e-4)
    net(batch()[2 * RANK : 2 * RANK + 2].to(DEVICE)).square().mean().backward()
    for parameter, expected in zip(net.parameters(), expected_gradients(), strict=True):
        torch.testing.assert_close(parameter.grad.cpu(), expected)


@check
def sharded_data_parallel() -> None:
    """FSDP2 asks for AVG and so fails on CNCL as it is; told to SUM, it gives the batch's gradients."""
    mesh = init_device_mesh("mlu", (2,))
    for repaired in (False, True):
        net = copy.deepcopy(network()).to(DEVICE)
        fully_shard(net[0], mesh=mesh)
        fully_shard(net, mesh=mesh)
        for part in (net[0], net):
            part.set_force_sum_reduction_for_comms(repaired)
        loss = net(batch()[2 * RANK : 2 * RANK + 2].to(DEVICE)).square().mean()
        if not repaired:
            with pytest.raises(ValueError, match="Cannot use ReduceOp.AVG with CNCL"):
                loss.backward()
            continue
        loss.backward()
        for parameter, expected in zip(net.parameters(), expected_gradients(), strict=True):
            torch.testing.assert_close(parameter.grad.full_tensor().cpu(), expected)


@check
def ends() -> None:
    """destroy_process_group ends it."""
    dist.destroy_process_group()
    assert not dist.is_initialized()
