"""Documents say what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

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


@pytest.fixture
def devices_page() -> ModuleType:
    """scripts/devices_page.py."""
    spec = importlib.util.spec_from_file_location("devices_page", ROOT / "scripts" / "devices_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_devices_is_made_of_evidence(devices_page: ModuleType):
    """docs/devices.md is what docs/evidence says; `python scripts/devices_page.py` writes it."""
    assert devices_page.claims_without_evidence() == []
    assert devices_page.PAGE.read_text(encoding="utf-8") == devices_page.page()


def test_a_claim_without_evidence_is_found(devices_page: ModuleType, monkeypatch: pytest.MonkeyPatch):
    """A device that README.md says yes of needs a file; a wrong call in a file is told."""
    found = devices_page.evidence()
    monkeypatch.setattr(devices_page, "evidence", lambda: [one for one in found if one["device"] != "npu"])
    assert devices_page.claims_without_evidence() == ["Ascend NPU: no docs/evidence/ops_*.json"]
    wrong = {**found[0], "rows": [{**found[0]["rows"][0], "wrong": 1, "reasons": ["off"]}]}
    monkeypatch.setattr(devices_page, "evidence", lambda: [wrong, *found[1:]])
    assert len(devices_page.claims_without_evidence()) == 1


def test_the_table_of_operators_is_that_of_the_code():
    """docs/ops.md lists every op with its formula and its kernels; `python -m tests.ops_table` writes it."""
    (found,) = ops_table.PART.findall(ops_table.DOCUMENT.read_text(encoding="utf-8"))
    assert found == ops_table.table()
