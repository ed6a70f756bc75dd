"""Calls that do not meet, each on a group of its own; run by test_npu_hccl_failures.py.

The watchdog of torch_npu is told not to end the process (TORCH_HCCL_ASYNC_ERROR_HANDLING=0), so that each error is
seen where the script waits for the device.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from hccl_ranks import check, report


def ones(count: int = 4) -> torch.Tensor:
    """A tensor of the device."""
    return torch.ones(count, device="npu")


def fails(size: int, act: Callable[[dist.ProcessGroup], object]) -> str:
    """What the device's synchronisation says of an act on a new group of all ranks."""
    group = dist.new_group(list(range(size)))
    dist.all_reduce(ones(), group=group)
    torch.npu.synchronize()
    with pytest.raises(RuntimeError) as caught:
        act(group)
        torch.npu.synchronize()
    assert any(one["error"] and str(one["error"]) in str(caught.value) for one in report())
    for _ in range(4):  # each stream that waited tells the error once
        with contextlib.suppress(RuntimeError):
            torch.npu.synchronize()
    return str(caught.value)


@check
def other_collective(rank: int, size: int) -> None:
    """Rank 0 reduces while the others broadcast: both hear of both."""

    def act(group: dist.ProcessGroup) -> None:
        dist.broadcast(ones(), 0, group=group) if rank else dist.all_reduce(ones(), group=group)

    text = fails(size, act)
    assert "rank 0 is in all_reduce #1 (4 x fp32, sum)" in text
    assert "rank 1 is in broadcast #1 (4 x fp32, root 0)" in text


@check
def other_root(rank: int, size: int) -> None:
    """Every rank broadcasts from itself."""
    text = fails(size, lambda group: dist.broadcast(ones(), rank, group=group))
    assert "rank 0 is in broadcast #1 (4 x fp32, root 0)" in text
    assert "rank 1 is in broadcast #1 (4 x fp32, root 1)" in text


@check
def other_reduction(rank: int, size: int) -> None:
    """One rank sums, the other takes the maximum."""
    reduction = dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM
    text = fails(size, lambda group: dist.all_reduce(ones(), reduction, group=group))
    assert "(4 x fp32, sum)" in text
    assert "(4 x fp32, max)" in text


@check
def other_size(rank: int, size: int) -> None:
    """The ranks reduce tensors of different lengths."""
    text = fails(size, lambda group: dist.all_reduce(ones(4 + rank), group=group))
    assert "(4 x fp32, sum)" in text
    assert "(5 x fp32, sum)" in text


@check
def other_dtype(rank: int, size: int) -> None:
    """The ranks reduce different dtypes."""
    x = ones().to(torch.int32 if rank else torch.float32)
    text = fails(size, lambda group: dist.all_reduce(x, group=group))
    assert "(4 x fp32, sum)" in text
    assert "(4 x int32, sum)" in text


@check
def uneven_counts(rank: int, size: int) -> None:
    """Rank 1 sends rank 0 more than that expects of it: both hear of it."""
    sends, receives = [2 + rank] + [2] * (size - 1), [2] * size
    text = fails(
        size, lambda group: dist.all_to_all_single(ones(2 * size), ones(sum(sends)), receives, sends, group=group)
    )
    assert ("expecting 8 bytes" in text, "12 bytes" in text) == (True, True)


@check
def message_of_another_size(rank: int, size: int) -> None:
    """A rank receives less than the other sends."""
    text = fails(size, lambda group: (dist.recv if rank else dist.send)(ones(4 + rank), 1 - rank, group))
    assert "(4 x fp32)" in text


@check
def late(rank: int, size: int) -> None:
    """Who waits for a rank that does not come is told its number, the call and the time, and so is who comes late."""

    def act(group: dist.ProcessGroup) -> None:
        if rank == size - 1:
            time.sleep(float(os.environ["HCCL_EXEC_TIMEOUT"]) + 1)
        dist.all_reduce(ones(), group=group)

    text = fails(size, act)
    assert "all_reduce #1 (4 x fp32, sum) on communicator group_name_" in text
    assert f"it waited 3 s (HCCL_EXEC_TIMEOUT); rank {size - 1} has not called it" in text


@check
def both_send_first(rank: int, size: int) -> None:
    """Two ranks that send to each other before they receive wait until the timeout, as messages are not buffered."""

    def act(group: dist.ProcessGroup) -> None:
        dist.send(ones(), 1 - rank, group)
        dist.recv(ones(), 1 - rank, group)

    started = time.monotonic()
    text = fails(size, act)
    assert time.monotonic() - started >= 3
    assert "has not received send #0 (4 x fp32); it sends to this rank meanwhile" in text


@check
def default_group(rank: int, size: int) -> None:
    """A group that had no such call still works after the failures of the others."""
    x = ones()
    dist.all_reduce(x)
    assert x.tolist() == [float(size)] * 4
