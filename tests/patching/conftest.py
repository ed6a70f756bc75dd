"""Fixtures of the patch engine's tests."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.patching.toys import ToyFinder, toys

SOURCES = {
    "toy": "__version__ = '3.1'",
    "toy.ops": """
        def norm(x): return ('norm', x)
        def scale(x): return ('scale', x)
        table = {'a': 1}
        order = [10, 30]
        class Layer:
            size = 4
            def forward(self): return ('forward', self.size)
            @staticmethod
            def kernel(x): return ('kernel', x)
            @classmethod
            def build(cls): return cls.__name__
            @property
            def width(self): return 10
        class Deep(Layer): pass
    """,
    "toy.late": "from toy.ops import norm\ndef use(): return norm(1)",
}


@pytest.fixture
def on_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder on sys.path; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(tmp_path) in str(getattr(sys.modules[name], "__spec__", "")):
            del sys.modules[name]


@pytest.fixture
def toy() -> Iterator[ToyFinder]:
    """The toy package, not imported yet."""
    with toys(SOURCES) as finder:
        yield finder
