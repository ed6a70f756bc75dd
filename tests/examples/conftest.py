"""Run an example as a user does, in processes of its own, and leave none of them behind."""

import json
import os
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLES = REPOSITORY / "examples"
MARK = "EXAMPLE_TEST_JOB"  # in the environment of every process of a job, so that its cleaner knows them


@dataclass
class Job:
    """One `llm-adapt run` of pretrain_gpt.py; its results are in `out`, its output in `log`."""

    out: Path
    log: Path
    mark: str
    launcher: subprocess.Popen = field(repr=False)

    def wait(self, timeout_s: float = 500) -> int:
        """The exit code; a job that takes longer is ended and fails the test with its output."""
        try:
            return self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.end_all()
            pytest.fail(f"the job ran longer than {timeout_s} s; its output:\n{self.output()}")

    def output(self) -> str:
        """What the launcher and all ranks printed so far."""
        return self.log.read_text(errors="replace")

    def losses(self) -> dict[int, float]:
        """Step -> training loss, as far as the job has come."""
        file = self.out / "loss.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.is_file() else []
        rows = [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written
        return {row["step"]: row["loss"] for row in rows}

    def wait_until(self, reached: Callable[[], bool], timeout_s: float = 300) -> None:
        """Return when `reached`; fail the test when the job ends before, or does not come so far."""
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.launcher.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"the job did not come so far; its output:\n{self.output()}")
            time.sleep(0.002)

    def processes(self) -> list:
        """Every living process of this job, the launcher and writers included."""
        import psutil

        found = []
        for process in psutil.process_iter():
            try:
                if process.environ().get(MARK) == self.mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
            except psutil.Error:  # ended meanwhile, or not ours
                continue
        return found

    def rank(self, rank: int):
        """The process of one rank: a child of the launcher whose environment says RANK."""
        children = [process for process in self.processes() if process.ppid() == self.launcher.pid]
        return next(child for child in children if child.environ().get("RANK") == str(rank))

    def end_all(self) -> None:
        """Kill what is left of the job."""
        for process in self.processes():
            process.kill()
        self.launcher.wait(30)


@pytest.fixture(scope="module")
def start_example(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Job]]:
    """start_example(nproc, *flags, simulate=""): start pretrain_gpt.py; what is left of it is ended later."""
    jobs = []

    def start(nproc: int, *flags: str | Path, simulate: str = "") -> Job:
        folder = tmp_path_factory.mktemp("job")
        mark = uuid.uuid4().hex
        command = [sys.executable, "-m", "llm_adapt.cli", "run", "--nproc", str(nproc)]
        command += ["--simulate", simulate] if simulate else ["--device", "cpu"]
        command += [str(EXAMPLES / "pretrain_gpt.py"), "--out", str(folder / "out"), *map(str, flags)]
        path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
        environment = os.environ | {MARK: mark, "PYTHONPATH": path, "PYTHONWARNINGS": "ignore"}
        with (folder / "log").open("w") as log:
            launcher = subprocess.Popen(
                command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        jobs.append(Job(folder / "out", folder / "log", mark, launcher))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end_all()


@pytest.fixture(scope="module")
def run_example(start_example: Callable[..., Job]) -> Callable[..., Job]:
    """run_example(nproc, *flags): the same, awaited; a job that fails, fails the test with its output."""

    def run(nproc: int, *flags: str | Path, simulate: str = "") -> Job:
        job = start_example(nproc, *flags, simulate=simulate)
        assert job.wait() == 0, job.output()
        return job

    return run
