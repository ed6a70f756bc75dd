"""llm-adapt run: any script, unchanged, in one process or several, patched in every one."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import llm_adapt

ROOT = Path(llm_adapt.__file__).parents[1]
TIMEOUT_S = 300  # for one command; torch is imported up to four times in it, on a machine that may be busy
FOREIGN = re.compile("LLM_ADAPT_|SLURM_|OMPI_|MASTER_|TORCHELASTIC_|PYTHON|(LOCAL_)?(RANK|WORLD_SIZE)$|GROUP_|ROLE_")
NOTE = "llm-adapt: CPU (asked for by LLM_ADAPT_DEVICE; always available); "


def environment(**variables: str) -> dict[str, str]:
    """The environment of a user who knows nothing of ranks, with llm_adapt importable, on the CPU."""
    plain = {name: value for name, value in os.environ.items() if not FOREIGN.match(name)}
    here = {"PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    return {**plain, **here, "LLM_ADAPT_DEVICE": "cpu", **variables}


@contextmanager
def started(*words: str, cwd: Path, **variables: str) -> Iterator[subprocess.Popen[str]]:
    """A Python process that is killed at the end of the block, if it still runs; its workers end with it."""
    pipe = subprocess.PIPE
    command = [sys.executable, *words]
    with subprocess.Popen(
        command, cwd=cwd, env=environment(**variables), stdin=pipe, stdout=pipe, stderr=pipe, text=True
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.kill()


def python(*words: str, cwd: Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python to its end."""
    with started(*words, cwd=cwd, **variables) as process:
        out, err = process.communicate(text, timeout=TIMEOUT_S)
        return subprocess.CompletedProcess(words, process.returncode, out, err)


