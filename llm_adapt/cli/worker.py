"""One process of `llm-adapt run`: `python script.py`, no more and no less, with a patch before its first line.

Python imports `sitecustomize` before it looks at the script, and the one in startup/ patches. So the script is
a real __main__: its tracebacks, exit codes, signals, pickles and paths are those of `python script.py`.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

import llm_adapt
from llm_adapt.cli import render
from llm_adapt.cli.ranks import local_rank
from llm_adapt.errors import LlmAdaptError

__all__ = ["LAUNCHER", "REFUSED", "command", "patched_start", "show", "start"]

REFUSED = 78  # sysexits.h EX_CONFIG: no script returns it by accident
LAUNCHER = "_LLM_ADAPT_LAUNCHER"  # pid of the launcher that waits for this process; gone when the script starts
_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # torch's agent reads it when the process has failed
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def command(script: str, arguments: Sequence[str], is_module: bool) -> list[str]:
    """The interpreter's command line."""
    return [sys.executable, *(["-m"] if is_module else []), script, *arguments]


def patched_start(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that make an interpreter patch itself before its script."""
    paths = [str(Path(__file__).with_name("startup")), environ.get("PYTHONPATH", "")]
    if all(finder.find_spec("llm_adapt", None) is None for finder in sys.meta_path):
        paths.append(str(Path(llm_adapt.__file__).parents[1]))  # `python -m llm_adapt.cli` in a checkout
    return {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


def start() -> None:
    """Patch this process. If patch() refuses, say why and end the process before its script."""
    launcher = os.environ.pop(LAUNCHER, "")
    if launcher:
        _end_with(int(launcher))
    try:
        llm_adapt.patch()
        return
    except LlmAdaptError as error:
        if launcher and _ERROR_FILE in os.environ:  # the launcher shows one rank's reason, not everybody's
            Path(os.environ[_ERROR_FILE]).write_text(_reason(error), encoding="utf-8")
        else:
            show(error)
        code = REFUSED
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.raise_signal(signal.SIGINT)
    except BaseException:  # noqa: BLE001 - ours to show: Python's own start would hide all but its first line
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # an exception here would be swallowed by `site`, and SystemExit be called a fatal error


def show(error: LlmAdaptError) -> None:
    """Print an error in full in the first process of a machine, and its first line in the others."""
    rank = local_rank(os.environ)
    if rank in ("", "0"):
        render.error(error)
    else:
        first_line = str(error).partition("\n")[0]
        print(f"llm-adapt: local rank {rank}: {type(error).__name__}: {first_line}", file=sys.stderr)


def _reason(error: LlmAdaptError) -> str:
    """The error as torch's agent reads it; `source` tells it from what a script's @record may write."""
    return json.dumps({
        "message": f"{type(error).__name__}: {error}", "timestamp": int(time.time()), "source": "llm_adapt",
    })  # fmt: skip


def _end_with(launcher: int) -> None:
    """Let the kernel end this process when the launcher is killed: no orphan keeps a device."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != launcher:
        os._exit(128 + signal.SIGTERM)
