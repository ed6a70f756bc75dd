"""Large calls of activations and losses are proved on a part of them that is a call of the same form."""

from __future__ import annotations

import pytest
import torch

from llm_adapt.ops.activation import activation, fewer_rows
from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.ops.dropout_add import dropout_add
from llm_adapt.ops.fused_linear_cross_entropy import fused_linear_cross_entropy
from llm_adapt.ops.glu import glu
from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax
from llm_adapt.ops.softmax_partials import softmax_partials

OPS = [activation, cross_entropy, dropout_add, glu, scaled_masked_softmax, softmax_partials]


@pytest.mark.parametrize("entry", OPS, ids=lambda entry: entry.op.name)
def test_rows_of_the_small_call_are_rows_of_the_large_one(entry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The result of the smaller call is a corner of the larger one's, for every input of the op."""
    op, is_smaller = entry.op, False
    monkeypatch.setattr("llm_adapt.ops.activation._FEW", 100)
    for given in op.inputs(torch.Generator().manual_seed(0), torch.float64):
        arguments = op.bind(**given) | ({op.random: 0.0} if op.random else {})
        arguments |= {"reduction": "none"} if "reduction" in arguments else {}
        before = {name: id(value) for name, value in arguments.items()}
        small = op.shrink(arguments)
        assert before == {name: id(value) for name, value in arguments.items()}
        found, whole = op.reference(**small), op.reference(**arguments)
        for part, all_of_it in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, whole)), strict=True):
            is_smaller |= part.numel() < all_of_it.numel()
            torch.testing.assert_close(part, all_of_it[tuple(slice(size) for size in part.shape)])
    assert is_smaller


def test_few_elements_are_left() -> None:
    """The longest row axes are halved; the last axis, tensors without rows and absent ones stay."""
    x, bias = torch.zeros(64, 3, 32768), torch.zeros(32768)
    given = {"x": x, "weights": torch.zeros(64, 3, 1), "rows": torch.zeros(3, 7), "bias": bias, "up": None}
    small = fewer_rows(given, "x", weights=1, rows=1, bias=1, up=1)
    assert {name: None if value is None else tuple(value.shape) for name, value in small.items()} == {
        "x": (2, 3, 32768),
        "weights": (2, 3, 1),
        "rows": (3, 7),
        "bias": (32768,),
        "up": None,
    }
    assert small["bias"] is bias


def test_a_vocabulary_is_narrowed_with_its_targets() -> None:
    """Of a linear layer's loss a part of the classes is left; each target is one of them, or ignored as before."""
    op = fused_linear_cross_entropy.op
    target = torch.tensor([0, 511, 512, 1999, -100, 3])
    arguments = op.bind(torch.randn(6, 4), torch.randn(2000, 4), target, torch.randn(2000), torch.rand(2000))
    small = op.shrink(arguments)
    assert small["target"].tolist() == [0, 511, 0, 1999 % 512, -100, 3]
    assert [small[name].shape[0] for name in ("hidden", "weight", "bias", "class_weight")] == [6, 512, 512, 512]
    assert op.reference(**small)[0].isfinite()
    assert op.shrink(small)["weight"].shape == small["weight"].shape


def test_scores_keep_queries_and_keys() -> None:
    """Of attention scores one head of one batch is left, with its mask and sink."""
    op = scaled_masked_softmax.op
    x, sinks = torch.randn(4, 8, 16, 32), torch.randn(8)
    for mask in (torch.zeros(4, 1, 16, 32), torch.zeros(16, 32), torch.zeros(32), torch.zeros(8, 1, 32)):
        small = op.shrink(op.bind(x, mask.bool(), sinks))
        assert small["x"].shape == (1, 1, 16, 32)
        assert op.reference(**small).shape == (1, 1, 16, 32)
