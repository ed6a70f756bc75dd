"""Registration: what an op and a kernel must be before either serves."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel, find_op, kernel, load_library
from tests.ops.scaled_op import TOY, inputs, scaled, toy_library, toy_op


def double(x: torch.Tensor, bias: torch.Tensor | None = None, factor: float = 2.0) -> torch.Tensor:
    """A right kernel that does not honour `negative`."""
    return scaled(x, bias, factor)


def test_registration_compares_signatures() -> None:
    """A kernel has the op's parameters, in order, with their defaults, less those that it does not honour."""

    def other_default(x: torch.Tensor, factor: float = 1.0) -> torch.Tensor:
        return x

    def other_order(factor: float = 2.0, x: Any = None) -> torch.Tensor:
        return x

    def unknown(x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        return x

    def nothing(bias: torch.Tensor | None = None) -> torch.Tensor:
        return torch.empty(0)

    with toy_op():
        op = dispatchers["scaled"].op
        for function in (other_default, other_order, unknown):
            with pytest.raises(KernelError, match="was registered with the parameters"):
                op.register(Kernel("scaled", TOY, function, "a test"))
        with pytest.raises(KernelError, match=r"does not take \['x'\]"):
            op.register(Kernel("scaled", TOY, nothing, "a test"))
        with toy_library("scaled", double), pytest.raises(KernelError, match="there is one of that name already"):
            op.register(Kernel("scaled", TOY, double, "a test"))
        with pytest.raises(KernelError, match="there is one of that name already"):
            op.register(Kernel("scaled", "reference", double, "a test"))


def test_an_op_names_its_parameters() -> None:
    """What is said of an op is said of parameters that it has."""
    with pytest.raises(KernelError, match=r"declared with \['weight'\]"):
        FusedOp(scaled, inputs, differentiable=("x", "weight"))


def test_a_reference_is_annotated() -> None:
    """Whether a parameter is a tensor, a list of them or an option stands in its annotation."""

    def bare(x, factor=2.0):  # type: ignore[no-untyped-def]
        return x * factor

    with pytest.raises(KernelError, match=r"no annotation for \['factor', 'x'\]"):
        FusedOp(bare, inputs)


def test_an_op_is_declared_once() -> None:
    """Two ops of one name would be told apart by nobody."""
    with toy_op(), pytest.raises(KernelError, match="scaled was declared twice"), toy_op():
        pass


def test_a_name_that_no_op_has() -> None:
    """The nearest names are told."""
    with pytest.raises(KernelError, match="did you mean rms_norm"):
        find_op("rms_nrom")


def test_a_library_is_its_module_or_package() -> None:
    """A kernel belongs to the file, or the package of files, that it stands in."""
    with toy_op():
        double.__module__, was = "llm_adapt.ops.kernels.torch_npu.norms", double.__module__
        try:
            kernel("scaled", "a test")(double)
        finally:
            double.__module__ = was
        assert list(dispatchers["scaled"].op.kernels) == ["torch_npu"]


def test_a_library_that_is_not_there_has_a_reason() -> None:
    """Loading never raises: what failed is what is reported."""
    assert load_library("nobody_has_this").startswith("ModuleNotFoundError: No module named")
