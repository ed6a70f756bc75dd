"""Patch, then let the interpreter go on to the script.

Python imports `sitecustomize` when it is ready to run and has not yet looked at the script. This one leaves no
trace: it takes its folder out of sys.path and PYTHONPATH, so that no child process sees it, and hands over to
the machine's own sitecustomize, if there is one.
"""

import importlib
import os
import sys


def _step_aside() -> None:
    here = os.path.dirname(__file__)
    sys.path.remove(here)
    _, _, inherited = os.environ.pop("PYTHONPATH").partition(os.pathsep)
    if inherited:
        os.environ["PYTHONPATH"] = inherited
    this = sys.modules.pop("sitecustomize")
    try:
        importlib.import_module("sitecustomize")
    except ImportError as error:
        if error.name != "sitecustomize":
            raise
    finally:  # what fails there is reported by `site`, as always; the import of this module needs its entry back
        sys.modules.setdefault("sitecustomize", this)


if __name__ == "sitecustomize":
    try:
        _step_aside()
    finally:
        importlib.import_module("llm_adapt.cli.worker").start()