def run(*words: str, cwd: Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """`llm-adapt run` to its end."""
    return python("-m", "llm_adapt.cli", "run", *words, cwd=cwd, text=text, **variables)


def write(path: Path, source: str) -> Path:
    """Write a file of dedented text and the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return path


def free_port() -> str:
    """A port nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def assert_same(words: list[str], cwd: Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the words under python and under llm-adapt: output, errors and end are equal but for llm-adapt's one line."""
    plain = python(*words, cwd=cwd, text=text, **variables)
    ours = run(*words, cwd=cwd, text=text, **variables)
    note, _, errors = ours.stderr.partition("\n")
    assert (ours.stdout, errors, ours.returncode) == (plain.stdout, plain.stderr, plain.returncode)
    assert note == NOTE + "1 process"
    return ours


# -- one process: python script.py, no more and no less ------------------------------------------------------

MIRROR = '''
"""A docstring."""
from __future__ import annotations
import dataclasses, inspect, os, pickle, sys, traceback, warnings
import sibling

@dataclasses.dataclass
class Point:
    x: NotDefinedAnywhere = 3

def told():
    main = sys.modules["__main__"]
    yield __name__, __file__, __doc__, __spec__, __package__, __cached__, __builtins__, type(__loader__)
    yield sys.argv, sys.path, sys.flags, sys.warnoptions, main.__dict__ is globals()
    yield pickle.loads(pickle.dumps(Point())), inspect.getsource(Point), Point.__annotations__
    yield os.environ.get("PYTHONPATH"), [name for name in os.environ if name.startswith("_LLM")]
    yield sys.gettrace(), sys.excepthook is sys.__excepthook__, traceback.format_stack()

for line in told():
    print(*line)
warnings.warn("careful")
print(sys.stdin.readline())
breakpoint()
try:
    sibling.fail("é")
except KeyError as error:
    raise ValueError("it failed") from error
'''


def test_script_cannot_tell_llm_adapt_from_python(tmp_path: Path) -> None:
    """Names, paths, arguments, input, warnings, pickles, sources, the debugger and chained tracebacks are Python's."""
    folder = tmp_path / "ünï còdé"
    write(folder / "sibling.py", "def fail(key):\n    return {}[key]\n")
    write(folder / "mirror.py", MIRROR)
    words = ["ünï còdé/mirror.py", "--device", "npu", "", "--", "-m", "--help"]
    ours = assert_same(words, tmp_path, text="a line\nwhere\np sys.argv\ncontinue\n")
    assert "(Pdb) ['ünï còdé/mirror.py', '--device', 'npu', '', '--', '-m', '--help']" in ours.stdout
    assert ours.returncode == 1


def test_module_is_run_as_python_runs_it(tmp_path: Path) -> None:
    """With -m a package runs its __main__, with relative imports, its own name, spec and arguments."""
    write(tmp_path / "pkg" / "__init__.py", "")
    write(tmp_path / "pkg" / "part.py", "x = 1\n")
    source = (
        "import sys\nfrom .part import x\nprint(__name__, __package__, __spec__.name, sys.argv, sys.path, x)\n1 / 0\n"
    )
    write(tmp_path / "pkg" / "__main__.py", source)
    assert "__main__ pkg pkg.__main__ [" in assert_same(["-m", "pkg", "-m", "--nproc", "2"], tmp_path).stdout


ENDS = {
    "text": "import sys; sys.exit('text é')",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    "broken import": "import broken",
    "code": "import sys; sys.exit(3)",
    "code of refusal": "import sys; sys.exit(78)",
    "at once": "import os; os._exit(7)",
    "terminated": "import os, signal; os.kill(os.getpid(), signal.SIGTERM)",
    "interrupted": "raise KeyboardInterrupt",
    "usage": "import argparse; argparse.ArgumentParser().parse_args(['--x'])",
    "syntax": "x = = 3",
    "null byte": "x = 3\0",
    "thread": "import threading; threading.Thread(target=lambda: 1 / 0, name='t').start()",
    "relative import": "from . import broken",
}
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "how", [how if number < 3 else pytest.param(how, marks=SLOW) for number, how in enumerate(ENDS)]
)
def test_end_is_the_script_s_own(how: str, tmp_path: Path) -> None:
    """However a script ends, its exit code or signal and what is printed are those of python."""
    write(tmp_path / "broken.py", "x = (\n")
    write(tmp_path / "script.py", ENDS[how])
    assert_same(["script.py"], tmp_path)


@SLOW
@pytest.mark.parametrize("words", [["folder"], ["-m", "folder.absent"], ["./folder/../script.py"]], ids=str)
def test_whatever_python_runs(words: list[str], tmp_path: Path) -> None:
    """Folders with a __main__.py, modules that are not there and odd paths are left to Python."""
    write(tmp_path / "folder" / "__main__.py", "import sys; print(sys.argv, sys.path[0], __file__)")
    write(tmp_path / "script.py", "import sys; print(sys.argv, sys.path[0], __file__)")
    assert_same(words, tmp_path)


@SLOW
def test_modules_of_the_script_s_folder_do_not_reach_llm_adapt(tmp_path: Path) -> None:
    """A script beside files named like standard modules, or named so itself, still starts."""
    for name in ("random.py", "json.py", "logging.py", "torch_mlu.py"):
        write(tmp_path / name, "raise SystemExit('the wrong module')")
    write(tmp_path / "random.py", "import torch; print(torch.zeros(1, device='cuda').sum().item())")
    done = run("random.py", cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("0.0\n", 0), done.stderr


@SLOW
def test_machine_s_own_sitecustomize_still_runs(tmp_path: Path) -> None:
    """llm_adapt starts by a sitecustomize; one that the machine has is run as well, and its failure told as always."""
    write(tmp_path / "site" / "sitecustomize.py", "import os; os.environ['SEEN'] = __file__")
    write(tmp_path / "script.py", "import os, sitecustomize; print(os.environ['SEEN'], sitecustomize.__file__)")
    assert_same(["script.py"], tmp_path, PYTHONPATH=f"{tmp_path / 'site'}{os.pathsep}{ROOT}")


@SLOW
def test_checkout_that_only_the_current_folder_leads_to(tmp_path: Path) -> None:
    """`python -m llm_adapt.cli` in a checkout works without installation, spawned children included."""
    script = write(tmp_path / "script.py", TRAIN)
    done = run("--out", str(tmp_path / "out"), str(script), cwd=ROOT, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
    assert "spawned True" in done.stdout


# -- several processes ---------------------------------------------------------------------------------------

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
    print("rank", rank, "of", dist.get_world_size(), "device", torch.cuda.current_device(), "sum", total.item())
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


FAIL = """
import os, sys, time
if os.environ["RANK"] == "0":
    print("waiting", end="")
    time.sleep(600)
raise ValueError("é")
"""


def test_first_failing_rank_ends_the_job(tmp_path: Path) -> None:
    """The job ends with the failing rank's own traceback and exit code, its report, and one line that names it."""
    write(tmp_path / "fail.py", FAIL)
    plain = python("fail.py", cwd=tmp_path, RANK="1")
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


SLEEP = "import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)\n"


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
    assert ends == [("3.0 0 0 2 1\n", note.format(0), 0), ("3.0 1 0 2 1\n", note.format(1), 0)]


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
