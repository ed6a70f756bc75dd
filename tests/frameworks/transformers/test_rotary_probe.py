"""Rotary functions of model files: which rotation each applies, what keeps one as it is, what a replacement does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.frameworks.transformers import rotary
from llm_adapt.frameworks.transformers.probe import share_apart
from tests.frameworks.transformers.probed import PLAIN, TOLD, make_module, modeling, op_calls, served_rotary, told

pytest.importorskip("transformers")


SOME = """
def rotate_half(x):
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)

def apply_rotary_pos_emb({parameters}):
    {before}
    cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
    q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
    {after}
    return q, k
"""


def some(before: str = "", after: str = "", parameters: str = "q, k, cos, sin, unsqueeze_dim=1") -> Any:
    """What is found for a function of that text."""
    source = SOME.format(before=before or "pass", after=after or "pass", parameters=parameters)
    return rotary.examine(make_module(source))[PLAIN]


# -- recognising --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "function", "family"),
    [
        ("llama", PLAIN, "half, columns: all, rounds each step, float32 tables: widen x"),
        ("nanochat", PLAIN, "half reversed, columns: all, rounds each step, float32 tables: widen x"),
        ("gpt_oss", PLAIN, "half, columns: one for each pair, rounds each step, float32 tables: widen x"),
        (
            "openai_privacy_filter", PLAIN,
            "interleaved, columns: one for each pair, rounds each step, float32 tables: widen x",
        ),
        ("cohere", PLAIN, "interleaved, columns: all, in float32"),
        ("glm", PLAIN, "interleaved, columns: the first half, partial, rounds each step, float32 tables: widen x"),
        ("phi3", PLAIN, "half, columns: all, partial, rounds each step, float32 tables: widen x"),
        ("olmo", PLAIN, "half, columns: all, rounds each step, float32 tables: in float32"),
        ("qwen2_vl", f"{PLAIN}_vision", "half, columns: all, in float32"),
        (
            "deepseek_v3", f"{PLAIN}_interleave",
            "interleaved_to_half, columns: the first half, rounds each step, float32 tables: widen x",
        ),
    ],
)  # fmt: skip
def test_each_rotation_is_recognised(model: str, function: str, family: str) -> None:
    """Pairs, direction, columns of the tables, partial rotation and the order of roundings are told apart."""
    assert served_rotary(model, function)[0].family == family


def test_the_axis_of_the_heads_is_an_argument() -> None:
    """unsqueeze_dim says where the heads are, with tables of a batch or of none."""
    layouts = {tuple(call): layout for call, layout in served_rotary("llama")[0].layouts}
    expected = {(4, 3, 1): "bhsd", (4, 3, 2): "bshd", (4, 2, 0): "bhsd", (4, 2, 1): "bshd", (3, 2, 1): "thd"}
    assert layouts == expected


@pytest.mark.parametrize(
    ("model", "function", "reason"),
    [
        ("llama4", "apply_rotary_emb", "takes (xq, xk, freqs_cis)"),
        ("clvp", PLAIN, "takes (q, k, v, cos, sin, position_ids, unsqueeze_dim)"),
        ("dinov3_vit", PLAIN, "takes (q, k, cos, sin, **kwargs)"),
        ("musicflamingo", "apply_rotary_time_emb", "it computes in float64, on purpose"),
    ],
)
def test_what_rotates_otherwise_is_left_alone(model: str, function: str, reason: str) -> None:
    """Complex tables, further tensors and float64 are none of rope's, and the reason is told."""
    assert rotary.examine(modeling(model))[function] == reason


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"after": "q = -q"}, "it computes none of the rotations"),
        ({"after": "k = k * 1.001"}, "it computes none of the rotations"),
        ({"after": "q, k = k, q"}, "it computes none of the rotations"),
        ({"after": "k = k + 0.5 if k.numel() != q.numel() else k"}, "it computes none of the rotations"),
        ({"before": "q = q.detach()"}, "its gradient is not that of its rotation"),
        ({"before": "q.mul_(1)"}, "it changes its input"),
        ({"before": "cos.mul_(1)"}, "it changes its input"),
        ({"before": "assert float(q.sum()) < 1e9"}, "calls aten._local_scalar_dense"),
        ({"before": "q = q + 0 * torch.rand_like(q)"}, "calls aten.rand_like"),
        ({"before": "q = q.half().to(q.dtype)"}, "it computes none of the rotations"),
        ({"before": "cos = cos.half().to(cos.dtype) if q.dtype is torch.bfloat16 else cos"}, None),
        ({"before": "cos = cos.flip(0) if cos.ndim == 3 and len(cos) == 1 and q.shape[0] == 2 else cos"}, None),
        ({"before": "cos = 2 * cos if len(cos) == 1 else cos"}, "tables for the whole batch are something else to it"),
        ({"parameters": "q, k, cos, sin, position_ids, unsqueeze_dim=1"},
         "takes (q, k, cos, sin, position_ids, unsqueeze_dim), of which position_ids is no option"),
        ({"parameters": "q, k, cos, sin, unsqueeze_dim=1, *, scale=1.0"},
         "takes (q, k, cos, sin, unsqueeze_dim=1, scale=1.0)"),
    ],
)  # fmt: skip
def test_numbers_decide(change: dict[str, str], reason: str | None) -> None:
    """One line in the body, under the same name, makes another rotation of it, or none."""
    found = some(**change)
    assert (found if isinstance(found, str) else None) == reason


