"""The processes of compare_transfer.py: a server per side, and a forked child per probe."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.metadata
import json
import os
import re
import signal
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transfer_probes import PROBES, Probe

__all__ = ["SIDES", "serve"]

SIDES = ("transfer", "facade")
_SEEN_LENGTH = 160
_ADDRESS = re.compile(r"0x[0-9a-f]+")
_OWN_FOLDER = re.compile(r"/[^\s'\"]*my_(?:cuda|npu)_run_\w+")
_FOLDER = re.compile(r"(?:/[^\s/'\"]+)+/(site-packages|simulators)/")


def _start(side: str) -> None:
    """CUDA becomes the simulated NPU, in this side's way; torch and torch_npu are imported already."""
    if side == "transfer":
        importlib.import_module("torch_npu.contrib.transfer_to_npu")
    else:
        import llm_adapt

        llm_adapt.patch(simulate="npu")


def _undo(side: str) -> None:
    if side == "transfer":
        raise NotImplementedError("transfer_to_npu has no way back")
    import llm_adapt

    llm_adapt.unpatch()


def serve(side: str, bare: bool, limit: int) -> None:
    """Read the numbers of the probes from stdin; write the versions, then one line of JSON per probe, to stdout.

    Args:
        bare: the side is started in the child, after the probe's `before`.
        limit: seconds for one probe.
    """
    from llm_adapt import simulators

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    numbers = json.load(sys.stdin)
    with _quiet():
        simulators.enter("npu")
        import torch
        import torch_npu  # noqa: F401

        simulators.install()
        if not bare:
            _start(side)
    torch.set_num_threads(1)
    print(json.dumps(_versions()), file=answers, flush=True)
    for number in numbers:
        print(json.dumps(_forked(PROBES[number], side, bare, limit)), file=answers, flush=True)


def _versions() -> dict[str, str]:
    names = ("torch", "torch_npu", "llm_adapt")
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{name: importlib.metadata.version(name) for name in names}}


@contextlib.contextmanager
def _quiet() -> Any:
    """Send stdout and stderr of this process, its C++ too, nowhere, unless an exception leaves the block."""
    with tempfile.TemporaryFile("w+") as kept:
        old = [os.dup(1), os.dup(2)]
        os.dup2(kept.fileno(), 1)
        os.dup2(kept.fileno(), 2)
        try:
            yield
        finally:
            for number, saved in zip((1, 2), old, strict=True):
                os.dup2(saved, number)
                os.close(saved)


def _forked(probe: Probe, side: str, bare: bool, limit: int) -> dict[str, Any]:
    """Run one probe in a child with a folder of its own; what became of it."""
    with tempfile.TemporaryDirectory(prefix="my_cuda_run_") as folder:
        answer = Path(folder) / "outcome.json"
        child = os.fork()
        if child == 0:
            signal.alarm(limit)
            outcome = _outcome(probe, side, bare, folder)
            answer.write_text(json.dumps(outcome), encoding="utf-8")
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if answer.exists():
            found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
            return found
    number = os.waitstatus_to_exitcode(status)
    died = f"no answer within {limit} s" if number == -signal.SIGALRM else f"the process died, exit code {number}"
    return {"ok": False, "seen": died}


def _outcome(probe: Probe, side: str, bare: bool, folder: str) -> dict[str, Any]:
    script = types.ModuleType("__main__")
    sys.modules["__main__"] = script  # a script's own names are found there, by pickle and by those who patch
    names: dict[str, Any] = vars(script)
    names |= {"folder": folder, "undo": lambda: _undo(side), "start": lambda: _start(side)}
    try:
        with _quiet():
            os.chdir(folder)
            if bare:
                _value(probe.before, names)
                _start(side)
            value = _value("import torch, os, io\n" + probe.code, names)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the script would see
        kinds = {kind.__name__ for kind in type(error).__mro__}
        text = str(error).strip().partition("\n")[0]
        return {"ok": probe.raises(kinds), "seen": _shown(f"{type(error).__name__}: {text}", folder)}
    return {"ok": probe.agrees(value), "seen": _shown(repr(value), folder)}


def _value(code: str, names: dict[str, Any]) -> Any:
    """Run the code; the value of its last line where that is an expression."""
    source = Path(names["folder"]) / f"probe_{len(code)}.py"  # torch.jit.script reads the source of what it compiles
    source.write_text(code, encoding="utf-8")
    tree = ast.parse(code)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    # Not inherited from this file: its future import of annotations would change what the probe's functions are.
    run: Callable[..., Any] = exec
    run(compile(tree, str(source), "exec", dont_inherit=True), names)
    if last is None:
        return None
    expression = ast.Expression(last.value)  # type: ignore[attr-defined]
    return eval(compile(expression, str(source), "eval", dont_inherit=True), names)


def _shown(text: str, folder: str) -> str:
    """Without what differs from run to run, and not too long."""
    text = _FOLDER.sub(r"\1/", _OWN_FOLDER.sub("FOLDER", text))
    text = _ADDRESS.sub("0x...", text)
    return text if len(text) <= _SEEN_LENGTH else text[: _SEEN_LENGTH - 3] + "..."
