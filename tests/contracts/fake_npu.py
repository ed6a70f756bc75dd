"""The fake of torch_npu as one module."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tests.contracts import fake_npu_attention, fake_npu_decoding, fake_npu_dense, fake_npu_moe
from tests.contracts.recording import FakeVendor, contracts, fake_vendor

__all__ = ["FUNCTIONS", "fake_npu"]

FUNCTIONS = {
    name: function
    for module in (fake_npu_attention, fake_npu_decoding, fake_npu_dense, fake_npu_moe)
    for name, function in module.FUNCTIONS.items()
}


def fake_npu() -> AbstractContextManager[FakeVendor]:
    """`with fake_npu() as vendor:` torch_npu can be imported, and our kernels are loaded against it."""
    return fake_vendor("torch_npu", {"torch_npu": FUNCTIONS}, contracts("npu"))
