"""AVG made of a sum, on two ranks over gloo; run by test_averages.py."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from on_ranks import check, main

from llm_adapt.errors import CommError
from llm_adapt.parallel.averages import averaged


def mine(rank: int) -> torch.Tensor:
    """Four numbers that differ from rank to rank: 0 1 2 3 and 10 11 12 13, whose mean is 5 6 7 8."""
    return torch.arange(4.0) + 10 * rank


@check
def all_reduce_and_reduce(rank: int, size: int) -> None:
    """Each number is the mean over the ranks, also where the call is waited for later."""
    for is_async in (False, True):
        x = mine(rank)
        work = averaged(dist.all_reduce, "gloo")(x, op=dist.ReduceOp.AVG, async_op=is_async)
        if is_async:
            work.wait()
        assert x.tolist() == [5, 6, 7, 8]
    x = mine(rank)
    averaged(dist.reduce, "gloo")(x, 0, dist.ReduceOp.AVG)
    assert rank != 0 or x.tolist() == [5, 6, 7, 8]


@check
def reduce_scatters_leave_their_input(rank: int, size: int) -> None:
    """The share of this rank is the mean, and the input is as it was."""
    for name in ("reduce_scatter_tensor", "reduce_scatter_single"):
        if hasattr(dist, name):
            given, out = mine(rank), torch.empty(2)
            averaged(getattr(dist, name), "gloo")(out, given, op=dist.ReduceOp.AVG)
            assert out.tolist() == [[5, 6], [7, 8]][rank]
            assert torch.equal(given, mine(rank))
    parts, out = list(mine(rank).chunk(2)), torch.empty(2)
    averaged(dist.reduce_scatter, "gloo")(out, parts, dist.ReduceOp.AVG)
    assert out.tolist() == [[5, 6], [7, 8]][rank]
    assert torch.equal(torch.cat(parts), mine(rank))


@check
def other_calls_are_untouched(rank: int, size: int) -> None:
    """A sum stays a sum, and a group of another backend gets its own average."""
    x = mine(rank)
    averaged(dist.all_reduce, "gloo")(x)
    assert x.tolist() == [10, 12, 14, 16]
    y = mine(rank)
    averaged(dist.all_reduce, "cncl")(y, op=dist.ReduceOp.AVG)  # gloo's own
    assert y.tolist() == [5, 6, 7, 8]


@check
def integers_are_refused(rank: int, size: int) -> None:
    """No sum of shares is NCCL's average of integers: an error, and the tensor is as it was."""
    x = torch.tensor([1, 2])
    with pytest.raises(CommError, match=r"torch\.int64"):
        averaged(dist.all_reduce, "gloo")(x, op=dist.ReduceOp.AVG)
    assert x.tolist() == [1, 2]


if __name__ == "__main__":
    main()
