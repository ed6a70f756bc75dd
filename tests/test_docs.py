"""Documents say what the code says."""

from __future__ import annotations

import re
from pathlib import Path

from llm_adapt.settings import SETTINGS
from tests import ops_table

ROOT = Path(__file__).resolve().parents[1]


def marks() -> set[str]:
    """Names of the workarounds that the code marks."""
    sources = (path.read_text(encoding="utf-8") for path in (ROOT / "llm_adapt").rglob("*.py"))
    return {name for text in sources for name in re.findall(r"Workaround: ([a-z0-9-]+)", text)}


def test_workarounds_are_listed():
    """Every workaround that the code marks stands in docs/workarounds.md, and nothing else does."""
    table = re.findall(r"^\| ([a-z0-9-]+) \|", (ROOT / "docs" / "workarounds.md").read_text(encoding="utf-8"), re.M)
    assert marks() == set(table) - {"name"}
    assert len(table) == len(set(table))


def test_readme_names_every_setting():
    """README.md names every setting."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [name for name in SETTINGS if f"`{name}`" not in text] == []


def test_links_between_documents_lead_somewhere():
    """Every relative link in a document leads to a file."""
    broken = []
    for document in [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "docker").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
            if not (document.parent / target).exists():
                broken.append(f"{document.relative_to(ROOT)} -> {target}")
    assert broken == []


def test_readme_commands_are_targets_of_the_makefile():
    """The commands of README.md are targets of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"`make ([a-z-]+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named <= targets
    assert {"train", "test"} <= named


def test_the_table_of_operators_is_that_of_the_code():
    """docs/ops.md lists every op with its formula and its kernels; `python -m tests.ops_table` writes it."""
    (found,) = ops_table.PART.findall(ops_table.DOCUMENT.read_text(encoding="utf-8"))
    assert found == ops_table.table()
