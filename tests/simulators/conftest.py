"""Tests of the simulators need g++ to build them; without it they are skipped, and say so."""

from __future__ import annotations

import shutil

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what would have to be compiled."""
    if shutil.which("g++") is not None:
        return
    for item in items:
        if "tests/simulators/" in item.nodeid and "test_start.py" not in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs g++ to build a simulator"))
