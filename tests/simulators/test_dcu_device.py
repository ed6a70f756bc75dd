"""The cuda device of the DCU simulator: tensors, torch.cuda, training. Checks run in a process of the device."""

from __future__ import annotations

import pytest

from tests.simulators.dcu_process import checks_of, outcomes

MODULES = ("dcu_tensor_checks", "dcu_runtime_checks", "dcu_training_checks", "dcu_package_checks")
_found: dict[str, dict[str, str]] = {}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in checks_of(module)])
def test_on_the_device(module: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each check of the modules holds; its docstring says what it is."""
    if module not in _found:
        _found[module] = outcomes(module, tmp_path_factory.mktemp(module))
    assert _found[module][name] == "", _found[module][name]


def test_every_check_says_what_it_is() -> None:
    """Every check has a sentence that reads as the specification."""
    checks = [function for module in (*MODULES, "dcu_rccl_checks") for function in checks_of(module).values()]
    assert len(checks) > 30
    assert all((function.__doc__ or "").endswith(".") for function in checks)
