"""Process groups of a CUDA script on three ranks over gloo; run by test_groups.py."""

from __future__ import annotations

import datetime
import gc
import os

import torch
import torch.distributed as dist
from on_ranks import check, main


def num_threads() -> int:
    """Threads of this process, those of gloo included."""
    return len(os.listdir("/proc/self/task"))


def total(group: object) -> float:
    """Sum of one from every member."""
    x = torch.ones(1, device="cuda")
    dist.all_reduce(x, group=group)
    return x.item()


@check
def one_group_per_rank_set(rank: int, size: int) -> None:
    """Requests for the same ranks, in any order and by any spelling of nccl, share one group and its threads."""
    first = dist.new_group([0, 1, 2], backend="nccl")
    before = num_threads()
    groups = [dist.new_group([2, 0, 1]), dist.new_group(), dist.new_group(range(3), backend="cuda:nccl")]
    groups += [dist.new_group([0, 1, 2], group_desc=f"group {index}") for index in range(10)]
    assert all(group is first for group in groups)
    assert num_threads() == before
    assert total(first) == 3.0


@check
def unshared_groups_have_threads(rank: int, size: int) -> None:
    """A group with gloo's own options is made anew, as torch makes it: the threads that sharing saves."""
    before = num_threads()
    groups = [dist.new_group([0, 1, 2], pg_options=dist.ProcessGroupGloo._Options()) for _ in range(2)]
    assert groups[0] is not groups[1]
    assert num_threads() > before
    for group in groups:
        dist.destroy_process_group(group)
    try:
        dist.destroy_process_group(groups[0])
    except ValueError:
        return
    raise AssertionError("torch was not asked to destroy it")


@check
def different_requests(rank: int, size: int) -> None:
    """Another set of ranks, an order that is asked for, or another timeout makes another group."""
    minutes = datetime.timedelta(minutes=7)
    groups = [
        dist.new_group([0, 1, 2]),
        dist.new_group([2, 1, 0], sort_ranks=False),
        dist.new_group([0, 1, 2], timeout=minutes),
        dist.new_group([0, 1]),
        dist.new_group([1, 2]),
    ]
    assert len({id(group) for group in groups if group is not dist.GroupMember.NON_GROUP_MEMBER}) == [4, 5, 4][rank]
    assert dist.get_process_group_ranks(groups[1]) == [2, 1, 0]
    assert dist.new_group([0, 1, 2], timeout=minutes) is groups[2]


@check
def non_members(rank: int, size: int) -> None:
    """A rank outside of a group gets torch's word for it, as often as it asks."""
    for _ in range(3):
        group = dist.new_group([0, 2])
        assert (group is dist.GroupMember.NON_GROUP_MEMBER) == (rank == 1)
        if rank != 1:
            assert total(group) == 2.0


@check
def destroyed_by_some(rank: int, size: int) -> None:
    """Who destroys a handle, and when, changes nothing for the others: later groups are made and compute."""
    group = dist.new_group([0, 1])
    if rank == 0:
        dist.destroy_process_group(group)
        dist.destroy_process_group(dist.new_group([0, 1]))
    if rank == 2:
        dist.destroy_process_group(group)  # not a member: torch ignores it
    again = dist.new_group([0, 1])
    everyone = dist.new_group([2, 0, 1], timeout=datetime.timedelta(minutes=3))
    assert total(everyone) == 3.0
    if rank < 2:
        assert total(again) == total(group) == 2.0


@check
def local_synchronization(rank: int, size: int) -> None:
    """With use_local_synchronization only the members ask, and they share a group of their own."""
    if rank == 2:
        return
    group = dist.new_group([0, 1], use_local_synchronization=True)
    assert group is dist.new_group([1, 0], use_local_synchronization=True)
    assert total(group) == 2.0


@check
def subgroups(rank: int, size: int) -> None:
    """Groups that torch makes for itself, new_subgroups and device meshes, are shared as well."""
    mine = dist.new_group([0, 1, 2])
    found, _ = dist.new_subgroups_by_enumeration([[0, 1, 2]])
    assert found is mine
    alone = [dist.new_group([index]) for index in range(size)][rank]
    mesh = dist.init_device_mesh("cuda", (size, 1), mesh_dim_names=("dp", "tp"))
    assert mesh.get_group("tp") is alone
    before = num_threads()
    again = dist.init_device_mesh("cuda", (1, size), mesh_dim_names=("pp", "tp"))
    assert again.get_group("pp") is alone
    assert num_threads() == before


@check
def two_collectives_at_once(rank: int, size: int) -> None:
    """Asynchronous collectives on two handles of one group, issued in one order, do not mix."""
    first, second = dist.new_group([0, 1, 2]), dist.new_group([0, 1, 2])
    x, y = torch.ones(1000, device="cuda"), torch.ones(10, device="cuda") * 2
    works = [dist.all_reduce(x, group=first, async_op=True), dist.all_reduce(y, group=second, async_op=True)]
    for work in reversed(works):
        work.wait()
    assert (x[0].item(), y[0].item()) == (3.0, 6.0)


@check
def a_new_beginning(rank: int, size: int) -> None:
    """destroy_process_group() ends every group and its threads, and a process group can be started again."""
    import llm_adapt

    kept = [line for line in llm_adapt.report().lines if line.subject == "destroy_process_group(group)"]
    assert len(kept) == (0 if rank == 1 else 1)
    dist.new_group([0, 1, 2])
    before = num_threads()
    dist.destroy_process_group()
    gc.collect()
    assert num_threads() < before
    assert not dist.is_initialized()
    # Over a store of its own: the launcher's still has the addresses of the first beginning.
    store = f"file://{os.environ['OUTCOMES']}/store"
    dist.init_process_group("nccl", init_method=store, rank=rank, world_size=size)
    assert total(dist.new_group([0, 1, 2])) == 3.0
    assert total(None) == 3.0


if __name__ == "__main__":
    main()
