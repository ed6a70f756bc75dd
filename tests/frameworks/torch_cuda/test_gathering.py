"""gather and gather_object where a vendor's plug-in put functions of an older torch."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llm_adapt.frameworks.torch_cuda.gathering import rows, with_group_dst


@pytest.fixture
def group(tmp_path: Path) -> Iterator[Any]:
    """A group of this process alone."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    yield dist.new_group([0])
    dist.destroy_process_group()


def older(tensor: Any, gather_list: Any = None, dst: int = 0, group: Any = None, async_op: bool = False) -> Any:
    """gather as torch_npu has it; says what it was given."""
    return dst, group, async_op


def test_group_dst_becomes_dst(group: Any) -> None:
    """group_dst is the rank in the group, dst the one among all; without both it is 0."""
    gather = with_group_dst(older)
    assert gather(torch.ones(1)) == (0, None, False)
    assert gather(torch.ones(1), None, None) == (0, None, False)
    assert gather(torch.ones(1), dst=3, async_op=True) == (3, None, True)
    assert gather(torch.ones(1), group_dst=2) == (2, None, False)
    assert gather(torch.ones(1), None, None, group, True, 0) == (0, group, True)
    outside = dist.GroupMember.NON_GROUP_MEMBER
    assert gather(torch.ones(1), group=outside, group_dst=1) == (1, outside, False)


def test_both_are_refused() -> None:
    """dst and group_dst together are an error, as in torch."""
    with pytest.raises(ValueError, match="dst=0 and group_dst=0"):
        with_group_dst(older)(torch.ones(1), dst=0, group_dst=0)


def test_it_looks_like_that_of_torch() -> None:
    """Its signature has the names, order and defaults of torch's; torch's own functions are left as they are."""
    found, wanted = inspect.signature(with_group_dst(older)), inspect.signature(dist.gather)
    assert {n: p.default for n, p in found.parameters.items()} == {n: p.default for n, p in wanted.parameters.items()}
    assert list(found.parameters) == list(wanted.parameters)
    assert with_group_dst(dist.gather) is dist.gather
    assert with_group_dst(dist.gather_object) is dist.gather_object


def test_both_names_are_one_object() -> None:
    """A function is wrapped once, under both names that torch gives it."""
    first, second = (row for row in rows() if row.target.endswith(":gather"))
    assert first.new(older) is second.new(older)
