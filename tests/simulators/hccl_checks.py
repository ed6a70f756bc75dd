"""Collectives of the real ProcessGroupHCCL over the simulated HCCL; run by test_npu_hccl.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from hccl_ranks import check, report
from torch.distributed.distributed_c10d import _coalescing_manager

REDUCIBLE = (torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32)
COPIED = (*REDUCIBLE, torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
REDUCTIONS = {
    dist.ReduceOp.SUM: lambda parts: parts.sum(0),
    dist.ReduceOp.PRODUCT: lambda parts: parts.prod(0),
    dist.ReduceOp.MAX: lambda parts: parts.amax(0),
    dist.ReduceOp.MIN: lambda parts: parts.amin(0),
}
DIRECT, IN_TWO_STEPS = 1000, 50_001  # elements: below and above the size at which the algorithm changes


def numbers(rank: int, count: int, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """Numbers that every rank can compute of every other."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(count, generator=generator) * 3).to(dtype).to(device)


def reduced(size: int, count: int, dtype: torch.dtype, reduction: dist.ReduceOp.RedOpType) -> torch.Tensor:
    """The reduction over all ranks: wide, from the left, rounded once."""
    parts = torch.stack([numbers(rank, count, dtype) for rank in range(size)])
    wide = parts.float() if dtype.is_floating_point else parts.long()
    return REDUCTIONS[reduction](wide).to(dtype)


