"""What ends a process; each is run alone by test_npu_hccl_failures.py."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist
from hccl_ranks import check


def begin() -> torch.Tensor:
    """One collective that all ranks make, so that the communicator is there."""
    x = torch.ones(4, device="npu")
    dist.all_reduce(x)
    torch.npu.synchronize()
    return x


@check
def other_order(rank: int, size: int) -> None:
    """The ranks make the same two calls in different orders, and the script goes on without waiting for them."""
    x, whole = begin(), torch.ones(4 * size, device="npu")
    if rank == 0:
        dist.all_reduce(x)
    dist.all_gather_into_tensor(whole, x)
    if rank > 0:
        dist.all_reduce(x)
    time.sleep(30)
    print("slept well", flush=True)


@check
def dead(rank: int, size: int) -> None:
    """The last rank ends without a word."""
    x = begin()
    if rank == size - 1:
        os._exit(3)
    dist.all_reduce(x)
    torch.npu.synchronize()


@check
def nobody_comes(rank: int, size: int) -> None:
    """The last rank never makes a call on the group."""
    if rank < size - 1:
        begin()
    else:
        time.sleep(float(os.environ["HCCL_CONNECT_TIMEOUT"]) + 1)


@check
def ends_in_the_middle(rank: int, size: int) -> None:
    """Rank 0 ends by an exception while its collective waits for the others."""
    x = begin()
    if rank == 0:
        dist.all_reduce(x, async_op=True)
        raise KeyError("the script's own error")


@check
def first_call(rank: int, size: int) -> None:
    """One collective; what is wrong is in the variables."""
    begin()
