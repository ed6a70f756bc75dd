"""Starting Python processes for tests, with a time limit, and ending only those."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
