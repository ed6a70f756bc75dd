"""The house: sizes, names, docstrings, front doors and the layer law, as they stand in docs/architecture.md."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "llm_adapt"
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_FOLDERS = 400, 60, 3
FORBIDDEN_NAMES = ("util", "utils", "common", "helper", "helpers", "manager", "misc", "base_utils")
Definition = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def sources(*folders: str) -> list[Path]:
    """Python files of the house, links to folders not followed twice."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


EVERYTHING = sources("llm_adapt", "tests", "examples", "benchmarks", "docker", "scripts")
CODE = sources("llm_adapt")


def place(path: Path, node: Any = None) -> str:
    """File, line and name, as an editor opens it."""
    name = "" if node is None else f":{node.lineno} {node.name}"
    return f"{path.relative_to(ROOT)}{name}"


def definitions(path: Path) -> Iterator[Any]:
    """Every function and class of a file, nested ones too."""
    return (node for node in ast.walk(ast.parse(path.read_bytes())) if isinstance(node, Definition))


def test_the_house_is_found() -> None:
    """The lists below are not empty by mistake."""
    assert len(CODE) > 40
    assert PACKAGE / "patching" / "plan.py" in CODE
    assert Path(__file__).resolve() in EVERYTHING


def test_no_file_is_long() -> None:
    """A file has at most 400 lines."""
    written = [*EVERYTHING, *PACKAGE.rglob("*.cpp"), *PACKAGE.rglob("*.h")]
    sizes = {place(path): len(path.read_text(encoding="utf-8").splitlines()) for path in written}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_LINES} == {}


def test_no_function_is_long() -> None:
    """A function has at most 60 lines."""
    long = {
        place(path, node): node.end_lineno - node.lineno + 1
        for path in EVERYTHING
        for node in definitions(path)
        if not isinstance(node, ast.ClassDef) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert long == {}


def test_folders_are_flat() -> None:
    """Folders inside the package are at most three deep."""
    assert [place(path) for path in CODE if len(path.relative_to(PACKAGE).parents) - 1 > MAX_FOLDERS] == []


def test_files_are_named_for_what_is_in_them() -> None:
    """No file or folder is a drawer for everything."""
    named = {part.removesuffix(".py") for path in EVERYTHING for part in path.relative_to(ROOT).parts}
    drawers = {name for name in named if set(name.split("_")) & set(FORBIDDEN_NAMES)}
    assert drawers == set()


def test_every_public_name_is_documented() -> None:
    """Modules, and the public functions, classes and methods at their top, have a docstring."""
    bare: list[str] = []
    for path in CODE:
        tree = ast.parse(path.read_bytes())
        if tree.body and ast.get_docstring(tree) is None:
            bare.append(place(path))
        owners = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
        nodes = [node for owner in owners for node in owner.body if isinstance(node, Definition)]
        private_classes = {node for node in tree.body if isinstance(node, ast.ClassDef) and node.name[0] == "_"}
        inside_private = {node for owner in private_classes for node in owner.body}
        public = [node for node in nodes if node.name[0] != "_" and node not in inside_private]
        bare += [place(path, node) for node in public if ast.get_docstring(node) is None]
    assert bare == []


def test_every_test_reads_as_a_sentence() -> None:
    """Each test has a docstring that ends with a full stop: together they are the specification."""
    silent = [
        place(path, node)
        for path in sources("tests")
        for node in definitions(path)
        if node.name.startswith("test_") and not (ast.get_docstring(node) or "").rstrip().endswith((".", "?", ":"))
    ]
    assert silent == []


def test_errors_say_what_to_do() -> None:
    """Errors raised on purpose are LlmAdaptError or a builtin's own kind, never a bare Exception."""
    bare = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in CODE
        for node in ast.walk(ast.parse(path.read_bytes()))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and getattr(node.exc.func, "id", "") in ("Exception", "BaseException")
    ]
    assert bare == []


@pytest.mark.parametrize("name", ["adapters", "ops", "parallel"])
def test_the_front_doors_stand_open(name: str) -> None:
    """The three rooms are reached from the root by a link, and nothing imports through it."""
    door = ROOT / name
    assert (door.is_symlink(), door.resolve()) == (True, PACKAGE / name)
    imports = [
        place(path)
        for path in EVERYTHING
        for node in ast.walk(ast.parse(path.read_bytes()))
        if (isinstance(node, ast.ImportFrom) and node.level == 0 and str(node.module).partition(".")[0] == name)
        or (isinstance(node, ast.Import) and any(item.name.partition(".")[0] == name for item in node.names))
    ]
    assert imports == []


def test_the_layer_law_holds() -> None:
    """cli > session > frameworks > patching | report > parallel > adapters | ops | simulators > settings > errors."""
    pytest.importorskip("importlinter")
    code = "from importlinter.cli import lint_imports; import sys; sys.exit(lint_imports())"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_import_llm_adapt_is_light(record_property: Any) -> None:
    """`import llm_adapt` imports neither torch nor a part of itself; its time is recorded, not judged."""
    code = """
import json, sys, time
before = set(sys.modules)
start = time.perf_counter()
import llm_adapt
end = time.perf_counter()
print(json.dumps([(end - start) * 1000, sorted(set(sys.modules) - before)]))
"""
    output = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    milliseconds, modules = json.loads(output)
    record_property("import_llm_adapt_ms", milliseconds)
    assert [name for name in modules if name.partition(".")[0] in ("torch", "numpy")] == []
    assert [name for name in modules if name.startswith("llm_adapt.")] == []
