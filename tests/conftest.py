"""Shared by all tests: which device they run on, and that no test may leave the process patched.

pytest                        everything that runs on the CPU
pytest --simulate npu         the tests marked every_device or simulator("npu"), on that simulated device
pytest --device npu           those marked every_device, on the hardware that is here
pytest --part frameworks      half of them (scripts/test_in_parts.sh)
"""

from __future__ import annotations

import builtins
import sys
from collections.abc import Iterator

import pytest
from _pytest.mark.structures import Mark
from hypothesis import HealthCheck, settings

# No test asserts on time: a machine that is busy with other work must not fail one.
settings.register_profile("busy machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy machine")

_import = builtins.__import__


def pytest_addoption(parser: pytest.Parser) -> None:
    """The device for tests that run on every one."""
    group = parser.getgroup("llm_adapt")
    group.addoption("--simulate", metavar="NAME", help="run the device tests on a simulated npu, mlu or dcu")
    group.addoption(
        "--part", choices=("frameworks", "rest"), help="only tests that import model files of frameworks, or the others"
    )
    group.addoption("--evidence", metavar="FILE", help="where tests/devices/test_ops.py writes what it found")
    group.addoption("--device", metavar="NAME", help="run the device tests on this hardware: cuda, npu, mlu, dcu")


def pytest_configure(config: pytest.Config) -> None:
    """Start the device before any test module imports torch."""
    simulated, name = config.getoption("--simulate"), config.getoption("--device")
    if not simulated and not name:
        return
    from llm_adapt import simulators
    from llm_adapt.adapters import activate, adapters

    if simulated:
        name = simulators.enter(simulated).simulator.name
    activate(adapters()[name])
    simulators.install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the tests that belong to the device."""
    simulated, name = config.getoption("--simulate"), config.getoption("--device")
    started = (simulated or name or "cpu").partition(":")[0]
    part = config.getoption("--part")
    kept = [
        item
        for item in items
        if _belongs(item, started, bool(simulated))
        and part in (None, "frameworks" if _imports_a_framework(item) else "rest")
    ]
    kept.sort(key=_imports_a_framework)  # stable
    config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
    items[:] = kept


def _imports_a_framework(item: pytest.Item) -> bool:
    """Whether a test imports model files into this process: patch() tries each of them, so all others come first."""
    parts = ("/megatron/", "/transformers/", "_upstream", "test_bench", "test_transformers")
    return any(part in item.nodeid for part in parts)


def _belongs(item: pytest.Item, started: str, is_simulated: bool) -> bool:
    mark: Mark | None = item.get_closest_marker("simulator")
    if mark is not None:
        return is_simulated and started in mark.args
    return started == "cpu" or item.get_closest_marker("every_device") is not None


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """torch's name for the device that tests marked every_device run on."""
    from llm_adapt.adapters import adapters

    simulated, name = pytestconfig.getoption("--simulate"), pytestconfig.getoption("--device")
    return adapters()[(simulated or name or "cpu").partition(":")[0]].device_type


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
