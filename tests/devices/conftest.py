"""What the device tests share: the adapter's name, and the evidence that they leave."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_adapt.adapters import adapters
from tests.devices.evidence import Evidence


@pytest.fixture(scope="session")
def adapter_name(pytestconfig: pytest.Config) -> str:
    """Name of the adapter of the device under test."""
    return str(pytestconfig.getoption("--simulate") or pytestconfig.getoption("--device") or "cpu").partition(":")[0]


@pytest.fixture(scope="session")
def evidence(pytestconfig: pytest.Config, adapter_name: str) -> Iterator[Evidence]:
    """Collects what was found; written at the end where --evidence says."""
    from llm_adapt.ops.dispatch.registry import load_library  # imports torch, which must come after the simulator

    simulated = pytestconfig.getoption("--simulate")
    head = {"device": adapter_name, "simulated": simulated or "", "date": datetime.date.today().isoformat()}
    adapter = adapters()[adapter_name]
    libraries = {name: load_library(name) or "loads" for name in adapter.kernel_libraries}
    found = Evidence({**head, "versions": adapter.versions(), "libraries": libraries})
    yield found
    path = pytestconfig.getoption("--evidence")
    if path:
        found.save(Path(path))
