"""Replaced norms and rotary functions where nothing is computed yet: torch.compile, torch.export, meta and fake."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.frameworks.transformers.probed import PLAIN, served_norm, served_rotary

pytest.importorskip("transformers")


def test_compile_and_export_trace_norms() -> None:
    """torch.compile takes it in one graph, subclasses and flags too, and torch.export exports it."""
    for which in (("gemma3n", "Gemma3nRMSNorm"), ("nemotron", "NemotronLayerNorm1P")):
        cls, new, original = served_norm(*which)
        child = type("Child", (cls,), {"forward": new})
        x = torch.randn(3, 16)
        for norm in (type("Own", (cls,), {"forward": new})(16), type("Grandchild", (child,), {})(16)):
            expected = original(norm, x)
            compiled = torch.compile(norm, fullgraph=True, backend="aot_eager")
            torch.testing.assert_close(compiled(x), expected)
            exported = torch.export.export(norm, (x,), strict=False)
            torch.testing.assert_close(exported.module()(x), expected)


def test_compile_and_export_trace_rotary_functions() -> None:
    """torch.compile takes it in one graph, with sizes that change too, and torch.export exports it."""
    for which in (("glm", PLAIN), ("deepseek_v3", f"{PLAIN}_interleave"), ("gptj", PLAIN)):
        rotation, new, _ = served_rotary(*which)

        class Rotary(torch.nn.Module):
            """Calls it with keywords."""

            def forward(self, q: Any, cos: Any, sin: Any) -> Any:
                """Rotate."""
                return new(**dict.fromkeys(rotation.tensors, q), cos=cos, sin=sin)  # noqa: B023 - called in this turn

        width = 8 if rotation.columns == "one for each pair" else 16
        compiled = torch.compile(Rotary(), fullgraph=True, backend="aot_eager")
        for length in (4, 7, 9):
            shape = (2, length, 3, 16) if which[0] == "gptj" else (2, 3, length, 16)
            q, cos, sin = torch.randn(shape), torch.randn(2, length, width), torch.randn(2, length, width)
            expected = Rotary()(q, cos, sin)
            for y, z in zip(compiled(q, cos, sin), expected, strict=True):
                torch.testing.assert_close(y, z)
        exported = torch.export.export(Rotary(), (q, cos, sin), strict=False).module()
        for y, z in zip(exported(q, cos, sin), expected, strict=True):
            torch.testing.assert_close(y, z)


def test_meta_and_fake_tensors_pass_norms() -> None:
    """Shapes and dtypes come out without a value being read."""
    cls, new, _ = served_norm("llama", "LlamaRMSNorm")
    with torch.device("meta"):
        norm = cls(16)
    y = new(norm, torch.empty(2, 16, device="meta", dtype=torch.bfloat16))
    assert (y.device.type, y.dtype, y.shape) == ("meta", torch.float32, (2, 16))
    with FakeTensorMode():
        y = new(cls(16), torch.empty(2, 16))
    assert y.shape == (2, 16)
    cls, new, _ = served_norm("nemotron", "NemotronLayerNorm1P")  # which asks about autocast
    with torch.device("meta"):
        assert new(cls(16), torch.empty(2, 16)).device.type == "meta"


def test_meta_and_fake_tensors_pass_rotary_functions() -> None:
    """Shapes and dtypes come out without a value being read."""
    _, new, _ = served_rotary("llama")
    q, cos = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(2, 5, 8, device="meta")
    assert [y.device.type for y in new(q, q, cos, cos)] == ["meta", "meta"]
    with FakeTensorMode():
        q, cos = torch.empty(2, 3, 5, 8), torch.empty(2, 5, 8)
        assert [y.shape for y in new(q, q, cos, cos)] == [q.shape, q.shape]
