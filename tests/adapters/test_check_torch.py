"""What each adapter says of the torch that was imported."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from llm_adapt.adapters import adapters

ADAPTERS = adapters()


def _torch(version: str = "2.9.0", cuda: str | None = None, **devices: Any) -> types.SimpleNamespace:
    return types.SimpleNamespace(__version__=version, version=types.SimpleNamespace(cuda=cuda), **devices)


def _count(number: int) -> types.SimpleNamespace:
    return types.SimpleNamespace(device_count=lambda: number)


@pytest.mark.parametrize(
    ("name", "torch", "reason"),
    [
        ("npu", _torch(), "did not register torch.npu"),
        ("npu", _torch(npu=_count(0)), "sees no NPU"),
        ("npu", _torch(npu=_count(8)), None),
        ("mlu", _torch(), "did not register torch.mlu"),
        ("mlu", _torch(mlu=_count(0)), "sees no MLU"),
        ("mlu", _torch(mlu=_count(1)), None),
        ("dcu", _torch("2.9.0+rocm6.3", cuda=None), "is not DTK's build"),
        ("dcu", _torch("2.9.0+das.opt1.dtk2604", **{"cuda_": 0}), "sees no DCU"),
        ("dcu", _torch("2.9.0+das.opt1.dtk2604", **{"cuda_": 8}), None),
        ("cuda", _torch(cuda=None), "was not built for CUDA"),
        ("cuda", _torch(cuda="12.8", cuda_=0), "sees no GPU"),
        ("cuda", _torch(cuda="12.8", cuda_=2), None),
        ("cpu", _torch(), None),
    ],
)
def test_check_of_torch(
    name: str, torch: types.SimpleNamespace, reason: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the import each adapter says whether this torch drives its device, or why not."""
    torch.cuda = _count(getattr(torch, "cuda_", 0))
    monkeypatch.setitem(sys.modules, "torch", torch)
    answer = ADAPTERS[name].check_torch()
    assert answer is None if reason is None else reason in str(answer)