def test_other_roundings_are_left_to_the_original() -> None:
    """A function that rounds in another order in 16 bits is served in float32 tables only, where it is the rotation."""
    found = some(after="q = (q.float() * (1 + 2**-8)).to(q.dtype) if q.dtype is torch.bfloat16 else q")
    assert not isinstance(found, str)
    assert (found.same, found.mixed) == ("", "promoted")


def test_one_body_stands_for_two_rotations() -> None:
    """Where the function it calls has the other sign, the rotation is reversed."""
    source = SOME.format(before="pass", after="pass", parameters="q, k, cos, sin, unsqueeze_dim=1")
    reversed_ = source.replace("-x[..., half:], x[..., :half]", "x[..., half:], -x[..., :half]")
    found = [rotary.examine(make_module(text))[PLAIN] for text in (source, reversed_)]
    assert [one.inverse for one in found] == [False, True]  # type: ignore[union-attr]


def test_position_ids_that_count_go_to_the_original() -> None:
    """An option that picks rows is honoured; one that is ignored, as in DeepSeek's, changes nothing."""
    parameters = "q, k, cos, sin, position_ids=None, unsqueeze_dim=1"
    pick = "cos, sin = (cos, sin) if position_ids is None else (cos[:, position_ids[0]], sin[:, position_ids[0]])"
    module = make_module(SOME.format(before=pick, after="pass", parameters=parameters))
    found = rotary.examine(module)[PLAIN]
    assert not isinstance(found, str)
    assert not found.positions
    assert served_rotary("deepseek_v3", f"{PLAIN}_interleave")[0].positions
    new, original = rotary.replacement(module.apply_rotary_pos_emb, found, told), module.apply_rotary_pos_emb
    q, cos, sin = torch.randn(1, 2, 5, 8), torch.randn(1, 5, 8), torch.randn(1, 5, 8)
    ids, before, lines = torch.tensor([[4, 3, 2, 1, 0]]), op_calls(), len(TOLD)
    for y, z in zip(new(q, q, cos, sin, ids), original(q, q, cos, sin, ids), strict=True):
        assert torch.equal(y, z)
    assert (op_calls(), len(TOLD)) == (before, lines + 1)
    new(q, q, cos, sin)
    assert (op_calls(), len(TOLD)) == (before + 2, lines + 1)


def test_a_module_in_the_place_of_a_function_is_left_alone() -> None:
    """With the kernels package installed, transformers puts an nn.Module there; it is told, not called."""
    module = make_module("class Layer(torch.nn.Module):\n    def forward(self, q, k, cos, sin): 1 / 0\n")
    module.apply_rotary_pos_emb = module.Layer()  # type: ignore[attr-defined]
    module.Layer.__module__ = "kernels.layer"
    assert rotary.examine(module) == {PLAIN: "is a Layer, not a plain function"}


def test_only_functions_of_the_module_itself_are_tried() -> None:
    """A function that was imported from elsewhere is its own module's matter; an alias is the function again."""
    module = make_module(SOME.format(before="pass", after="pass", parameters="q, k, cos, sin, unsqueeze_dim=1"))
    module.apply_rotary_emb = modeling("llama").apply_rotary_pos_emb  # type: ignore[attr-defined]
    module.apply_rotary_alias = module.apply_rotary_pos_emb  # type: ignore[attr-defined]
    assert set(rotary.examine(module)) == {PLAIN, "apply_rotary_alias"}


