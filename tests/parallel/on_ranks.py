"""Run the checks of a file on several ranks under `llm-adapt run`, and hand back what came of them.

A file of checks is a script that knows nothing of llm_adapt: functions marked with @check, then `main()`. Every
check runs on every rank, in the order of the file; the first failure ends the run, because ranks that wait for
one that failed would only time out.
"""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

__all__ = ["CHECKS", "check", "main", "outcomes"]

Check = Callable[[int, int], None]
CHECKS: dict[str, Check] = {}
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 60  # of a collective: longer than a loaded machine needs, shorter than anybody waits


def check(function: Check) -> Check:
    """Register a check, called with its rank and the number of ranks; its docstring is the specification."""
    CHECKS[function.__name__] = function
    return function


def main(backend: str = "nccl") -> None:
    """On one rank: start the process group as a CUDA script does, run the checks, write the outcomes."""
    import torch
    import torch.distributed as dist

    local_rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(local_rank)
    timeout = datetime.timedelta(seconds=TIMEOUT_S)
    dist.init_process_group(backend, timeout=timeout, device_id=torch.device("cuda", local_rank))
    found = dict.fromkeys(CHECKS, "not run: an earlier check failed")
    for name, function in CHECKS.items():
        try:
            dist.barrier()
            function(dist.get_rank(), dist.get_world_size())
        except BaseException:  # noqa: BLE001  (whatever it is, it is the outcome)
            found[name] = traceback.format_exc()
            break
        found[name] = ""
    Path(os.environ["OUTCOMES"], f"{os.environ['RANK']}.json").write_text(json.dumps(found))


def outcomes(script: Path, num_ranks: int, folder: Path, options: Sequence[str] = ()) -> dict[str, str]:
    """Run a file of checks on that many ranks: name of the check -> "" or what every rank says."""
    command = [sys.executable, "-m", "llm_adapt.cli", "run", "--device", "cpu", "--nproc", str(num_ranks)]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("LLM_ADAPT_")}
    environment |= {"PYTHONPATH": str(ROOT), "OUTCOMES": str(folder), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, *options, str(script)], env=environment, capture_output=True, text=True, timeout=500, check=False
    )
    files = [folder / f"{rank}.json" for rank in range(num_ranks)]
    assert all(file.exists() for file in files), done.stdout + done.stderr
    ranks = [json.loads(file.read_text()) for file in files]
    return {
        name: "\n".join(f"rank {rank}: {found[name]}" for rank, found in enumerate(ranks) if found[name])
        for name in ranks[0]
    }
