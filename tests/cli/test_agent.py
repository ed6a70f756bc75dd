"""llm-adapt run with several processes, and in processes that another launcher started."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from tests.cli.launch import NOTE, ROOT, TIMEOUT_S, free_port, python, run, started, write

SLOW = pytest.mark.slow

TRAIN = """
import os, sys
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return int(torch.cuda.is_available())

def child(queue):
    queue.put(torch.cuda.is_available() and torch.ones(1, device="cuda:0").is_cuda)

if __name__ == "__main__":
    dist.init_process_group("nccl")
    rank = dist.get_rank()
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    total = torch.full((1,), rank + 1.0, device="cuda")
    dist.all_reduce(total)
    # One write: Python runs with -u, where print() writes each of its arguments by itself, and ranks interleave.
    device = torch.cuda.current_device()
    sys.stdout.write(f"rank {rank} of {dist.get_world_size()} device {device} sum {total.item()}\\n")
    if rank == 0:
        queue = mp.get_context("spawn").SimpleQueue()
        process = mp.get_context("spawn").Process(target=child, args=(queue,))
        process.start()
        print("spawned", queue.get())
        process.join()
        print("loaded", [int(rows) for rows in DataLoader(Rows(), num_workers=1)])
        print("reports of children", os.listdir(os.environ["LLM_ADAPT_OUT"]))
        print("input", sys.stdin.read())
    dist.barrier()
    dist.destroy_process_group()
"""


def test_two_processes_train_patched_with_all_their_children(tmp_path: Path) -> None:
    """Ranks, spawned children and DataLoader workers are patched; each rank leaves a report, a child none."""
    write(tmp_path / "train.py", TRAIN)
    done = run("--nproc", "2", "--out", "out", "train.py", cwd=tmp_path, text="stdin")
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [
        "input stdin",
        "loaded [1]",
        "rank 0 of 2 device 0 sum 3.0",
        "rank 1 of 2 device 1 sum 3.0",
        "reports of children []",
        "spawned True",
    ]
    assert done.stderr == NOTE + "2 processes\n"
    reports = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in (tmp_path / "out").iterdir()}
    assert {name: report["device"] for name, report in reports.items()} == {
        "report.json": "cpu",
        "report.rank1.json": "cpu",
    }


LOAD = """
import torch
from torch.utils.data import DataLoader, Dataset

class Rows(Dataset):
    def __len__(self):
        return 1
    def __getitem__(self, index):
        return int(torch.cuda.is_available() and torch.ones(1, device="cuda").is_cuda)

if __name__ == "__main__":
    for method in ("fork", "spawn", "forkserver"):
        print(method, [int(rows) for rows in DataLoader(Rows(), num_workers=1, multiprocessing_context=method)])
"""


@SLOW
def test_workers_of_every_start_method(tmp_path: Path) -> None:
    """DataLoader workers are patched however multiprocessing starts them."""
    write(tmp_path / "load.py", LOAD)
    done = run("load.py", cwd=tmp_path)
    assert done.stdout == "fork [1]\nspawn [1]\nforkserver [1]\n", done.stderr


@SLOW
def test_checkout_that_only_the_current_folder_leads_to(tmp_path: Path) -> None:
    """`python -m llm_adapt.cli` in a checkout works without installation, spawned children included."""
    script = write(tmp_path / "script.py", TRAIN)
    done = run("--out", str(tmp_path / "out"), str(script), cwd=ROOT, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "spawned True" in done.stdout


FAIL = """
import os, sys, time
if os.environ["RANK"] == "0":
    print("waiting", end="")
    open("ready", "w").close()
    time.sleep(600)
while not os.path.exists("ready"):
    time.sleep(0.01)
