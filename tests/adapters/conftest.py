"""Fixtures of the adapter tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.adapters.fake_host import FakeHost


@pytest.fixture
def fake(tmp_path: Path) -> FakeHost:
    """An empty machine: no device, no package, no variable but PATH."""
    return FakeHost(tmp_path)
