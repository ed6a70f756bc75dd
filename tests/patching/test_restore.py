"""The whole of it on the real torch: patch, use, unpatch, and nothing in the process is different."""

from __future__ import annotations

import pickle
import random
import subprocess
import sys
import textwrap
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed
import torch.utils.data

import llm_adapt
from llm_adapt import session
from llm_adapt.frameworks import torch_cuda
from llm_adapt.frameworks.context import Context
from llm_adapt.patching import Patch, Row
from tests.patching.snapshot import Snapshot
from tests.patching.toys import load, restless, toys

USER = {
    "early": """
        import functools, torch
        from torch import device, zeros as z
        make, table = functools.partial(torch.ones, 2), {'full': torch.full, 'tuple': (torch.empty, 0)}
        def build(n, f=torch.zeros): return f(n, device='cuda')
        class Model(torch.nn.Module):
            to_device = torch.nn.Module.to
    """,
    "late": """
        import functools, torch
        from torch import device, zeros as z, ones
        from torch.cuda import is_available, synchronize
        keep = [functools.partial(torch.full, (2,)), {'k': device}]
    """,
}


@pytest.fixture(scope="module", autouse=True)
def everything_imported() -> None:
    """Import once what the first patch() of a process imports, so that only changes differ."""
    llm_adapt.patch(device="cpu")
    use()
    llm_adapt.unpatch()


@pytest.fixture
def before() -> Iterator[Snapshot]:
    """The process before the test; behind the test it must be the same."""
    with toys(USER):
        load("early")
        taken = Snapshot()
        yield taken
        llm_adapt.unpatch()
        assert taken.differences(Snapshot()) == []


def use(folder: Path | None = None) -> None:
    """What a script does on a device."""
    model = torch.nn.Linear(2, 2).cuda()
    with torch.autocast("cuda"):
        loss = model(torch.ones(1, 2, device="cuda")).sum()
    loss.backward()
    torch.cuda.synchronize()
    torch.cuda.manual_seed_all(1)
    torch.randn(2, device=torch.device("cuda", 0), generator=torch.Generator("cuda"))
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.zeros(1).to("cuda").cpu().pin_memory()
    list(torch.utils.data.DataLoader([1, 2], pin_memory=True))
    if folder is not None:
        torch.save(model.state_dict(), folder / "model.pt")
        torch.load(folder / "model.pt", map_location="cuda")


def test_patch_use_unpatch_changes_nothing(before: Snapshot, tmp_path: Path) -> None:
    """Every name of every module and class, every registry, variable and filter is the very object it was."""
    llm_adapt.patch(device="cpu")
    assert len(before.differences(Snapshot())) > 200
    assert load("early").build(2).shape == (2,)
    load("late")
    use(tmp_path)
    llm_adapt.unpatch()
    assert before.differences(Snapshot()) == []


def test_copies_of_torchs_functions_come_back_too(before: Snapshot) -> None:
    """What user modules copied before and after the patch is torch's own again, one by one."""
    llm_adapt.patch(device="cpu")
    early, late = load("early"), load("late")
    assert early.z is late.z is torch.zeros
    assert early.device is late.device is torch.device
    llm_adapt.unpatch()
    assert (early.z, late.z, late.ones) == (torch.zeros, torch.zeros, torch.ones)
    assert early.device is late.device is late.keep[1]["k"] is torch.device
    assert (early.make.func, late.keep[0].func, early.build.__defaults__) == (torch.ones, torch.full, (torch.zeros,))
    assert (late.is_available, late.synchronize) == (torch.cuda.is_available, torch.cuda.synchronize)


def test_with_patched_and_an_exception(before: Snapshot) -> None:
    """A block that ends by an exception leaves nothing either."""
    with pytest.raises(ZeroDivisionError), llm_adapt.patched(device="cpu"):
        use()
        1 / 0  # noqa: B018
    assert before.differences(Snapshot()) == []


