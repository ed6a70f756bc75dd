"""Shared by all tests: no test may leave the process patched."""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, settings

# No test asserts on time: a machine that is busy with other work must not fail one.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

_import = builtins.__import__


@pytest.fixture(autouse=True)
def leave_nothing_patched() -> Iterator[None]:
    """Fail a test that ends with llm_adapt active, after cleaning up behind it."""
    yield
    session = sys.modules.get("llm_adapt.session")
    was_patched = session is not None and session.is_patched()
    if session is not None:
        session.unpatch()
    hooks = [finder for finder in sys.meta_path if type(finder).__module__ == "llm_adapt.patching.import_hook"]
    sys.meta_path[:] = [finder for finder in sys.meta_path if finder not in hooks]
    lends, builtins.__import__ = builtins.__import__ is not _import, _import
    assert not was_patched, "the test left the process patched"
    assert not hooks, "the test left an import hook behind"
    assert not lends, "the test left builtins.__import__ replaced"
