"""Triton's names for modules that define kernels at import: defining works, launching raises."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.frameworks.stand_ins.triton import modules


@pytest.fixture
def triton() -> Any:
    """The stand-in package."""
    return modules()["triton"]


def kernel(x_ptr: Any, n: int) -> None:
    """Adds one."""
    raise AssertionError("a kernel's body was run as Python")


def test_kernels_can_be_defined_in_every_form(triton: Any) -> None:
    """jit, jit(...), autotune(...) and heuristics(...) alone or stacked give one kernel that keeps name and doc."""
    forms = [
        triton.jit(kernel),
        triton.jit(launch_metadata=None)(kernel),
        triton.jit()(kernel),
        triton.autotune(configs=[triton.Config({"BLOCK": 16}, num_warps=4)], key=["n"])(triton.jit(kernel)),
        triton.autotune([], ["n"])(triton.heuristics({"EVEN": lambda args: True})(triton.jit(kernel))),
    ]
    for defined in forms:
        assert defined.fn is kernel
        assert defined.__name__ == "kernel"
        assert defined.__doc__ == "Adds one."


@pytest.mark.parametrize(
    "launch",
    [
        lambda defined: defined[(1,)](None, 4),
        lambda defined: defined[lambda meta: (1,)],
        lambda defined: defined(None, 4),
        lambda defined: defined.run(None, 4, grid=(1,)),
        lambda defined: defined.warmup(None, 4, grid=(1,)),
    ],
    ids=["grid", "grid function", "call", "run", "warmup"],
)
def test_launching_raises_at_once_with_the_way_out(triton: Any, launch: Any) -> None:
    """Every way to launch a kernel names the kernel and says what to do."""
    with pytest.raises(NotImplementedError, match=r"kernel was launched; Triton is not installed\. Install"):
        launch(triton.jit(kernel))


@given(x=st.integers(0, 10**12), y=st.integers(1, 10**6))
def test_cdiv_rounds_up(x: int, y: int) -> None:
    """cdiv(x, y) is the ceiling of x / y, exact for large numbers."""
    found = modules()["triton"].cdiv(x, y)
    assert (found - 1) * y < x <= found * y


@given(n=st.integers(1, 2**40))
def test_next_power_of_2_is_the_smallest_that_holds_n(n: int) -> None:
    """next_power_of_2(n) is a power of two p with p / 2 < n <= p."""
    found = modules()["triton"].next_power_of_2(n)
    assert math.log2(found).is_integer()
    assert found // 2 < n <= found


def test_a_name_that_is_not_there_is_an_attribute_error(triton: Any) -> None:
    """Nothing is invented: tl.dot, triton.testing and triton.__version__ do not exist."""
    for owner, name in ((triton.language, "dot"), (triton, "testing"), (triton, "__version__")):
        assert not hasattr(owner, name)


def test_every_call_builds_its_own_modules() -> None:
    """Two loans share no state, and each package knows its submodule."""
    first, second = modules(), modules()
    assert set(first) == {"triton", "triton.language"}
    assert first["triton"] is not second["triton"]
    assert first["triton"].language is first["triton.language"]
    assert isinstance(first["triton"], ModuleType)
