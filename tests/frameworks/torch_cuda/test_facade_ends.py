"""What the facade leaves behind: nothing. And where there is nothing to do, it does nothing."""

from __future__ import annotations

import copyreg
import gc
import multiprocessing.spawn
import types
from typing import Any

import pytest
import torch
import torch.distributed as dist

import llm_adapt
from llm_adapt.adapters import adapters
from llm_adapt.errors import PatchError
from llm_adapt.frameworks import torch_cuda
from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Entry, Patch
from llm_adapt.report import Report
from llm_adapt.settings import Settings


def _rows() -> list[Any]:
    return torch_cuda.rows(Context(adapters()["cpu"], Settings(), Report()))


def _places() -> dict[str, int]:
    """Identity of what stands at the target of every row."""
    found = {}
    for row in _rows():
        if isinstance(row, Patch) and row.target.startswith("torch"):
            owner: Any = __import__(row.module, fromlist=["_"])
            *parents, name = row.name.split(".")
            for parent in parents:
                owner = vars(owner)[parent]
            found[row.target] = id(vars(owner).get(name))
    return found


def test_everything_is_taken_back() -> None:
    """After unpatch() every target of every row is the very object it was, and every table as long as before."""
    tables = (copyreg.dispatch_table, torch.serialization._package_registry, torch.jit._builtins._builtin_table)
    torch.jit._builtins._get_builtin_table()
    __import__("torch.distributed.fsdp.fully_sharded_data_parallel")
    before, sizes = _places(), [len(table or ()) for table in tables]
    spawn = multiprocessing.spawn.get_preparation_data
    with llm_adapt.patched(device="cpu"):
        assert torch.zeros(1, device="cuda").is_cuda
        assert multiprocessing.spawn.get_preparation_data is not spawn
    assert _places() == before
    assert [len(table or ()) for table in tables] == sizes
    assert multiprocessing.spawn.get_preparation_data is spawn
    with pytest.raises(AssertionError, match="not compiled with CUDA"):
        torch.zeros(1, device="cuda")
    assert not torch.cuda.is_available()


def test_it_can_be_put_on_again() -> None:
    """patch() and unpatch() alternate as often as one likes, and tables of torch that outlive them do no harm."""
    for _ in range(3):
        with llm_adapt.patched(device="cpu"):
            assert torch.device("cuda") == torch.device("cpu")
            assert torch.compile(lambda x: x.to(torch.device("cuda")), backend="eager")(torch.ones(1)).item() == 1.0
        torch._dynamo.reset()
        assert torch.device("cuda").type == "cuda"


def test_strict_mode_has_nothing_to_complain_of() -> None:
    """On torch 2.13 every row applies: strict mode, where a skip is an error, is content."""
    with llm_adapt.patched(device="cpu", strict=True, ops="off") as report:
        of_torch = [line for line in report.lines if line.subject.startswith("torch")]
        assert [line for line in of_torch if line.status in ("skipped", "problem")] == []


@pytest.mark.parametrize("name", ["cuda", "dcu"])
def test_torch_cuda_itself_needs_no_facade(name: str) -> None:
    """Where the device is torch.cuda there are no rows, and the report says so."""
    report = Report()
    assert torch_cuda.rows(Context(adapters()[name], Settings(), report)) == []
    assert [line.choice for line in report.lines] == ["left alone"]


def test_ops_without_a_device_are_not_touched() -> None:
    """No operator without a device argument, and no module's forward, is wrapped: the same object serves."""
    names = [name for name in dir(torch.Tensor) if isinstance(getattr(torch.Tensor, name), types.MethodDescriptorType)]
    before = {name: id(getattr(torch.Tensor, name)) for name in names}
    functions = {name: id(value) for name, value in vars(torch.nn.functional).items() if callable(value)}
    forward = torch.nn.Linear.forward, torch.nn.Module.__call__
    with llm_adapt.patched(device="cpu"):
        changed = {name for name in names if id(getattr(torch.Tensor, name)) != before[name]}
        assert [name for name, value in functions.items() if id(vars(torch.nn.functional)[name]) != value] == []
        assert (torch.nn.Linear.forward, torch.nn.Module.__call__) == forward
    moving = {"to", "cuda", "cpu", "type", "pin_memory", "is_pinned", "record_stream", "get_device"}
    assert changed == moving | {
        "new",
        "new_empty",
        "new_empty_strided",
        "new_full",
        "new_ones",
        "new_tensor",
        "new_zeros",
    }


def test_no_mode_is_switched_on() -> None:
    """The facade uses no torch function mode and no dispatch mode: their cost would fall on every op."""
    with llm_adapt.patched(device="cpu"):
        assert torch.overrides._get_current_function_mode() is None
        assert torch._C._len_torch_dispatch_stack() == 0


def test_views_still_alias() -> None:
    """Views, in-place ops and slices mean what they mean in torch."""
    with llm_adapt.patched(device="cpu"):
        x = torch.zeros(4, device="cuda")
        x.view(2, 2)[0].add_(1)
        x[2:].copy_(torch.ones(2))
        assert x.tolist() == [1.0, 1.0, 1.0, 1.0]
        assert x.detach().cuda().data_ptr() == x.data_ptr()


def test_no_group_outlives_a_script() -> None:
    """A process group of one rank starts over nccl, and nothing of it is kept after it was destroyed."""
    with llm_adapt.patched(device="cpu"):
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
        group = dist.new_group([0])
        assert dist.new_group([0], backend="nccl") is group
        x = torch.ones(1, device="cuda")
        dist.all_reduce(x, group=group)
        dist.destroy_process_group()
        del group
        gc.collect()
        assert not [found for found in gc.get_objects() if type(found) is dist.ProcessGroup]


def test_a_stand_in_makes_no_groups() -> None:
    """ProcessGroupNCCL itself cannot be made: the error says what to use."""
    with llm_adapt.patched(device="cpu"), pytest.raises(RuntimeError, match="init_process_group or new_group"):
        dist.ProcessGroupNCCL(None, 0, 1)
    assert not hasattr(dist, "ProcessGroupNCCL") or dist.is_nccl_available()


def test_every_row_says_why() -> None:
    """Every row has a reason, and no two rows have one target."""
    rows = _rows()
    assert all(row.reason for row in rows)
    targets = [(row.target, id(row.key)) if isinstance(row, Entry) else (row.target, 0) for row in rows]
    assert len(targets) == len(set(targets))


def test_patching_twice_with_another_count_is_refused() -> None:
    """The number of ordinals cannot change under a script."""
    with llm_adapt.patched(device="cpu", cpu_devices=2), pytest.raises(PatchError, match="cpu_devices"):
        llm_adapt.patch(cpu_devices=3)
