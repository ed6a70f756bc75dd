"""Which rows of the Megatron table resolve in which version of Megatron-Core; nothing of Megatron is imported.

    python -m tests.frameworks.megatron.seam_table                    # the installed version against the page
    python -m tests.frameworks.megatron.seam_table --download --write # all versions, from their wheels
    python -m tests.frameworks.megatron.seam_table --download --write --tree 0.16.1=DIR ...

--tree names an unpacked source tree (the folder above megatron/) for what a wheel lacks: before 0.17 the training
loop is in no wheel.

A cell is the fingerprint of the definition (llm_adapt.patching.fingerprint), or one of the words in LEGEND.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import importlib.util
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from llm_adapt.adapters.cpu import ADAPTER
from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron import rows
from llm_adapt.patching import Loan, Patch, Row, split_target
from llm_adapt.patching.fingerprint import find_definition, fingerprint_source
from llm_adapt.report import Report
from llm_adapt.settings import resolve as resolve_settings

__all__ = [
    "PAGE",
    "VERSIONS",
    "Folder",
    "Joined",
    "Sources",
    "Wheel",
    "cell",
    "column",
    "differences",
    "download",
    "installed",
    "page",
    "read_page",
    "table",
]

PAGE = Path(__file__).parents[3] / "docs" / "megatron_seams.md"

# Version -> Python version of a wheel that the index has for it.
VERSIONS: Mapping[str, str] = {
    "0.12.3": "3.11",
    "0.13.1": "3.11",
    "0.14.0": "3.11",
    "0.15.3": "3.11",
    "0.16.1": "3.11",
    "0.17.1": "3.12",
    "0.18.2": "3.12",
    "0.19.0": "3.12",
}
_PLATFORM = "manylinux_2_28_x86_64"

ABSENT, NO_MODULE, UNPACKED = "absent", "no module", "not in wheel"
ASSIGNED, INHERITED, IMPORTED, READ, IMPORTS = "assigned", "inherited", "imported", "read", "imports it"
LEGEND: Mapping[str, str] = {
    "twelve hexadecimal digits": "the definition is there; its fingerprint",
    ASSIGNED: "the name is bound by an assignment, which has no fingerprint",
    INHERITED: "the method comes from a base class",
    IMPORTED: "the name is imported from another module, whose definition counts",
    READ: "the row adds a name that the module reads",
    IMPORTS: "the module imports the package that the row lends",
    ABSENT: "the module is there and the name is not: the row is skipped and reported",
    NO_MODULE: "the version has no such module: the row never applies",
    UNPACKED: "the wheel has no such package: it is in Megatron-LM's repository only",
}
# Words for a row that applies; so does every fingerprint.
RESOLVED = frozenset({ASSIGNED, INHERITED, IMPORTED, READ, IMPORTS})


class Sources(Protocol):
    """Source text of one version."""

    def text(self, path: str) -> str | None:
        """Text of a file, by its path below the root ("megatron/core/utils.py"); None when there is none."""

    def covers(self, folder: str) -> bool:
        """Whether a file that is missing below this folder is missing in the version itself."""


class Wheel:
    """A wheel that was downloaded and not installed."""

    def __init__(self, path: Path) -> None:
        self._zip = zipfile.ZipFile(path)
        self._names = frozenset(self._zip.namelist())

    def text(self, path: str) -> str | None:
        """Text of one member."""
        return self._zip.read(path).decode() if path in self._names else None

    def covers(self, folder: str) -> bool:
        """Whether a member lies below the folder: a wheel has whole packages."""
        return any(name.startswith(f"{folder}/") for name in self._names)


class Folder:
    """An unpacked source tree (complete), or site-packages (what the wheel had)."""

    def __init__(self, root: Path, complete: bool = False) -> None:
        self._root, self._complete = root, complete

    def text(self, path: str) -> str | None:
        """Text of one file."""
        file = self._root / path
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def covers(self, folder: str) -> bool:
        """True for a source tree; otherwise whether the folder exists."""
        return self._complete or (self._root / folder).is_dir()


class Joined:
    """A wheel, and a source tree of the same version for the packages that the wheel lacks."""

    def __init__(self, parts: Sequence[Sources]) -> None:
        self._parts = parts

    def text(self, path: str) -> str | None:
        """Text from the first part that has it."""
        return next((text for part in self._parts if (text := part.text(path)) is not None), None)

    def covers(self, folder: str) -> bool:
        """Whether one part does."""
        return any(part.covers(folder) for part in self._parts)


def installed() -> tuple[str, Folder]:
    """Version and source of the Megatron-Core that is installed.

    Raises: ModuleNotFoundError when there is none.
    """
    spec = importlib.util.find_spec("megatron.core")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("megatron-core is not installed; run: pip install megatron-core==0.16.1")
    return importlib.metadata.version("megatron-core"), Folder(Path(spec.origin).parents[2])


def table() -> list[Row]:
    """The rows of the product, for the CPU: it has every row that another device has."""
    return rows(Context(ADAPTER, resolve_settings(device="cpu"), Report()))


def column(sources: Sources) -> dict[str, str]:
    """Target -> cell, for every row of the product."""
    return {row.target: cell(sources, row) for row in table()}


def cell(sources: Sources, row: Row) -> str:
    """Whether a row resolves: a fingerprint, or one of the words in LEGEND."""
    module, name = split_target(row.target)
    path = module.replace(".", "/")
    text = sources.text(f"{path}.py") or sources.text(f"{path}/__init__.py")
    if text is None:
        package = "/".join(module.split(".")[:2])
        return NO_MODULE if sources.covers(package) else UNPACKED
    tree = ast.parse(text)
    if isinstance(row, Loan):
        return IMPORTS if name in _imported_packages(tree) else ABSENT
    found = fingerprint_source(text, name)
    if found is not None:
        return found
    if isinstance(row, Patch) and row.kind == "add":
        return READ if _reads(tree, name) else ABSENT
    return _bound(tree, name)


def _imported_packages(tree: ast.Module) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def _reads(tree: ast.Module, name: str) -> bool:
    return any(
        isinstance(node, ast.Name) and node.id == name and isinstance(node.ctx, ast.Load) for node in ast.walk(tree)
    )


def _bound(tree: ast.Module, qualname: str) -> str:
    """How a name without a definition of its own comes to be: assigned, imported or inherited."""
    owner, _, name = qualname.rpartition(".")
    if not owner:
        imports = [node for node in ast.walk(tree) if isinstance(node, (ast.Import, ast.ImportFrom))]
        if any(name == (alias.asname or alias.name) for node in imports for alias in node.names):
            return IMPORTED
        return ASSIGNED if name in _assigned(tree) else ABSENT
    scope = find_definition(tree, owner)
    if not isinstance(scope, ast.ClassDef):
        return ABSENT
    if name in _assigned(scope):
        return ASSIGNED
    bases = [base.id for base in scope.bases if isinstance(base, ast.Name)]
    # Every class has these two; the others must be found in a base class of the same module.
    if name in ("__new__", "__init__") or any(find_definition(tree, f"{base}.{name}") for base in bases):
        return INHERITED
    return ABSENT


def _assigned(scope: ast.Module | ast.ClassDef) -> set[str]:
    """Names assigned at the top of a module or class, also inside its if and try blocks."""
    found: set[str] = set()
    stack: list[ast.AST] = list(scope.body)
    while stack:
        node = stack.pop()
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {target.id for target in targets if isinstance(target, ast.Name)}
        elif isinstance(node, (ast.If, ast.Try, ast.With, ast.ExceptHandler)):
            stack.extend(ast.iter_child_nodes(node))
    return found


def download(versions: Mapping[str, str], folder: Path) -> dict[str, Path]:
    """Download wheels without installing them, whatever Python and platform this is.

    Raises: subprocess.CalledProcessError when the index lacks one or cannot be reached.
    """
    found = {}
    for version, python in versions.items():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
        command += ["--python-version", python, "--platform", _PLATFORM, "--dest", str(folder)]
        subprocess.run([*command, f"megatron-core=={version}"], check=True, capture_output=True, text=True)
        (found[version],) = folder.glob(f"megatron_core-{version}-*.whl")
    return found


def page(columns: Mapping[str, Mapping[str, str]], trees: Sequence[str] = ()) -> str:
    """The generated page: one line per row, one column per version."""
    versions = list(columns)
    lines = [
        "# Megatron-Core seams",
        "",
        "Generated; do not edit. Each line is a row of `llm_adapt.frameworks.megatron`, each column a version of",
        "megatron-core, read as text from the wheel that `pip download --no-deps` gets (nothing is installed or",
        "imported). The continuous integration compares this page with the installed version in every run, and",
        "with all wheels in the long one.",
        "",
        "    python -m tests.frameworks.megatron.seam_table --download --write",
        "",
    ]
    if trees:
        lines += [
            "What a wheel lacks (`megatron.training`, `megatron.legacy`) is from the release tag's source tree, with",
            f"`--tree VERSION=DIR` for {', '.join(trees)}.",
            "",
        ]
    lines += ["| cell | meaning |", "|---|---|"]
    lines += [f"| {word} | {meaning} |" for word, meaning in LEGEND.items()]
    lines += [
        "",
        "A row with a checked body replaces what it is written for, and is applied only to the bodies that were read",
        "(column `checked`); anything else is left alone and reported. The other rows call the original.",
        "",
        "| row | checked | " + " | ".join(versions) + " |",
        "|---|---|" + "---|" * len(versions),
    ]
    for row in table():
        checked = "yes" if isinstance(row, Patch) and row.fingerprints else "-"
        cells = [columns[version][row.target] for version in versions]
        lines.append(f"| `{row.target}` | {checked} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def read_page(text: str) -> dict[str, dict[str, str]]:
    """Version -> target -> cell, from the generated page."""
    lines = [line.strip("| \n").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    head = next(cells for cells in lines if cells[0] == "row")
    body = [cells for cells in lines if re.fullmatch(r"`[\w.]+:[\w.]+`", cells[0])]
    return {
        version: {cells[0].strip("`"): cells[index] for cells in body}
        for index, version in enumerate(head)
        if index >= 2
    }


def differences(version: str, found: Mapping[str, str], written: Mapping[str, Mapping[str, str]]) -> list[str]:
    """One line per cell in which the page and the source disagree; a source without the package says nothing."""
    if version not in written:
        return [f"{version} is not on the page; it has {', '.join(written)}"]
    known = written[version]
    return [
        f"{target} in {version}: found {found.get(target, 'no row')}, the page says {known.get(target, 'nothing')}"
        for target in sorted(set(found) | set(known))
        if found.get(target) not in (UNPACKED, known.get(target))
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Compare, or write the page; 1 when they differ."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--download", action="store_true", help=f"get wheels of {', '.join(VERSIONS)}")
    parser.add_argument("--tree", action="append", default=[], metavar="VERSION=DIR", help="folder above megatron/")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} instead of comparing with it")
    args = parser.parse_args(argv)
    parts: dict[str, list[Sources]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.download:
            parts = {version: [Wheel(wheel)] for version, wheel in download(VERSIONS, Path(folder)).items()}
        trees = dict(item.split("=", 1) for item in args.tree)
        for version, root in trees.items():
            parts.setdefault(version, []).append(Folder(Path(root), complete=True))
        columns = {version: column(Joined(found)) for version, found in parts.items()}
    if not columns:
        version, sources = installed()
        columns = {version: column(sources)}
    columns = dict(sorted(columns.items(), key=lambda item: [int(part) for part in item[0].split(".")]))
    if args.write:
        PAGE.write_text(page(columns, trees=list(trees)), encoding="utf-8")
        return 0
    written = read_page(PAGE.read_text(encoding="utf-8"))
    lines = [line for version, found in columns.items() for line in differences(version, found, written)]
    print("\n".join(lines) or f"{', '.join(columns)}: as on {PAGE.name}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
