"""docs/megatron_seams.md: what it says is what the sources say, and every version of the range is accepted."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import zipfile
from pathlib import Path

import pytest

from llm_adapt.patching import Entry, Loan, Patch
from tests.frameworks.megatron import seam_table
from tests.frameworks.megatron.seam_table import PAGE, RESOLVED, UNPACKED, VERSIONS, Folder, Joined, Wheel

WRITTEN = seam_table.read_page(PAGE.read_text(encoding="utf-8"))
FINGERPRINT = re.compile(r"[0-9a-f]{12}")

SOURCE = '''
import os
from elsewhere import imported_name
try:
    import lent_package.part as part
except ImportError:
    assigned_in_branch = None
assigned = os.path.join

class Base:
    def inherited(self): ...

class Child(Base):
    alias = Base.inherited
    def own(self):
        """Docstring."""
        return 1

def function():
    return read_and_never_bound
'''


@pytest.fixture
def small_tree(tmp_path: Path) -> Folder:
    """One module, tree.core.module."""
    (tmp_path / "tree" / "core").mkdir(parents=True)
    (tmp_path / "tree" / "core" / "module.py").write_text(SOURCE)
    return Folder(tmp_path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("assigned", "assigned"),
        ("assigned_in_branch", "assigned"),
        ("imported_name", "imported"),
        ("Child.alias", "assigned"),
        ("Child.inherited", "inherited"),
        ("Child.__new__", "inherited"),
        ("missing", "absent"),
        ("Child.missing", "absent"),
        ("Missing.__new__", "absent"),
    ],
)
def test_a_name_without_a_definition_is_told_how_it_is_bound(small_tree: Folder, name: str, expected: str) -> None:
    """Assignments, imports, inherited methods and absent names each have their word."""
    assert seam_table.cell(small_tree, Patch(f"tree.core.module:{name}", None, "")) == expected


@pytest.mark.parametrize("name", ["function", "Child", "Child.own", "Base.inherited"])
def test_a_definition_has_its_fingerprint(small_tree: Folder, name: str) -> None:
    """Functions, classes and methods are told by twelve hexadecimal digits."""
    assert FINGERPRINT.fullmatch(seam_table.cell(small_tree, Patch(f"tree.core.module:{name}", None, "")))


def test_rows_that_add_or_lend_resolve_by_use(small_tree: Folder) -> None:
    """An added name must be read by the module, a lent package imported by it."""

    def add(name: str) -> Patch:
        return Patch(f"tree.core.module:{name}", None, "", kind="add")

    assert seam_table.cell(small_tree, add("read_and_never_bound")) == "read"
    assert seam_table.cell(small_tree, add("nobody_reads_it")) == "absent"
    assert seam_table.cell(small_tree, Loan("tree.core.module:lent_package", dict, "")) == "imports it"
    assert seam_table.cell(small_tree, Loan("tree.core.module:other_package", dict, "")) == "absent"


def test_a_missing_module_is_told_from_a_package_that_is_not_shipped(small_tree: Folder, tmp_path: Path) -> None:
    """Below a package that is there a missing module is an answer; below another it is not."""
    there, not_shipped = Patch("tree.core.gone:f", None, ""), Patch("tree.training.gone:f", None, "")
    assert seam_table.cell(small_tree, there) == "no module"
    assert seam_table.cell(small_tree, not_shipped) == "not in wheel"
    assert seam_table.cell(Folder(tmp_path, complete=True), not_shipped) == "no module"
    assert seam_table.cell(Joined([small_tree, Folder(tmp_path, complete=True)]), not_shipped) == "no module"


def test_a_wheel_is_read_as_its_folder(small_tree: Folder, tmp_path: Path) -> None:
    """The same text in a wheel gives the same cells."""
    with zipfile.ZipFile(tmp_path / "some.whl", "w") as archive:
        archive.writestr("tree/core/module.py", SOURCE)
    wheel = Wheel(tmp_path / "some.whl")
    for name in ("function", "Child.inherited", "missing"):
        row = Patch(f"tree.core.module:{name}", None, "")
        assert seam_table.cell(wheel, row) == seam_table.cell(small_tree, row)
    assert seam_table.cell(wheel, Patch("tree.training.x:f", None, "")) == "not in wheel"


def test_the_page_is_what_its_reader_reads() -> None:
    """Writing the page from its own cells gives the committed text: no line is edited by hand."""
    text = PAGE.read_text(encoding="utf-8")
    trees = re.search(r"--tree VERSION=DIR` for ([\d., ]+)\.\n", text)
    assert seam_table.page(WRITTEN, trees.group(1).split(", ") if trees else ()) == text


def test_the_page_has_every_row_and_every_version() -> None:
    """A row that is added to the product, or a version to the range, must be on the page."""
    targets = {row.target for row in seam_table.table()}
    assert list(WRITTEN) == list(VERSIONS)
    assert all(set(cells) == targets for cells in WRITTEN.values())
    assert not any(isinstance(row, Entry) for row in seam_table.table())


def test_the_installed_version_is_as_the_page_says() -> None:
    """Every row resolves in the installed Megatron-Core as its column says, fingerprints included."""
    if importlib.util.find_spec("megatron") is None or importlib.util.find_spec("megatron.core") is None:
        pytest.skip("megatron-core is not installed; run: pip install megatron-core==0.16.1")
    version, sources = seam_table.installed()
    assert seam_table.differences(version, seam_table.column(sources), WRITTEN) == []


def test_in_the_pinned_version_every_row_resolves() -> None:
    """0.16.1 is the version that is run, so no row may be skipped there."""
    unresolved = {
        target: cell
        for target, cell in WRITTEN["0.16.1"].items()
        if cell not in RESOLVED | {UNPACKED} and not FINGERPRINT.fullmatch(cell)
    }
    assert unresolved == {}


def test_every_body_on_the_page_is_one_that_its_row_accepts() -> None:
    """A row with fingerprints names bodies that some version has; another body is left alone, and reported."""
    for row in seam_table.table():
        if isinstance(row, Patch) and row.fingerprints:
            bodies = {cells[row.target] for cells in WRITTEN.values() if FINGERPRINT.fullmatch(cells[row.target])}
            assert set(row.fingerprints.values()) <= bodies, row.target


def test_a_changed_source_is_a_difference() -> None:
    """A body, a missing row and an unknown version are each reported with both sides; what is not shipped is not."""
    written = {"1.0": {"a:f": "0123456789ab", "b:g": "absent"}}
    found = {"a:f": "ba9876543210", "b:g": UNPACKED}
    (line,) = seam_table.differences("1.0", found, written)
    assert line == "a:f in 1.0: found ba9876543210, the page says 0123456789ab"
    assert seam_table.differences("1.0", {"b:g": "absent"}, written) == [
        "a:f in 1.0: found no row, the page says 0123456789ab"
    ]
    assert seam_table.differences("2.0", found, written) == ["2.0 is not on the page; it has 1.0"]


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_the_wheel_of_a_version_is_as_the_page_says(version: str, tmp_path: Path) -> None:
    """Each wheel, downloaded and not installed, has the column that the page shows for it."""
    try:
        wheels = seam_table.download({version: VERSIONS[version]}, tmp_path)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"the package index cannot be reached, or lacks megatron-core {version}: {error.stderr[-300:]}")
    assert seam_table.differences(version, seam_table.column(Wheel(wheels[version])), WRITTEN) == []