# -- replacements -------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from(
        [
            ("llama", PLAIN), ("nanochat", PLAIN), ("gpt_oss", PLAIN), ("glm", PLAIN), ("cohere", PLAIN),
            ("olmo", PLAIN), ("phi3", PLAIN), ("qwen2_vl", f"{PLAIN}_vision"), ("gptj", PLAIN), ("gemma3n", PLAIN),
            ("deepseek_v3", f"{PLAIN}_interleave"),
        ]
    ),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)),
    heads=st.integers(1, 3),
    head=st.sampled_from([4, 8, 12]),
    width=st.sampled_from([2, 4, 6, 8, 12]),
    axes=st.sampled_from([(4, 3), (4, 2), (3, 2)]),
    axis=st.sampled_from([0, 1, 2, -2, None]),
    batch=st.sampled_from([0, 1]),
    dtypes=st.tuples(st.sampled_from(DTYPES), st.sampled_from(DTYPES)),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_replacement_is_the_original(
    which: tuple[str, str], sizes: Any, heads: int, head: int, width: int, axes: Any, axis: Any, batch: int,
    dtypes: Any, seed: int,
) -> None:  # fmt: skip
    """For all shapes, layouts, widths and dtypes: the same results and gradients, or the same error."""
    rotation, new, original = served_rotary(*which)
    generator = torch.Generator().manual_seed(seed)
    b, h, s = sizes
    q_shape, k_shape = ((b, h, s, head), (b, heads, s, head)) if axes[0] == 4 else ((s, h, head), (s, heads, head))
    if axis in (2, -2) or (axis == 1 and axes == (4, 2)):
        q_shape, k_shape = ((b, s, h, head), (b, s, heads, head)) if axes[0] == 4 else (q_shape, k_shape)
    tables = ((1 if batch else b), s, width) if axes[1] == 3 else (s, width)
    x = [torch.randn(shape, generator=generator).to(dtypes[0]) for shape in (q_shape, k_shape)]
    cos, sin = (torch.randn(tables, generator=generator).to(dtypes[1]) for _ in range(2))
    more = (
        {} if axis is None or "unsqueeze_dim" not in inspect.signature(original).parameters else {"unsqueeze_dim": axis}
    )
    results: list[Any] = []
    for function in (original, new):
        leaves = [t.clone().requires_grad_() for t in x[: len(rotation.tensors)]]
        try:
            y = function(**dict(zip(rotation.tensors, leaves, strict=True)), cos=cos, sin=sin, **more)
        except (IndexError, RuntimeError) as error:
            results.append(type(error))
            continue
        y = y if isinstance(y, tuple) else (y,)
        sum(t.double().sum() for t in y).backward()
        results.append([*(t.detach() for t in y), *(t.grad for t in leaves)])
    if isinstance(results[0], type) or isinstance(results[1], type):
        assert results[0] == results[1]
        return
    for y, z in zip(*results, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        tolerance = 2e-2 if torch.bfloat16 in (y.dtype, *dtypes) else 1e-5
        torch.testing.assert_close(z, y, rtol=tolerance, atol=tolerance * float(y.abs().max()))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model", ["llama", "glm", "olmo", "cohere", "gpt_oss"])
def test_roundings_are_those_of_the_original(model: str, dtype: torch.dtype) -> None:
    """bfloat16 queries with tables of either dtype, as under AMP: the same dtype, and the same to the bit."""
    rotation, new, original = served_rotary(model)
    width = 8 if rotation.columns == "one for each pair" else 16
    q, cos, sin = torch.randn(2, 3, 64, 16).bfloat16(), *torch.randn(2, 2, 64, width).to(dtype)
    before = op_calls()
    for y, z in zip(new(q, q, cos, sin), original(q, q, cos, sin), strict=True):
        assert share_apart(y, z) < 0.005
    assert op_calls() == before + 2


def test_calls_that_it_was_not_recognised_for_go_to_the_original() -> None:
    """Tables that broadcast over positions, keys of another dtype, no keys, another axis: as before, without the op."""
    _, new, original = served_rotary("llama")
    q, cos, sin = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    before = op_calls()
    calls: list[tuple[Any, ...]] = [
        (q, q, cos[:, :1], sin[:, :1]),
        (q[:1], q[:1], cos, sin),
        (q, q.double(), cos, sin),
        (q[..., None, :, :], q[..., None, :, :], cos[:, None], sin[:, None], 1),
        (q.bfloat16(), q.bfloat16(), cos.half(), sin.half()),
        (q, q, cos, sin.double()),
    ]
    for arguments in calls:
        for y, z in zip(new(*arguments), original(*arguments), strict=True):
            assert y.dtype == z.dtype
            assert torch.equal(y, z)
    with pytest.raises(RuntimeError, match="must match"):
        new(q, q, cos[..., :4], sin[..., :4])  # Llama's does not rotate a part
    assert op_calls() == before
    _, new, _ = served_rotary("mistral_large4", f"{PLAIN}_interleave")
    assert new(q, None, cos, sin)[1] is None


def test_the_signature_is_kept() -> None:
    """Names, defaults and keyword calls are the original's; gptj's takes sin before cos."""
    for which in (("llama", PLAIN), ("deepseek_v3", f"{PLAIN}_interleave"), ("gptj", PLAIN), ("gemma3n", PLAIN)):
        _, new, original = served_rotary(*which)
        assert inspect.signature(new) == inspect.signature(original)
        assert (new.__name__, new.__module__) == (original.__name__, original.__module__)
