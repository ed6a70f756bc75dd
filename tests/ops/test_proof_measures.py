"""The measure of proofs: what is left of numbers that cancel, steps between subnormal numbers, empty means."""

from __future__ import annotations

import pytest
import torch

import llm_adapt
from llm_adapt.ops.attention import attention
from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.proof import compare


def test_what_is_left_of_a_gradient_that_cancels_is_measured_by_the_others() -> None:
    """A query that sees one key has the gradient 0; a rounding of what cancels is no error, and more is."""
    op = dispatchers["attention"].op
    expected = {"gradient of q": torch.zeros(4), "gradient of v": torch.ones(4)}
    for left, holds in ((1e-6, True), (1e-2, False), (float("nan"), False)):
        found = {"gradient of q": torch.full((4,), left), "gradient of v": torch.ones(4)}
        assert compare(op, found, expected).holds is holds
    zeros = {"gradient of q": torch.zeros(4), "gradient of v": torch.zeros(4)}
    assert compare(op, zeros, zeros).holds
    assert not compare(op, zeros | {"gradient of q": torch.full((4,), 1e-6)}, zeros).holds
    # An output of zeros is exact.
    assert not compare(op, {"output": torch.full((4,), 1e-6)}, {"output": torch.zeros(4)}).holds


@pytest.mark.parametrize("length", [1, 2])
def test_attention_over_one_key_is_served(length: int) -> None:
    """generate() from a prompt of one token: no kernel is quarantined."""
    with llm_adapt.patched(device="cpu"):
        q, k, v = (torch.randn(1, length, 4, 8, requires_grad=True) for _ in range(3))
        attention(q, k, v, causal="bottom_right", scale=8**-0.5)
        dispatcher = dispatchers["attention"]
        assert dispatcher.quarantine == {}
        assert [binding.choice.library for binding in dispatcher.bindings.values()] == ["torch_native"]


def test_a_first_call_while_torch_jit_traces_is_the_reference() -> None:
    """The recorder runs the function twice and compares; a proof between the two would make them differ."""
    from llm_adapt.ops.rms_norm import rms_norm

    with llm_adapt.patched(device="cpu", ops="order=torch_native"):
        x = torch.randn(3, 8)
        traced = torch.jit.trace(lambda x: rms_norm(x), (x,))
        assert torch.allclose(traced(x), rms_norm(x))
        libraries = [binding.choice.library for binding in dispatchers["rms_norm"].bindings.values()]
        assert libraries == ["reference", "torch_native"]


def test_a_step_between_subnormal_numbers_is_no_error() -> None:
    """Small float16 numbers have a few bits: one rounding of them is beyond any share of their size."""
    op = dispatchers["attention"].op
    wanted = {"output": torch.full((4,), 2.5 * 2.0**-24, dtype=torch.float64)}
    for value, holds in ((2.0 * 2.0**-24, True), (3.0 * 2.0**-24, True), (5.0 * 2.0**-24, False)):
        assert compare(op, {"output": torch.full((4,), value, dtype=torch.float16)}, wanted).holds is holds


def test_a_batch_of_ignored_targets_condemns_no_kernel() -> None:
    """The mean of no rows is NaN, as torch's, and its z-loss is 0; the next batch is served as before."""
    with llm_adapt.patched(device="cpu", ops="order=torch_native"):
        logits = torch.randn(3, 8, requires_grad=True)
        loss, z = cross_entropy(logits, torch.full((3,), -100))
        assert (loss.isnan().item(), z.item()) == (True, 0.0)
        assert cross_entropy(logits, torch.tensor([0, -100, 2]))[0].isfinite()
        assert dispatchers["cross_entropy"].quarantine == {}


def test_a_tensor_of_one_element_with_a_stride_is_compared() -> None:
    """It counts as contiguous whatever its stride, and its bytes must be readable all the same."""
    with llm_adapt.patched(device="cpu", ops="order=torch_native"):
        x = torch.randn(4)[::4].requires_grad_()
        assert (x.shape, x.stride()) == ((1,), (4,))
        loss, _ = cross_entropy(x.view(1, 1), torch.tensor([0]))
        assert loss.item() == 0.0