def same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the last bit; a sum in another order may differ in float32."""
    tolerance = {"rtol": 1e-6, "atol": 1e-6} if expected.dtype == torch.float32 else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(actual.cpu(), expected, **tolerance)


@check
def all_reduce(rank: int, size: int) -> None:
    """all_reduce of each dtype with each reduction, small and large, is the reduction computed on one rank."""
    for count in (1, DIRECT, IN_TWO_STEPS):
        for dtype in REDUCIBLE:
            for reduction in REDUCTIONS:
                x = numbers(rank, count, dtype, "npu")
                dist.all_reduce(x, reduction)
                same(x, reduced(size, count, dtype, reduction))


@check
def all_reduce_is_the_same_on_all_ranks(rank: int, size: int) -> None:
    """Every rank gets the same bits."""
    for count in (DIRECT, IN_TWO_STEPS):
        x = numbers(rank, count, torch.float32, "npu")
        dist.all_reduce(x)
        everybody = [torch.empty_like(x) for _ in range(size)]
        dist.all_gather(everybody, x)
        assert all(torch.equal(one.cpu(), x.cpu()) for one in everybody)


@check
def sixteen_bits_at_the_edges(rank: int, size: int) -> None:
    """Sums of every bit pattern of fp16 and bf16, subnormal, infinite and NaN: float32 inside, rounded once."""
    for dtype in (torch.float16, torch.bfloat16):
        patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        parts = [patterns.roll(one * 131) for one in range(size)]  # near enough in size that sums must be rounded
        expected = parts[0].float()
        for part in parts[1:]:
            expected = expected + part.float()
        x = parts[rank].to("npu")
        dist.all_reduce(x)
        torch.testing.assert_close(x.cpu(), expected.to(dtype), rtol=0, atol=0, equal_nan=True)


@check
def largest_and_nan(rank: int, size: int) -> None:
    """A NaN of any rank wins in max and min, in whichever order it comes."""
    for reduction in (dist.ReduceOp.MAX, dist.ReduceOp.MIN):
        x = torch.full((size,), float(rank), device="npu")
        x[rank] = float("nan")
        dist.all_reduce(x, reduction)
        assert x.isnan().all().item()


@check
def all_reduce_of_bytes(rank: int, size: int) -> None:
    """uint8 and bool are reduced through int32, as torch_npu does."""
    x = torch.tensor([rank, 1, 2], dtype=torch.uint8, device="npu")
    dist.all_reduce(x)
    assert x.tolist() == [sum(range(size)), size, 2 * size]
    flags = torch.tensor([rank == 0, False, True], device="npu")
    dist.all_reduce(flags)
    assert flags.tolist() == [True, False, True]


@check
def average(rank: int, size: int) -> None:
    """AVG is a sum that torch_npu divides; an integer tensor raises there."""
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((5,), float(rank + 1), device="npu", dtype=dtype)
        dist.all_reduce(x, dist.ReduceOp.AVG)
        assert x.tolist() == [(size + 1) / 2] * 5


@check
def asynchronous(rank: int, size: int) -> None:
    """Many collectives in flight finish in order, and the work of the stream after wait() sees their results."""
    tensors = [torch.full((4096,), float(rank + i), device="npu") for i in range(20)]
    works = [dist.all_reduce(x, async_op=True) for x in tensors]
    for i, (x, work) in enumerate(zip(tensors, works, strict=True)):
        work.wait()
        assert (x + 1).cpu().unique().tolist() == [sum(range(size)) + size * i + 1]
    torch.npu.synchronize()
    assert all(work.is_completed() for work in works)


@check
def all_gather(rank: int, size: int) -> None:
    """all_gather, into a list and into a tensor, of every dtype that HCCL moves."""
    for dtype in COPIED:
        expected = [torch.arange(3).add(one).to(dtype) for one in range(size)]
        x = expected[rank].to("npu")
        parts = [torch.empty(3, dtype=dtype, device="npu") for _ in range(size)]
        dist.all_gather(parts, x)
        assert [part.cpu().tolist() for part in parts] == [one.tolist() for one in expected]
        whole = torch.empty(3 * size, dtype=dtype, device="npu")
        dist.all_gather_into_tensor(whole, x)
        assert whole.cpu().tolist() == [value for one in expected for value in one.tolist()]


@check
def all_gather_of_uneven_parts(rank: int, size: int) -> None:
    """all_gather of parts of different lengths."""
    parts = [torch.empty(one + 1, device="npu") for one in range(size)]
    dist.all_gather(parts, torch.full((rank + 1,), float(rank), device="npu"))
    assert [part.tolist() for part in parts] == [[float(one)] * (one + 1) for one in range(size)]


@check
def reduce_scatter(rank: int, size: int) -> None:
    """reduce_scatter of a tensor and of lists, with each reduction."""
    for dtype in (torch.int8, torch.int32, torch.float16, torch.bfloat16, torch.float32):
        for reduction in REDUCTIONS:
            out = torch.empty(7, dtype=dtype, device="npu")
            dist.reduce_scatter_tensor(out, numbers(rank, 7 * size, dtype, "npu"), reduction)
            same(out, reduced(size, 7 * size, dtype, reduction)[7 * rank : 7 * rank + 7])
    out = torch.empty(2, device="npu")
    dist.reduce_scatter(out, [torch.full((2,), float(one + rank), device="npu") for one in range(size)])
    assert out.tolist() == [float(size * rank + sum(range(size)))] * 2


@check
def reduce_scatter_of_uneven_parts(rank: int, size: int) -> None:
    """reduce_scatter whose ranks get parts of different lengths."""
    parts = [torch.full((one + 1,), float(rank + one), device="npu") for one in range(size)]
    out = torch.empty(rank + 1, device="npu")
    dist.reduce_scatter(out, parts)
    assert out.tolist() == [float(sum(range(size)) + size * rank)] * (rank + 1)


@check
def rooted(rank: int, size: int) -> None:
    """broadcast, reduce, scatter and gather, with each rank as the root."""
    for root in range(size):
        x = torch.full((3,), float(rank), device="npu")
        dist.broadcast(x, root)
        assert x.tolist() == [float(root)] * 3
        x = torch.full((3,), float(rank + 1), device="npu")
        dist.reduce(x, root)
        if rank == root:
            assert x.tolist() == [size * (size + 1) / 2] * 3
        parts = [torch.full((2,), float(one), device="npu") for one in range(size)]
        out = torch.empty(2, device="npu")
        dist.scatter(out, parts if rank == root else None, root)
        assert out.tolist() == [float(rank)] * 2
        gathered = [torch.empty(2, device="npu") for _ in range(size)] if rank == root else None
        dist.gather(out, gathered, root)
        if gathered is not None:
            assert [part.tolist() for part in gathered] == [[float(one)] * 2 for one in range(size)]


@check
def all_to_all(rank: int, size: int) -> None:
    """all_to_all of a tensor in even and uneven parts, and of lists."""
    x = torch.arange(size, device="npu") + 10 * rank
    out = torch.empty_like(x)
    dist.all_to_all_single(out, x)
    assert out.tolist() == [10 * one + rank for one in range(size)]
    sends = [one + 1 for one in range(size)]
    x = torch.cat([torch.full((one + 1,), float(10 * rank + one)) for one in range(size)]).to("npu")
    out = torch.empty(size * (rank + 1), device="npu")
    dist.all_to_all_single(out, x, [rank + 1] * size, sends)
    assert out.tolist() == [float(10 * one + rank) for one in range(size) for _ in range(rank + 1)]
    parts = [torch.empty(rank + 1, device="npu") for _ in range(size)]
    dist.all_to_all(parts, list(x.split(sends)))
    assert torch.equal(torch.cat(parts).cpu(), out.cpu())


@check
def messages(rank: int, size: int) -> None:
    """send and recv around the ring, one after the other and in a batch."""
    after, before = (rank + 1) % size, (rank - 1) % size
    for count in (1, IN_TWO_STEPS):
        x = torch.full((count,), float(rank), device="npu")
        out = torch.empty_like(x)
        if rank == 0:
            dist.send(x, after)
            dist.recv(out, before)
        else:
            dist.recv(out, before)
            dist.send(x, after)
        assert out.cpu().unique().tolist() == [float(before)]
        out.zero_()
        for work in dist.batch_isend_irecv([dist.P2POp(dist.isend, x, after), dist.P2POp(dist.irecv, out, before)]):
            work.wait()
        assert out.cpu().unique().tolist() == [float(before)]


@check
def objects(rank: int, size: int) -> None:
    """Objects travel, and a barrier is passed."""
    found: list[object] = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": one} for one in range(size)]
    sent = [("of", 0)] if rank == 0 else [None]
    dist.broadcast_object_list(sent, 0)
    assert sent == [("of", 0)]
    dist.barrier()


@check
def coalesced(rank: int, size: int) -> None:
    """Collectives and messages between the start and the end of a group, in which order does not matter."""
    device = torch.device("npu", rank)
    tensors = [torch.full((3,), float(rank + i), device="npu") for i in range(4)]
    with _coalescing_manager(device=device):
        for x in tensors:
            dist.all_reduce(x)
    assert [x.tolist() for x in tensors] == [[float(sum(range(size)) + size * i)] * 3 for i in range(4)]
    out = [torch.empty(2 * size, device="npu") for _ in range(2)]
    with _coalescing_manager(device=device, async_ops=True) as manager:
        for i, whole in enumerate(out):
            dist.all_gather_into_tensor(whole, torch.full((2,), float(rank + i), device="npu"))
    manager.wait()
    assert [x.tolist() for x in out] == [[float(one + i) for one in range(size) for _ in range(2)] for i in range(2)]


@check
def sub_groups(rank: int, size: int) -> None:
    """Groups of some of the ranks, each with its own communicator, name and order of calls."""
    halves = [dist.new_group(list(range(start, start + size // 2))) for start in (0, size // 2)]
    mine = rank // (size // 2)
    x = torch.full((3,), float(rank), device="npu")
    dist.all_reduce(x, group=halves[mine])
    members = range(mine * (size // 2), (mine + 1) * (size // 2))
    assert x.tolist() == [float(sum(members))] * 3
    everybody = dist.new_group(list(range(size)))
    x = torch.ones(3, device="npu")
    dist.all_reduce(x, group=everybody)
    assert x.tolist() == [float(size)] * 3
    backend = everybody._get_backend(torch.device("npu"))
    names = [None] * size
    dist.all_gather_object(names, backend.get_hccl_comm_name(rank))
    assert len(set(names)) == 1


@check
def refused(rank: int, size: int) -> None:
    """What HCCL of an A2 cannot do raises before anything is sent, and the group still works."""
    double = torch.ones(2 * size, dtype=torch.float64, device="npu")
    small = torch.ones(2, dtype=torch.float64, device="npu")
    for dtype in (torch.uint8, torch.bool, torch.uint16, torch.uint32, torch.uint64):
        with pytest.raises(RuntimeError, match="nsupported data type"):
            out = torch.zeros(2, device="npu").to(dtype)
            dist.reduce_scatter_tensor(out, torch.zeros(2 * size, device="npu").to(dtype))
    for act in (lambda: dist.all_reduce(double), lambda: dist.reduce_scatter_tensor(small, double)):
        with pytest.raises(RuntimeError, match="nsupported data type"):
            act()
    for reduction in (dist.ReduceOp.BAND, dist.ReduceOp.BOR, dist.ReduceOp.BXOR):
        with pytest.raises(RuntimeError, match="Cannot use ReduceOp"):
            dist.all_reduce(torch.ones(2, dtype=torch.int32, device="npu"), reduction)
    with pytest.raises(RuntimeError, match="nsupported data type"):
        pair = torch.ones(2 * size, dtype=torch.complex64).to("npu")
        dist.reduce_scatter_tensor(pair[:2].clone(), pair)
    x = torch.ones(2, device="npu")
    dist.all_reduce(x)
    assert x.tolist() == [float(size)] * 2


@check
def buffers(rank: int, size: int) -> None:
    """Each communicator takes 2 x HCCL_BUFFSIZE of device memory, or 2 x P2P_HCCL_BUFFSIZE for messages."""
    free, known = torch.npu.mem_get_info()[0], {one["name"] for one in report()}
    group = dist.new_group(list(range(size)))
    x = torch.ones(256, device="npu")
    dist.all_reduce(x, group=group)
    torch.npu.synchronize()
    (new,) = [one for one in report() if one["name"] not in known]
    assert new["buffer_bytes"] == 2 * 64 * 2**20
    assert (new["rank"], new["ranks"], new["device"], new["calls"]) == (rank, size, rank, {"all_reduce": 1})
    assert new["bytes_sent"] == new["bytes_received"] == 1024 * (size - 1)
    assert free - torch.npu.mem_get_info()[0] >= 2 * 64 * 2**20
    (message := torch.ones(2, device="npu")).add_(rank)
    if rank < 2:
        (dist.send if rank == 0 else dist.recv)(message, 1 - rank)
        assert message.tolist() == [1.0, 1.0]
        pair = [one for one in report() if set(one["calls"]) & {"send", "recv"}]
        assert {one["buffer_bytes"] for one in pair} == {2 * 8 * 2**20}
