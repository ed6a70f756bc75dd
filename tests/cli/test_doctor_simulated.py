"""llm-adapt doctor where a simulator is asked for."""

from __future__ import annotations

from pathlib import Path

from llm_adapt.adapters import FindingKind
from llm_adapt.cli.doctor_checks import examine
from tests.adapters.fake_host import FakeHost


def test_a_simulator_that_is_asked_for_is_told(tmp_path: Path) -> None:
    """Whoever left LLM_ADAPT_SIMULATE set hears that the device chosen here is not the one scripts will get."""
    fake = FakeHost(tmp_path)
    fake.environ["LLM_ADAPT_SIMULATE"] = "npu"
    (note,) = [found for found in examine(fake.host, None, None).findings if found.kind is FindingKind.NOTE]
    assert "LLM_ADAPT_SIMULATE=npu" in note.what
