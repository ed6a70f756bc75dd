"""The MLU simulator's device, torch.mlu and torch_mlu_ops. Each module of checks runs in a process of its own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.simulators.mlu_process import outcomes

MODULES = ("mlu_tensor_checks", "mlu_runtime_checks", "mlu_training_checks", "mlu_ops_checks")
_found: dict[str, dict[str, str]] = {}


def checks_in(module: str) -> dict[str, str]:
    """Names and docstrings of a module's checks, read: it imports torch_mlu, which is only there when simulating."""
    tree = ast.parse(Path(__file__).with_name(f"{module}.py").read_text(encoding="utf-8"))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    marked = [node for node in functions if "check" in [ast.unparse(mark) for mark in node.decorator_list]]
    return {node.name: ast.get_docstring(node) or "" for node in marked}


@pytest.mark.parametrize(("module", "name"), [(module, name) for module in MODULES for name in checks_in(module)])
def test_on_the_device(module: str, name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each check of the modules holds; its docstring says what it is."""
    if module not in _found:
        _found[module] = outcomes(module, tmp_path_factory.mktemp(module))
    assert _found[module][name] == "", _found[module][name]


@pytest.mark.multiprocess
@pytest.mark.parametrize("name", checks_in("mlu_cncl_checks"))
def test_on_two_ranks(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Each check of the collectives holds on both ranks; its docstring says what it is."""
    if "cncl" not in _found:
        _found["cncl"] = outcomes("mlu_cncl_checks", tmp_path_factory.mktemp("cncl"), num_ranks=2)
    assert _found["cncl"][name] == "", _found["cncl"][name]


def test_every_check_says_what_it_is() -> None:
    """Every check has a sentence that reads as the specification."""
    texts = [text for module in (*MODULES, "mlu_cncl_checks") for text in checks_in(module).values()]
    assert len(texts) > 50
    assert all(text.endswith(".") for text in texts)
