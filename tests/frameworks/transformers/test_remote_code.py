"""Remote code: its norms and rotary functions are recognised too, though transformers executes the file itself."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llm_adapt

pytest.importorskip("transformers")

from transformers import dynamic_module_utils

NORM = """
import torch
from torch import nn

class ForeignRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(size))
        self.tiny = eps

    def forward(self, states):
        wide = states.float()
        return (self.gain * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.tiny)).to(states.dtype)
"""
MODEL = (
    "from .norm import ForeignRMSNorm\n"
    + NORM.replace("ForeignRMSNorm", "OwnRMSNorm")
    + """
def rotate_half(x):
    return torch.cat((-x[..., x.shape[-1] // 2:], x[..., : x.shape[-1] // 2]), -1)

def apply_rotary_pos_emb(q, k, cos, sin, unsqueeze_dim=1):
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
"""
)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder as transformers keeps one for a model of the hub."""
    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    folder = tmp_path / "transformers_modules" / "foreign"
    folder.mkdir(parents=True)
    for parent in (folder, folder.parent):
        (parent / "__init__.py").touch()
    (folder / "norm.py").write_text(NORM)
    (folder / "modeling.py").write_text(MODEL)
    others = {name: sys.modules.pop(name) for name in list(sys.modules) if name.startswith("transformers_modules")}
    gc.collect()
    yield folder
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]
    sys.modules.update(others)


def load(name: str, **options: Any) -> Any:
    """A class as AutoModel finds one."""
    return dynamic_module_utils.get_class_in_module(name, "transformers_modules/foreign/modeling.py", **options)


def test_remote_code_is_surveyed_and_restored(repository: Path) -> None:
    """The file that transformers executes, and the one that it imports, are served; unpatch() restores both."""
    x = torch.randn(3, 8)
    with llm_adapt.patched(device="cpu") as report:
        cls = load("OwnRMSNorm")
        module = sys.modules[cls.__module__]
        originals = [one.forward.__wrapped__ for one in (cls, module.ForeignRMSNorm)]
        torch.testing.assert_close(cls(8)(x), originals[0](cls(8), x))
        served = cls.forward
        assert load("OwnRMSNorm").forward is served  # it is not executed, nor surveyed, again
        applied = {line.subject for line in report.lines if line.choice == "applied"}
    name = "transformers_modules.foreign"
    assert {
        f"{name}.modeling:OwnRMSNorm.forward", f"{name}.norm:ForeignRMSNorm.forward",
        f"{name}.modeling:apply_rotary_pos_emb",
    } <= applied  # fmt: skip
    assert [one.forward for one in (cls, module.ForeignRMSNorm)] == originals


def test_a_file_that_changes_is_surveyed_again(repository: Path) -> None:
    """transformers executes it anew in the same module; the new class is served by what it computes now."""
    with llm_adapt.patched(device="cpu") as report:
        first = load("OwnRMSNorm")
        (repository / "modeling.py").write_text(MODEL.replace("self.gain * wide", "(1 + self.gain) * wide"))
        second = load("OwnRMSNorm")
        assert first is not second
        norm, x = second(8), torch.randn(3, 8)
        torch.testing.assert_close(norm(x), second.forward.__wrapped__(norm, x))
        reasons = [line.reason for line in report.lines if line.subject.endswith("OwnRMSNorm.forward")]
    assert reasons == ["computes rms_norm, one_plus_rounded, result dtype x"]


def test_with_operators_off_it_is_left_alone(repository: Path) -> None:
    """ops="off" leaves transformers' own function in place."""
    with llm_adapt.patched(device="cpu", ops="off"):
        assert not hasattr(load("OwnRMSNorm").forward, "__wrapped__")