raise ValueError("é")
"""


def test_first_failing_rank_ends_the_job(tmp_path: Path) -> None:
    """The job ends with the failing rank's own traceback and exit code, its report, and one line that names it."""
    write(tmp_path / "fail.py", FAIL)
    ready = write(tmp_path / "ready", "")
    plain = python("fail.py", cwd=tmp_path, RANK="1")
    ready.unlink()
    done = run("--nproc", "2", "--out", "out", "fail.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("waiting", 1)
    note, *trace, last = done.stderr.splitlines(keepends=True)
    assert (note, "".join(trace)) == (NOTE + "2 processes\n", plain.stderr)
    assert re.fullmatch(
        r"llm-adapt: rank 1 of 2 \(pid \d+\) ended with exit code 1 at [\d:]{8}; the others were stopped\.\n", last
    )
    assert os.listdir(tmp_path / "out") == ["report.rank1.json"]


KILLED = """
import os, signal
import torch, torch.distributed as dist
dist.init_process_group("nccl")
ones = torch.ones(4, device="cuda")
for step in range(10**9):
    dist.all_reduce(ones)
    if step == 20 and dist.get_rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_rank_killed_in_training_is_named(tmp_path: Path) -> None:
    """When a rank is killed in mid-training the other one ends, and the error names the one that was killed."""
    write(tmp_path / "killed.py", KILLED)
    done = run("--nproc", "2", "killed.py", cwd=tmp_path)
    assert done.returncode == 128 + signal.SIGKILL
    assert re.search(r"^llm-adapt: rank 1 of 2 \(pid \d+\) was killed by SIGKILL at", done.stderr, re.MULTILINE)


SLEEP = """
import os, sys, time
sys.stdout.write(f"{os.getpid()}\\n")  # one write, as above
time.sleep(600)
"""


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=SLOW), pytest.param(signal.SIGHUP, marks=SLOW)]
)
def test_signal_to_the_launcher_ends_every_process(number: signal.Signals, tmp_path: Path) -> None:
    """Ctrl-C and termination reach every rank; none is left, and the exit code is 128 + the signal."""
    write(tmp_path / "sleep.py", SLEEP)
    with started("-m", "llm_adapt.cli", "run", "--nproc", "2", "sleep.py", cwd=tmp_path) as launcher:
        assert launcher.stdout is not None
        ranks = [int(launcher.stdout.readline()) for _ in range(2)]
        launcher.send_signal(number)
        out, err = launcher.communicate(timeout=TIMEOUT_S)
    assert (launcher.returncode, out) == (128 + number, "")
    assert not any(is_running(rank) for rank in ranks)
    note, _, rest = err.partition("\n")
    assert note == NOTE + "2 processes"
    assert rest.count("KeyboardInterrupt") == (2 if number == signal.SIGINT else 0)  # two tracebacks may interleave
    assert "torch" not in rest


@SLOW
@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_killed_launcher_leaves_no_orphan(tmp_path: Path) -> None:
    """Ranks end with a launcher that had no time to end them."""
    write(tmp_path / "sleep.py", SLEEP)
    with started("-m", "llm_adapt.cli", "run", "--nproc", "2", "sleep.py", cwd=tmp_path) as launcher:
        assert launcher.stdout is not None
        ranks = [int(launcher.stdout.readline()) for _ in range(2)]
        launcher.kill()
    deadline = time.monotonic() + TIMEOUT_S
    while any(is_running(rank) for rank in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_running(pid: int) -> bool:
    """Whether the process lives; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_refusal_in_the_workers_is_told_once(tmp_path: Path) -> None:
    """When patch() refuses in every rank the reason is shown once, with exit code 78, and the script does not start."""
    source = "import os\nif 'RANK' in os.environ:\n    os.environ['LLM_ADAPT_STRCT'] = '1'\n"
    write(tmp_path / "site" / "sitecustomize.py", source)
    write(tmp_path / "script.py", "print('started')")
    paths = f"{tmp_path / 'site'}{os.pathsep}{ROOT}"
    for nproc in ("2", "1"):
        done = run("--nproc", nproc, "script.py", cwd=tmp_path, PYTHONPATH=paths)
        assert (done.stdout, done.returncode) == ("", 78)
        assert done.stderr.count("SettingsError: Unknown environment variable LLM_ADAPT_STRCT. Did you mean") == 1
        assert len(done.stderr.splitlines()) == 2


# -- ranks from outside --------------------------------------------------------------------------------------


def together(commands: list[list[str]], variables: list[dict[str, str]], cwd: Path) -> list[tuple[str, str, int]]:
    """Run several Python processes at once; what each printed, and its exit code."""
    with started(*commands[0], cwd=cwd, **variables[0]) as first, started(*commands[1], cwd=cwd, **variables[1]) as two:
        ends = [process.communicate(timeout=TIMEOUT_S) for process in (first, two)]
        return [(out, err, process.returncode) for (out, err), process in zip(ends, (first, two), strict=True)]


RANK = """
import os, torch, torch.distributed as dist
dist.init_process_group("nccl")
total = torch.full((1,), dist.get_rank() + 1.0, device="cuda")
dist.all_reduce(total)
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
print(total.item(), *(os.environ[name] for name in names))
dist.destroy_process_group()
"""
LAUNCHERS = {
    "Slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS_PER_NODE"),
    "OpenMPI": (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
}


@pytest.mark.parametrize("source", ["Slurm", pytest.param("OpenMPI", marks=SLOW)])
def test_ranks_of_slurm_and_openmpi(source: str, tmp_path: Path) -> None:
    """Processes that srun or mpirun started become the ranks of one job, in place, as torchrun would number them."""
    write(tmp_path / "rank.py", RANK)
    port = free_port()
    variables = [
        dict(zip(LAUNCHERS[source], (str(rank), "2", str(rank), "2"), strict=True)) | {"MASTER_PORT": port}
        for rank in range(2)
    ]
    ends = together([["-m", "llm_adapt.cli", "run", "rank.py"]] * 2, variables, tmp_path)
    assert ends == [("3.0 0 0 2 2\n", NOTE + "2 processes\n", 0), ("3.0 1 1 2 2\n", "", 0)]


@SLOW
def test_ranks_of_torchrun(tmp_path: Path) -> None:
    """torchrun can start llm-adapt as it starts a script."""
    write(tmp_path / "rank.py", RANK)
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llm_adapt.cli"]
    done = python(*words, "run", "rank.py", cwd=tmp_path)
    assert sorted(done.stdout.splitlines()) == ["3.0 0 0 2 2", "3.0 1 1 2 2"], done.stderr
    assert done.stderr == NOTE + "2 processes\n"


def test_two_machines_meet(tmp_path: Path) -> None:
    """A launcher on each machine, told its number and the address of the first, makes one job of them."""
    write(tmp_path / "rank.py", RANK)
    meet = ["--nnodes", "2", "--master-addr", "127.0.0.1", "--master-port", free_port()]
    commands = [["-m", "llm_adapt.cli", "run", *meet, "--node-rank", rank, "rank.py"] for rank in ("0", "1")]
    ends = together(commands, [{}, {}], tmp_path)
    note = NOTE + "2 processes on 2 machines, of which this is {}; they meet at 127.0.0.1\n"
    assert [(out, code) for out, _, code in ends] == [("3.0 0 0 2 1\n", 0), ("3.0 1 0 2 1\n", 0)]
    for rank, (_, err, _) in enumerate(ends):  # on a busy machine torch warns of a store that ended before the other
        assert err.startswith(note.format(rank))
        assert "Traceback" not in err


@SLOW
def test_port_that_is_taken(tmp_path: Path) -> None:
    """A meeting point that somebody else uses is an error on one screen that says what to change."""
    write(tmp_path / "script.py", "")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        done = run("--nproc", "2", "--master-port", port, "script.py", cwd=tmp_path)
    assert done.returncode == 78
    assert f"CommError: 2 processes were to meet at 127.0.0.1:{port}; torch's agent failed:" in done.stderr
    assert "Check --master-addr and --master-port" in done.stderr
    assert len(done.stderr.splitlines()) <= 4
