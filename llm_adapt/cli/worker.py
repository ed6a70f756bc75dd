"""One process of `llm-adapt run`: patch, then be the script."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llm_adapt
from llm_adapt.cli import render
from llm_adapt.errors import LlmAdaptError

__all__ = ["REFUSED", "run"]

REFUSED = 78  # exit code when patch() refuses; the same as the launcher's


def run(script: str, arguments: Sequence[str], is_module: bool = False) -> int:
    """Patch this process (settings come from LLM_ADAPT_* variables) and execute the script as __main__.

    Returns:
        REFUSED when patch() refuses; else 0 when the script ends. What the script raises goes to the
        interpreter as its own: without frames of llm_adapt, and SystemExit untouched.
    """
    try:
        llm_adapt.patch()
    except LlmAdaptError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            render.error(error)
        return REFUSED
    code, name_space = _load(script, arguments, is_module)
    try:
        exec(code, name_space)
    except Exception as error:
        trace = error.__traceback__
        own = trace.tb_next if trace is not None else None
        _record(error)
        sys.excepthook(type(error), error.with_traceback(own), own)
        return 1
    return 0


def _load(script: str, arguments: Sequence[str], is_module: bool) -> tuple[types.CodeType, dict[str, Any]]:
    """Compile the script and make it __main__, as the interpreter would."""
    main = types.ModuleType("__main__")
    if is_module:
        sys.path.insert(0, os.getcwd())
        spec = importlib.util.find_spec(script)
        if spec is not None and spec.submodule_search_locations is not None:
            spec = importlib.util.find_spec(script + ".__main__")
        if spec is None or spec.origin is None or spec.loader is None:
            raise LlmAdaptError(f"Module {script!r} was asked; it has no code to run. Give a module, not a package.")
        main.__spec__, main.__package__, path = spec, spec.parent, spec.origin
    else:
        path = script
        sys.path.insert(0, str(Path(script).resolve().parent))
    main.__file__ = path
    main.__builtins__ = __builtins__  # type: ignore[attr-defined]
    sys.argv = [path, *arguments]
    sys.modules["__main__"] = main
    return compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(main)


def _record(error: BaseException) -> None:
    """Hand the error to torch's elastic agent, whose summary then names it."""
    if "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)


if __name__ == "__main__":
    words = sys.argv[1:]
    as_module = words[:1] == ["-m"]
    name, *rest = words[1:] if as_module else words
    sys.exit(run(name, rest, as_module))
