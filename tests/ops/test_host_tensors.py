"""Tensors on the CPU in a process of another device: a device's kernel is passed over, and not condemned for it."""

from __future__ import annotations

import pytest
import torch

import llm_adapt
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import policy_in_force, using
from llm_adapt.ops.dispatch.policy import Policy
from tests.ops.scaled_op import TOY, toy_library, toy_op


@pytest.mark.parametrize(("device", "library"), [("npu", "reference"), ("cpu", TOY), ("", TOY)])
def test_a_kernel_of_the_device_is_not_asked(device: str, library: str) -> None:
    """It would raise, and the failed proof would take it away from the device's own tensors too."""
    with toy_op() as entry, toy_library("scaled", lambda x: x * 2), using(Policy(order=(TOY,), device=device)):
        entry(torch.ones(3))
        (binding,) = dispatchers["scaled"].bindings.values()
        assert binding.choice.library == library
        assert dispatchers["scaled"].quarantine == {}
        if library == "reference":
            assert binding.choice.refusals == {TOY: f"computes on {device}; the tensors are on the CPU"}


def test_patch_names_the_device() -> None:
    """The policy of a session knows which device it is of."""
    with llm_adapt.patched(device="cpu"):
        assert policy_in_force().device == "cpu"
