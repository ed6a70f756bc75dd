"""Start one process per rank on the simulated NPU, over the real ProcessGroupHCCL, and hand back what came of them.

A file of checks is a module next to this one: functions marked with @check, each called with its rank and the number
of ranks. This file is the script, because the device must be there before anything imports torch. In a run of many
checks the first failure ends the run, because ranks that wait for one that failed would only time out; a check that
is meant to end its processes is run alone, by its name.
"""

from __future__ import annotations

import importlib
import json
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

__all__ = ["CHECKS", "ROOT", "Ended", "check", "main", "outcomes", "report", "run"]

Check = Callable[[int, int], None]
CHECKS: dict[str, Check] = {}
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 120  # of a whole run: longer than a loaded machine needs


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit status, and what it printed."""

    status: int
    text: str


def check(function: Check) -> Check:
    """Register a check; its docstring is the specification."""
    CHECKS[function.__name__] = function
    return function


def report() -> list[dict[str, object]]:
    """The communicators of this process, as the simulated HCCL counts them."""
    import ctypes

    library = ctypes.CDLL("libhccl.so")
    library.npusim_hccl_report.restype = ctypes.c_char_p
    found: list[dict[str, object]] = json.loads(library.npusim_hccl_report())["communicators"]
    return found


def main() -> None:
    """On one rank: start the device and the process group, run the module's checks named, write the outcomes."""
    from llm_adapt.simulators import enter, install

    enter(os.environ["SIMULATE"])
    import torch
    import torch.distributed as dist
    import torch_npu  # noqa: F401  (brings torch.npu and the backend)

    install()
    importlib.import_module(sys.argv[1])
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.npu.set_device(rank)
    dist.init_process_group("hccl", rank=rank, world_size=size)
    names = sys.argv[2:]
    found = dict.fromkeys(names, "not run: an earlier check failed")
    for name in names:
        try:
            CHECKS[name](rank, size)
            torch.npu.synchronize()
        except BaseException:  # noqa: BLE001  (whatever it is, it is the outcome)
            found[name] = traceback.format_exc()
            print(found[name], flush=True)
            break
        found[name] = ""
    Path(os.environ["OUTCOMES"], f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    if any(found.values()):
        os._exit(1)  # a rank that failed does not wait for the others
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def run(
    module: str, names: Sequence[str], num_ranks: int, folder: Path, variables: Mapping[str, str] | None = None
) -> list[Ended]:
    """Run checks of a module on that many ranks; how each rank ended, in their order."""
    common = {key: value for key, value in os.environ.items() if not key.startswith(("LLM_ADAPT_SIM", "HCCL_"))}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port()), "WORLD_SIZE": str(num_ranks)}
    common |= {"PYTHONPATH": os.environ.get("PYTHONPATH") or str(ROOT), "OUTCOMES": str(folder)}
    common |= {"SIMULATE": "npu", "OMP_NUM_THREADS": "1", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", **(variables or {})}
    logs = [folder / f"{rank}.txt" for rank in range(num_ranks)]
    ranks = []
    for rank, log in enumerate(logs):
        with open(log, "wb") as output:
            environment = common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            command = [sys.executable, __file__, module, *names]
            ranks.append(subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT))
    try:
        statuses = [process.wait(TIMEOUT_S) for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    return [Ended(status, log.read_text(encoding="utf-8")) for status, log in zip(statuses, logs, strict=True)]


def outcomes(
    module: str, names: Sequence[str], num_ranks: int, folder: Path, variables: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Run checks that are to hold: name of the check -> "" or what every rank says."""
    ended = run(module, names, num_ranks, folder, variables)
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    assert all(file.exists() for file in files), "\n".join(one.text for one in ended)
    found = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    return {
        name: "\n".join(f"rank {rank}: {one[name]}" for rank, one in enumerate(found) if one[name]) for name in names
    }


if __name__ == "__main__":
    import hccl_ranks  # the module in which the checks register, which this script is not

    hccl_ranks.main()
