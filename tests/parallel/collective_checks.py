"""Collectives of a CUDA script on two ranks over gloo; run by test_collectives.py."""

from __future__ import annotations

import datetime

import pytest
import torch
import torch.distributed as dist
from on_ranks import check, main
from torch.distributed.distributed_c10d import _coalescing_manager


def ones(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor of the device."""
    return torch.ones(*shape, device="cuda").to(dtype)


def raises(kind: type[Exception], text: str, act) -> None:
    """The act raises that kind of error, with that text in it."""
    with pytest.raises(kind, match=text):
        act()


@check
def backend_names(rank: int, size: int) -> None:
    """A hybrid backend with nccl runs on gloo, nccl is said to be available, and each rank has its ordinal."""
    assert dist.get_backend() == "cpu:gloo"
    assert dist.is_nccl_available()
    assert dist.is_backend_available("nccl")
    assert dist.is_backend_available("NCCL")
    assert not dist.is_backend_available("nickel")
    assert torch.cuda.current_device() == rank
    assert torch.cuda.device_count() == size


@check
def groups_by_name(rank: int, size: int) -> None:
    """new_group takes nccl in every spelling, NCCL's options and a device, and computes."""
    from torch.distributed import ProcessGroupNCCL  # here: test_collectives.py imports this file without the facade

    options = ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 32
    for backend in ("nccl", "NCCL", dist.Backend.NCCL, "cuda:nccl", "cpu:gloo,cuda:nccl", "gloo", None):
        group = dist.new_group([0, 1], datetime.timedelta(minutes=2), backend, options)
        x = ones(2)
        dist.all_reduce(x, group=group)
        assert x.tolist() == [2.0, 2.0]
    assert dist.new_group(backend="nccl", device_id=torch.device("cuda", rank)) is not None


@check
def premul_all_reduce(rank: int, size: int) -> None:
    """all_reduce with PREMUL_SUM multiplies each input by its factor, a number or a tensor, and sums."""
    for factor in (0.5, torch.tensor([0.5])):
        x = ones(4) * (rank + 1)
        dist.all_reduce(x, op=dist._make_nccl_premul_sum(factor))
        assert x.tolist() == [1.5] * 4
    x = ones(4)
    work = dist.all_reduce(x, dist._make_nccl_premul_sum(0.25), async_op=True)
    work.wait()
    assert x.tolist() == [0.5] * 4


@check
def premul_reduce(rank: int, size: int) -> None:
    """reduce with PREMUL_SUM gives dst the sum and leaves the other ranks' inputs alone."""
    op = dist._make_nccl_premul_sum(0.5)
    for arguments in ({"dst": 1}, {"group_dst": 1}):
        x = ones(2)
        dist.reduce(x, **arguments, op=op)
        assert x.tolist() == [1.0, 1.0]
    x = ones(2) * (rank + 1)
    dist.reduce(x, 0, op)
    assert x.tolist() == ([1.5, 1.5] if rank == 0 else [2.0, 2.0])
    raises(RuntimeError, "async_op=False", lambda: dist.reduce(x, 0, op, None, True))


@check
def premul_reduce_scatter(rank: int, size: int) -> None:
    """reduce_scatter and reduce_scatter_tensor with PREMUL_SUM sum the scaled inputs and leave them alone."""
    op = dist._make_nccl_premul_sum(0.5)
    out, given = ones(2), torch.arange(4.0, device="cuda")
    dist.reduce_scatter_tensor(out, given, op=op)
    assert out.tolist() == [[0.0, 1.0], [2.0, 3.0]][rank]
    out.zero_()
    dist.reduce_scatter(out, list(given.split(2)), op)
    assert out.tolist() == [[0.0, 1.0], [2.0, 3.0]][rank]
    assert given.tolist() == [0.0, 1.0, 2.0, 3.0]


@check
def average(rank: int, size: int) -> None:
    """AVG, which gloo has, is gloo's."""
    x = ones(2) * (rank + 1)
    dist.all_reduce(x, op=dist.ReduceOp.AVG)
    assert x.tolist() == [1.5, 1.5]


@check
def flat_shapes(rank: int, size: int) -> None:
    """Flat collectives take outputs and inputs of any shape with the right number of elements."""
    given = ones(2, 3) * (rank + 1)
    for shape in ((4, 3), (2, 2, 3), (12,), (3, 4)):
        out = torch.empty(shape, device="cuda")
        dist.all_gather_into_tensor(out, given)
        assert out.flatten().tolist() == [1.0] * 6 + [2.0] * 6
        back = torch.empty(3, 2)
        dist.reduce_scatter_tensor(back, out)
        assert back.flatten().tolist() == [2.0 * (rank + 1)] * 6
    transposed = torch.arange(4.0).view(2, 2).t()
    out = torch.empty(8)
    dist.all_gather_into_tensor(out, transposed)
    assert out.tolist() == [0.0, 2.0, 1.0, 3.0] * 2
    raises(RuntimeError, "contiguous output", lambda: dist.all_gather_into_tensor(torch.empty(4, 2).t(), ones(4)))


@check
def flat_spellings(rank: int, size: int) -> None:
    """Both keyword spellings of the flat collectives work, and so do positions; both at once are an error."""
    out, back, given = torch.empty(4), torch.empty(2), ones(2)
    dist.all_gather_into_tensor(output_tensor=out, input_tensor=given)
    dist.all_gather_into_tensor(output=out, input=given)
    dist.all_gather_into_tensor(out, input=given)
    dist.reduce_scatter_tensor(output=back, input=out)
    dist.reduce_scatter_tensor(output_tensor=back, input_tensor=out, op=dist.ReduceOp.MAX)
    dist._all_gather_base(out, given)
    dist._reduce_scatter_base(back, out)
    assert back.tolist() == [2.0, 2.0]
    work = dist.all_gather_into_tensor(out, given, None, True)
    work.wait()
    raises(TypeError, "exactly one of", lambda: dist.all_gather_into_tensor(output=out, output_tensor=out, input=out))
    raises(TypeError, "exactly one of", lambda: dist.reduce_scatter_tensor(output=out))


@check
def coalesced(rank: int, size: int) -> None:
    """A coalescing manager with a device, as scripts for NCCL write it, computes; PREMUL_SUM inside it too."""
    device = torch.device("cuda", rank)
    given, outs = [ones(2) * (rank + 1) for _ in range(3)], [torch.empty(4) for _ in range(3)]
    with _coalescing_manager(device=device, async_ops=True) as manager:
        for source, out in zip(given, outs, strict=True):
            dist.all_gather_into_tensor(out, source)
    manager.wait()
    assert outs[2].tolist() == [1.0, 1.0, 2.0, 2.0]
    backs = [torch.empty(2) for _ in range(3)]
    with _coalescing_manager(None, device, async_ops=True) as manager:
        for source, out in zip(outs, backs, strict=True):
            dist.reduce_scatter_tensor(out, source, op=dist._make_nccl_premul_sum(0.5))
    manager.wait()
    assert backs[0].tolist() == [rank + 1.0] * 2


@check
def float8(rank: int, size: int) -> None:
    """float8 tensors, which gloo does not know, move as bytes in every collective that only moves."""
    x = (ones(2) * (rank + 1)).to(torch.float8_e4m3fn)
    out = torch.empty(4, dtype=x.dtype, device="cuda")
    dist.all_gather_into_tensor(out, x)
    assert out.float().tolist() == [1.0, 1.0, 2.0, 2.0]
    parts = [torch.empty_like(x) for _ in range(size)]
    dist.all_gather(parts, x)
    assert parts[1].float().tolist() == [2.0, 2.0]
    dist.gather(x, parts if rank == 0 else None, dst=0)
    dist.scatter(x, parts if rank == 0 else None, src=0)
    assert x.float().tolist() == [rank + 1.0] * 2
    dist.all_to_all_single(torch.empty_like(x), x)
    dist.all_to_all([torch.empty_like(x[:1]) for _ in range(size)], list(x.split(1)))
    dist.broadcast(x, 1)
    assert x.float().tolist() == [2.0, 2.0]
    if rank == 0:
        dist.send(x, 1)
        dist.isend(x, 1).wait()
    else:
        y = torch.empty_like(x)
        dist.recv(y, 0)
        dist.irecv(y, 0).wait()
        assert y.float().tolist() == [2.0, 2.0]


@check
def memory_of_a_pending_send(rank: int, size: int) -> None:
    """A sender may give its tensor other memory while the send is pending, as Megatron's pipeline schedules do."""
    numel = 2**22  # more than the sockets hold, so that the send is pending until the receiver asks
    x = ones(numel)
    if rank == 0:
        sends = [dist.isend(x, 1), dist.isend(tensor=(y := ones(numel)), dst=1)]
        x.data, y.data = torch.empty(1), torch.empty(1)
        others = [torch.full((numel,), float("nan")) for _ in range(4)]
        dist.send(ones(1), 1, group=dist.group.WORLD, tag=7)
        for send in sends:
            send.wait()
        del others
    else:
        dist.recv(ones(1), 0, tag=7)
        for _ in range(2):
            dist.recv(x.zero_(), 0)
            assert torch.equal(x, torch.ones(numel))


@check
def point_to_point(rank: int, size: int) -> None:
    """batch_isend_irecv exchanges tensors of the device."""
    x, y = ones(3) * rank, torch.empty(3, device="cuda")
    operations = [dist.P2POp(dist.isend, x, 1 - rank), dist.P2POp(dist.irecv, y, 1 - rank)]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert y.tolist() == [1.0 - rank] * 3


@check
def objects_and_barriers(rank: int, size: int) -> None:
    """Objects are exchanged, with a device where one is asked for, and barriers take device_ids."""
    found = [None] * size
    dist.all_gather_object(found, {"rank": rank})
    assert found == [{"rank": 0}, {"rank": 1}]
    objects = [torch.device("cuda", rank), rank]
    dist.broadcast_object_list(objects, src=1, device=torch.device("cuda", rank))
    assert objects[1] == 1
    dist.barrier(device_ids=[rank])


@check
def compiled(rank: int, size: int) -> None:
    """Collectives inside compiled code are traced, without a graph break, and compute the same."""

    def code(x: torch.Tensor) -> torch.Tensor:
        y, out, back = x * 2, torch.empty(4, device="cuda"), torch.empty(2, device="cuda")
        dist.all_reduce(y)
        dist.all_gather_into_tensor(out, y)
        dist.reduce_scatter_tensor(back, out)
        return back

    assert torch.compile(code, backend="aot_eager", fullgraph=True)(ones(2)).tolist() == [8.0, 8.0]
    assert code(ones(2)).tolist() == [8.0, 8.0]


@check
def what_has_no_effect_is_noted(rank: int, size: int) -> None:
    """The backend's translation, NCCL's options and a device that gloo does not bind stand in the report once."""
    import llm_adapt

    lines = [line for line in llm_adapt.report().lines if line.section == "effect"]
    found = {line.subject: line.choice for line in lines}
    assert found["backend='cpu:gloo,cuda:nccl'"] == "cpu:gloo"
    assert found["backend='nccl'"] == "gloo"
    assert found["pg_options"] == found["device_id"] == "no effect"
    assert len(found) == len(lines)


if __name__ == "__main__":
    main("cpu:gloo,cuda:nccl")
