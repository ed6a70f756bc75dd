"""Spawned, forked and forkserver children and DataLoader workers are patched as their parent is."""

from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Dataset, TensorDataset

from llm_adapt.frameworks.torch_cuda.tooling import PatchChild

ROOT = Path(__file__).parents[3]
SCRIPT = """
import json, sys
{patch}
import torch
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

DEVICE = torch.device("cuda", 1)  # read anew by every child that imports this file


class Rows(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.full((1,), float(index), device="cuda"), torch.cuda.is_available()


def child(rank, queue):
    torch.cuda.set_device(rank)
    x = torch.ones(1, device="cuda")
    queue.put([x.is_cuda, torch.cuda.device_count(), torch.cuda.current_device(), str(DEVICE)])


if __name__ == "__main__":
    found = {{}}
    for method in ("spawn", "forkserver", "fork"):
        queue = mp.get_context(method).SimpleQueue()
        mp.start_processes(child, (queue,), nprocs=1, start_method=method)
        found[method] = queue.get()
        loader = DataLoader(Rows(), 2, num_workers=1, pin_memory=True, multiprocessing_context=method)
        found["loader " + method] = [[rows.flatten().tolist(), told.tolist()] for rows, told in loader]
    print(json.dumps(found))
"""
ROWS = [[[0.0, 1.0], [True, True]], [[2.0, 3.0], [True, True]]]
EXPECTED = {method: [True, 2, 0, "cpu"] for method in ("spawn", "forkserver", "fork")} | {
    f"loader {method}": ROWS for method in ("spawn", "forkserver", "fork")
}


def run(*command: str, cwd: Path, **environment: str) -> Any:
    """Run a script and read the JSON it prints."""
    inherited = {key: value for key, value in os.environ.items() if not key.startswith(("LLM_ADAPT_", "PYTHONPATH"))}
    done = subprocess.run(
        command, cwd=cwd, env=inherited | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.multiprocess
def test_children_of_llm_adapt_run(tmp_path: Path) -> None:
    """Under `llm-adapt run` children of every start method, and loader workers, are patched before they import."""
    (tmp_path / "train.py").write_text(SCRIPT.format(patch=""))
    command = [sys.executable, "-m", "llm_adapt.cli", "run", "--device", "cpu", "--cpu-devices", "2", "train.py"]
    assert run(*command, cwd=tmp_path, PYTHONPATH=str(ROOT)) == EXPECTED


@pytest.mark.multiprocess
def test_children_of_a_script_that_patches_itself(tmp_path: Path) -> None:
    """A script that finds llm_adapt by its own sys.path and calls patch() has patched children too, each once."""
    patch = f"sys.path.insert(0, {str(ROOT)!r})\nimport llm_adapt\nllm_adapt.patch(device='cpu', cpu_devices=2)"
    (tmp_path / "scripts").mkdir()
    (tmp_path / "scripts" / "train.py").write_text(SCRIPT.format(patch=patch))
    assert run(sys.executable, "scripts/train.py", cwd=tmp_path) == EXPECTED


def test_a_child_is_told_how_its_parent_is_patched(facade: Any) -> None:
    """The start data of a child carry the parent's settings and sys.path, and nothing that needs llm_adapt to read."""
    from multiprocessing.spawn import get_preparation_data

    patch_child = get_preparation_data("child")["llm_adapt"]
    assert patch_child.arguments["cpu_devices"] == 2
    assert patch_child.arguments["device"] == "cpu"
    text = pickle.dumps(PatchChild({"device": "cpu"}))
    assert b"cexec\n" in pickle.dumps(PatchChild({}), protocol=0) or b"exec" in text
    assert b"llm_adapt.frameworks" not in text


class Squares(Dataset[torch.Tensor]):
    """Rows made on the device."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([float(index**2)], device="cuda")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_loaders_with_pinned_memory(num_workers: int, facade: Any, noted: Callable[[], list[str]]) -> None:
    """A loader with pin_memory gives the rows in order, by keyword or position, and that is noted once."""
    fork = multiprocessing.get_context("fork") if num_workers else None
    loaders = [
        DataLoader(Squares(), 2, num_workers=num_workers, pin_memory=True, multiprocessing_context=fork),
        DataLoader(Squares(), 2, False, None, None, num_workers, None, True, multiprocessing_context=fork),
    ]
    for loader in loaders:
        assert torch.cat([batch.cuda(non_blocking=True) for batch in loader]).flatten().tolist() == [0, 1, 4, 9]
    assert noted() == ["DataLoader(pin_memory=True)"]


@pytest.mark.filterwarnings("ignore:.*pin_memory_device")
def test_a_loader_with_a_pin_memory_device(facade: Any) -> None:
    """pin_memory_device takes a CUDA device."""
    loader = DataLoader(TensorDataset(torch.ones(2)), pin_memory=True, pin_memory_device="cuda:1")
    assert len(list(loader)) == 2


def test_a_loader_with_a_generator_of_cuda(facade: Any) -> None:
    """A loader shuffles by a generator of the device, and repeats itself."""
    orders = [
        torch.cat(list(DataLoader(Squares(), shuffle=True, generator=torch.Generator("cuda").manual_seed(1)))).tolist()
        for _ in range(2)
    ]
    assert orders[0] == orders[1]