@pytest.mark.parametrize("seed", range(4))
def test_an_exception_in_the_middle_of_patch(before: Snapshot, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wherever among the rows something fails, while they are resolved, made or written, nothing stays."""
    number = random.Random(seed)

    def fail(original: Any) -> Any:
        raise RuntimeError("injected")

    class Stubborn(ModuleType):
        def __setattr__(self, name: str, value: Any) -> None:
            raise RuntimeError("injected")

    stubborn = Stubborn("stubborn")
    vars(stubborn)["name"] = 1
    monkeypatch.setitem(sys.modules, "stubborn", stubborn)
    bad: list[Row] = [
        Patch("torch:no_such_name", None, "missing"),
        Patch("torch:__doc__", fail, "cannot be made", kind="wrap"),
        Patch("stubborn:name", 2, "cannot be written"),
    ]
    real = torch_cuda.rows

    def rows(context: Context) -> list[Row]:
        found = real(context)
        found.insert(number.randrange(len(found)), bad[seed % 3])
        return found

    monkeypatch.setattr(torch_cuda, "rows", rows)
    with pytest.raises(RuntimeError):
        llm_adapt.patch(device="cpu")
    monkeypatch.undo()
    assert not llm_adapt.is_patched()
    assert before.differences(Snapshot()) == []


def test_eight_threads(before: Snapshot) -> None:
    """Threads that patch, unpatch, use and import at the same time never see half a patch, and leave none."""
    failures: list[Exception] = []
    start = threading.Barrier(8)

    def work(number: int) -> None:
        chance = random.Random(number)
        start.wait(60)
        for _ in range(6):
            try:
                match chance.randrange(4):
                    case 0:
                        llm_adapt.patch(device="cpu")
                    case 1:
                        llm_adapt.unpatch()
                    case 2:
                        with llm_adapt.patched(device="cpu"):
                            load(chance.choice(["early", "late"]))
                    case 3:
                        assert torch.zeros(2).sum() == 0
            except Exception as error:  # noqa: BLE001 - of a thread: shown below
                failures.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(8)]
    with restless():
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
    assert failures == []
    llm_adapt.unpatch()
    assert (session.is_patched(), before.differences(Snapshot())) == (False, [])


def test_many_times(before: Snapshot) -> None:
    """Patching again and again is as good as once: nothing piles up."""
    for _ in range(5):
        llm_adapt.patch(device="cpu")
        llm_adapt.patch()
        llm_adapt.unpatch()
        llm_adapt.unpatch()
    assert before.differences(Snapshot()) == []


def test_nothing_lazy_in_torch_is_woken(before: Snapshot) -> None:
    """torch.distributed.reduce_op warns when it is so much as asked for its class: patching does not ask."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with toys({"holder": "import torch.distributed\nkeep = torch.distributed.reduce_op\nbox = [keep]"}):
            load("holder")
            llm_adapt.patch(device="cpu")
            llm_adapt.unpatch()


def picklable(value: Any) -> bytes | None:
    """The pickle of a value; None where it has none."""
    try:
        return pickle.dumps(value)
    except Exception:  # noqa: BLE001 - any kind of refusal is an answer
        return None


def attribute(row: Row) -> Any:
    """What a row's target is now."""
    found: Any = sys.modules[row.module]
    for part in row.name.split("."):
        found = getattr(found, part)
    return found


def test_wrapped_functions_are_pickled_as_before(before: Snapshot, monkeypatch: pytest.MonkeyPatch) -> None:
    """What could be pickled still can, and such a pickle opens in an unpatched process as torch's own."""
    collected: list[Row] = []
    real = torch_cuda.rows
    monkeypatch.setattr(torch_cuda, "rows", lambda context: collected.extend(real(context)) or collected)
    llm_adapt.patch(device="cpu")
    rows = [row for row in collected if isinstance(row, Patch) and row.kind == "wrap" and row.module in sys.modules]
    rows = [row for row in rows if callable(attribute(row))]  # not dynamo's tables of functions
    pickles = {row: picklable(attribute(row)) for row in rows}
    llm_adapt.unpatch()
    monkeypatch.undo()
    assert len(rows) > 50
    lost = [row.target for row in rows if picklable(attribute(row)) is not None and pickles[row] is None]
    other = [
        row.target for row, text in pickles.items() if text is not None and pickle.loads(text) is not attribute(row)
    ]
    assert (lost, other) == ([], [])


def test_parts_of_torch_that_were_imported_while_patched_are_torchs_own_again() -> None:
    """Modules that torch imports on demand copy replacements, also as keys; after unpatch() they hold none."""
    code = """
        import sys, torch, llm_adapt
        from llm_adapt import session
        llm_adapt.patch(device="cpu")
        kept = [swap for swap in session._session.plan._stands_for.values() if swap is not None]
        ours = {id(swap.new) for swap in kept}
        before = set(sys.modules)
        import torch.distributed._functional_collectives, torch.distributed._shard.sharded_tensor
        import torch.distributed.tensor
        new = [vars(sys.modules[name]) for name in set(sys.modules) - before if not name.startswith("llm_adapt")]

        def copies(box, depth):
            for name, value in list(box.items()):
                yield from (item for item in (name, value) if id(item) in ours)
                if type(value) in (list, tuple, set):
                    value = dict(enumerate(value))
                elif type(value) is type:
                    value = dict(vars(value))
                if type(value) is dict and depth:
                    yield from copies(value, depth - 1)

        assert sum(1 for box in new for _ in copies(box, 2)) > 10
        llm_adapt.unpatch()
        assert [copy for box in new for copy in copies(box, 2)] == []
    """
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False, timeout=300
    )
    assert (result.returncode, result.stderr) == (0, "")
