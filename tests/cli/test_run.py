"""llm-adapt run with one process: python script.py, no more and no less, but patched."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cli.launch import NOTE, ROOT, python, run, write

SLOW = pytest.mark.slow


def assert_same(words: list[str], cwd: Path, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the words under python and under llm-adapt: output, errors and end are equal but for llm-adapt's one line."""
    plain = python(*words, cwd=cwd, text=text, **variables)
    ours = run(*words, cwd=cwd, text=text, **variables)
    note, _, errors = ours.stderr.partition("\n")
    assert (ours.stdout, errors, ours.returncode) == (plain.stdout, plain.stderr, plain.returncode)
    assert note == NOTE + "1 process"
    return ours


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
