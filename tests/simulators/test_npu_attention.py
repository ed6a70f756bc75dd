"""npu_fusion_attention over the simulated NPU: layouts, grouped heads, masks of every sparse mode, and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.simulators.npu_attention_checks import attend, causal_mask, dense, from_heads, npu, numbers, seen
from tests.simulators.npu_checks import FLOATS, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

B, N, G, S, K, D = 2, 4, 2, 7, 9, 16
SCALE = 0.3
LAYOUTS = ("BSH", "SBH", "BSND", "BNSD")


def _qkv(layout: str = "BNSD", rows: int = S, keys: int = K, heads: int = N, groups: int = G) -> list[torch.Tensor]:
    shapes = ((heads, rows), (groups, keys), (groups, keys))
    return [from_heads(numbers(B, n, s, D, seed=i), layout) for i, (n, s) in enumerate(shapes)]


def _call(layout: str = "BNSD", version: str = "", **options: Any) -> Callable[..., torch.Tensor]:
    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        there = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        function = getattr(npu(), f"npu_fusion_attention{version}")
        out: torch.Tensor = function(q, k, v, N, layout, **({"scale": SCALE} | there))[0]
        return out

    return operator


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
def test_attention_in_every_layout(version: str, layout: str, dtype: torch.dtype) -> None:
    """Full attention with grouped heads, its gradients too, in every layout and dtype and all three versions."""
    node = f"NpuFusionAttention{version[1:].upper()}Backward"
    agrees(_call(layout, version), dense(layout, N, G, scale=SCALE), _qkv(layout), dtype, node=node)


def test_scale_is_one_unless_given() -> None:
    """Without scale the scores are not scaled."""
    agrees(_call(scale=1.0), dense("BNSD", N, G, scale=1.0), _qkv(), torch.float32)


def test_values_may_be_narrower_than_keys() -> None:
    """Head sizes 16 of keys and 8 of values."""
    q, k, v = _qkv()
    agrees(_call(), dense("BNSD", N, G, scale=SCALE), [q, k, v[..., :8].contiguous()], torch.float32)


def test_strided_inputs_are_read_where_they_lie() -> None:
    """A transposed view gives what its copy gives."""
    q, k, v = (x.npu() for x in _qkv("BSND"))
    found = _call("BNSD")(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
    assert torch.equal(found, _call("BSND")(q, k, v).transpose(1, 2))


RULES: dict[str, tuple[dict[str, Any], Callable[[int, int, int, int], bool]]] = {
    "2": ({"sparse_mode": 2}, lambda i, j, s, k: j <= i),
    "3": ({"sparse_mode": 3}, lambda i, j, s, k: j <= i + k - s),
    "4": ({"sparse_mode": 4, "pre_tockens": 3, "next_tockens": 1}, lambda i, j, s, k: -3 <= j - i - (k - s) <= 1),
    "4, behind": (
        {"sparse_mode": 4, "pre_tockens": 4, "next_tockens": -1},
        lambda i, j, s, k: -4 <= j - i - (k - s) <= -1,
    ),
}


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("keys", [S, K])
def test_compressed_mask(name: str, keys: int) -> None:
    """The modes 2, 3 and 4 with the mask of 2048 x 2048, for as many keys as queries and for more."""
    options, rule = RULES[name]
    keep = seen(S, keys, lambda i, j: rule(i, j, S, keys))
    options = options | {"atten_mask": causal_mask(), "inner_precise": 2}
    agrees(_call(**options), dense("BNSD", N, G, scale=SCALE, keep=keep), _qkv(keys=keys), torch.float32)


@pytest.mark.parametrize("shape", [(B, N, S, K), (B, 1, S, K), (1, 1, S, K), (S, K)])
@pytest.mark.parametrize("mode", [0, 1])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8])
def test_given_mask(shape: tuple[int, ...], mode: int, dtype: torch.dtype) -> None:
    """Modes 0 and 1 with masks of every documented shape, in which 1 hides."""
    hide = numbers(*shape) > 0.7
    hide[..., 0] = False
    whole = hide.view(*(1,) * (4 - len(shape)), *shape).expand(B, -1, -1, -1)
    formula = dense("BNSD", N, G, scale=SCALE, keep=lambda batch: ~whole[batch])
    agrees(_call(atten_mask=hide.to(dtype), sparse_mode=mode), formula, _qkv(), torch.float32)


def test_mode_0_with_a_causal_mask() -> None:
    """A causal mask of full size goes with next_tockens=0."""
    keep = seen(S, S, lambda i, j: j <= i)
    operator = _call(atten_mask=~keep, next_tockens=0)
    agrees(operator, dense("BNSD", N, G, scale=SCALE, keep=keep), _qkv(keys=S), torch.float32)


@pytest.mark.parametrize("mode", [0, 1, 2, 3, 4, 5, 6])
def test_without_a_mask_the_mode_is_ignored(mode: int) -> None:
    """atten_mask=None is full attention, whatever sparse_mode and the tokens say."""
    agrees(
        _call(sparse_mode=mode, pre_tockens=1, next_tockens=0), dense("BNSD", N, G, scale=SCALE), _qkv(), torch.float32
    )


def _prefix_keep(batch: int) -> torch.Tensor:
    return seen(S, K, lambda i, j: j <= i + K - S or j < (4, 8)[batch])


def test_prefix() -> None:
    """Mode 5: bottom-right causal and a prefix of each batch, in a mask of full size; mode 6 the same, compressed."""
    mask = ~torch.stack([_prefix_keep(0), _prefix_keep(1)])[:, None]
    small = torch.zeros(1024, 2048, dtype=torch.bool)
    small[:, 1024:] = True
    formula = dense("BNSD", N, G, scale=SCALE, keep=_prefix_keep)
    agrees(_call(sparse_mode=5, prefix=[4, 8], atten_mask=mask), formula, _qkv(), torch.float32)
    compressed = torch.cat([causal_mask(), small])
    agrees(_call(sparse_mode=6, prefix=[4, 8], atten_mask=compressed), formula, _qkv(), torch.float32)


def test_rows_without_keys() -> None:
    """inner_precise=2 makes them zero, with zero gradients; without it they are the mean of all values."""
    hide = torch.zeros(S, K, dtype=torch.bool)
    hide[2] = True
    agrees(
        _call(atten_mask=hide, sparse_mode=1, inner_precise=2),
        dense("BNSD", N, G, scale=SCALE, keep=~hide),
        _qkv(),
        torch.float32,
    )
    q, k, v = (x.npu() for x in _qkv())
    found = _call(atten_mask=hide, sparse_mode=1)(q, k, v)[:, :, 2].cpu()
    close(found, v.cpu().double().mean(2).repeat_interleave(N // G, 1), "the row of a mask without keys")


def test_mode_3_knows_of_rows_without_keys() -> None:
    """With more queries than keys the first rows are zero, without inner_precise."""
    keep = seen(K, S, lambda i, j: j <= i + S - K)
    formula = dense("BNSD", N, G, scale=SCALE, keep=keep)
    agrees(_call(atten_mask=causal_mask(), sparse_mode=3), formula, _qkv(rows=K, keys=S), torch.float32)


def test_statistics_are_the_maximum_and_the_sum() -> None:
    """softmax_max and softmax_sum are float32 [B, N, S, 8], eight times the same number."""
    q, k, v = (x.bfloat16() for x in _qkv())
    _, top, total, rest, *_ = npu().npu_fusion_attention(q.npu(), k.npu(), v.npu(), N, "BNSD", scale=SCALE)
    assert top.dtype == torch.float32
    assert rest.numel() == 0
    for batch in range(B):
        _, expected_top, expected_total = attend(*(x[batch].double() for x in (q, k, v)), SCALE)
        close(top[batch], expected_top.expand(-1, -1, 8))
        close(total[batch], expected_total.expand(-1, -1, 8))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [N, G])
def test_sdpa(causal: bool, groups: int) -> None:
    """F.scaled_dot_product_attention is npu_fusion_attention_v3: causal at the top left, grouped heads too."""
    keep = seen(S, K, lambda i, j: j <= i or not causal)
    operator = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=SCALE)  # noqa: E731
    formula = dense("BNSD", N, groups, scale=SCALE, keep=keep)
    agrees(operator, formula, _qkv(groups=groups), torch.float32, node="NpuFusionAttentionV3Backward")


@pytest.mark.parametrize("shape", [(B, N, S, K), (B, 1, 1, K), (S, K), (S, 1)])
def test_sdpa_with_a_bool_mask(shape: tuple[int, ...]) -> None:
    """There True keeps; masks that broadcast are made whole, and rows that keep nothing are zero."""
    keep = numbers(*shape) < 0.5
    whole = keep.view(*(1,) * (4 - len(shape)), *shape).expand(B, N, S, K)
    operator = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=keep.npu(), scale=SCALE)  # noqa: E731
    formula = dense("BNSD", N, G, scale=SCALE, keep=lambda batch: whole[batch])
    agrees(operator, formula, _qkv(), torch.float32, node="NpuFusionAttentionV3Backward")


def _long(tokens: int, heads: int = N, size: int = D) -> list[torch.Tensor]:
    return [torch.zeros(1, heads, tokens, size).npu() for _ in range(3)]


def _three(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.zeros(shape, dtype=dtype).npu() for shape in (shapes if len(shapes) == 3 else shapes * 3)]


REFUSED: dict[str, tuple[list[tuple[int, ...]], dict[str, Any], str]] = {
    "heads that do not divide": ([(1, 4, 2, 8), (1, 3, 2, 8), (1, 3, 2, 8)], {}, "4 query heads do not divide by 3"),
    "head_num": ([(1, 8, 2, 8)], {}, "head_num is 4, and q has 8"),
    "head size": ([(1, 4, 2, 784)], {}, "head sizes are 1 to 768"),
    "wide values": ([(1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 16)], {}, "v no wider"),
    "head sizes that differ": ([(1, 4, 2, 8), (1, 4, 2, 16), (1, 4, 2, 8)], {}, "q and k the same"),
    "batches": ([(2, 4, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8)], {}, "one batch size"),
    "a long sequence": ([(1, 4, 1, 1), (1, 4, 1000001, 1), (1, 4, 1000001, 1)], {}, "up to 1M tokens"),
    "padding_mask": ([(1, 4, 2, 8)], {"padding_mask": torch.zeros(2, 2)}, "padding_mask is reserved"),
    "a float mask": ([(1, 4, 2, 8)], {"atten_mask": torch.zeros(2, 2)}, "bool or uint8"),
    "a mask's heads": ([(1, 4, 2, 8)], {"atten_mask": torch.zeros(1, 2, 2, 2, dtype=torch.bool)}, "takes .B, N, S, K."),
    "a mask's size": ([(1, 4, 2, 8)], {"atten_mask": torch.zeros(2, 3, dtype=torch.bool)}, "2 queries and 2 keys"),
    "a small causal mask": (
        [(1, 4, 2, 8)],
        {"atten_mask": torch.ones(2, 2, dtype=torch.bool).triu(1), "sparse_mode": 3},
        "takes a mask of .2048, 2048.",
    ),
    "prefix without lengths": (
        [(1, 4, 2, 8)],
        {"atten_mask": torch.zeros(1, 1, 2, 2, dtype=torch.bool), "sparse_mode": 5},
        "takes a prefix for each",
    ),
    "prefix with a shared mask": (
        [(2, 4, 2, 8)],
        {"atten_mask": torch.zeros(2, 2, dtype=torch.bool), "sparse_mode": 5, "prefix": [1, 1]},
        "takes a mask .B, N, S, K. or .B, 1, S, K.",
    ),
    "prefix of many batches": (
        [(33, 4, 2, 8)],
        {"atten_mask": torch.zeros(33, 1, 2, 2, dtype=torch.bool), "sparse_mode": 5, "prefix": [1] * 33},
        "up to 32 batches",
    ),
    "a small prefix mask": (
        [(1, 4, 2, 8)],
        {"atten_mask": causal_mask(), "sparse_mode": 6, "prefix": [1]},
        "takes a mask of .3072, 2048.",
    ),
    "lengths without TND": ([(1, 4, 2, 8)], {"actual_seq_qlen": [2], "actual_seq_kvlen": [2]}, "TND"),
    "mode 7 without TND": ([(1, 4, 2, 8)], {"sparse_mode": 7}, "sparse_mode"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_limits(name: str) -> None:
    """What the documents refuse raises, and says what was found."""
    shapes, options, text = REFUSED[name]
    with refuses(text):
        _call(**options)(*_three(*shapes))


def test_heads_and_dtypes_that_are_refused() -> None:
    """Up to 256 heads, also through F.scaled_dot_product_attention; one dtype for all; no float64 and no integers."""
    with refuses("head_num is 1 to 256"):
        F.scaled_dot_product_attention(*_long(2, heads=257))
    q, k, v = _three((1, 4, 2, 8))
    with refuses("one dtype"):
        _call()(q.half(), k, v)
    with refuses("float16, bfloat16 or float32"):
        _call()(q.int(), k.int(), v.int())


# The content of masks is known when the kernel runs; an error then ends the use of the device, so each has a process.
CONTENT = {
    "mode 2": ("torch.ones(2048, 2048).tril(-1)", "sparse_mode=2", "sparse_mode 2 takes the mask triu"),
    "mode 6": ("torch.zeros(3072, 2048)", "sparse_mode=6, prefix=[1]", "sparse_mode 6 takes the mask of 3072 x 2048"),
    "mode 0": ("torch.zeros(2, 2)", "next_tockens=0", "hide; they must agree"),
}


@pytest.mark.parametrize("name", CONTENT)
def test_wrong_content_of_a_mask(name: str) -> None:
    """A mask that the sparse mode does not take, or that keeps what the tokens hide, is an error of the kernel."""
    mask, options, text = CONTENT[name]
    code = f"""
q, mask = torch.zeros(1, 4, 2, 8).npu(), {mask}.bool().npu()
outcome(lambda: torch_npu.npu_fusion_attention(q, q, q, 4, "BNSD", atten_mask=mask, {options}))
"""
    assert text in said_on("Ascend910B3", code)


def test_second_version_takes_no_more_queries_than_keys_in_mode_3() -> None:
    """Its document says so; the first version makes rows of zeros."""
    q, k, v = _three((1, 4, 3, 8), (1, 4, 2, 8), (1, 4, 2, 8))
    with refuses("no more queries than keys"):
        _call(version="_v2", atten_mask=causal_mask(), sparse_mode=3)(q, k, v)


@pytest.mark.parametrize("model", ["Ascend310P3", "Ascend910A"])
def test_chips_without_attention_for_training(model: str) -> None:
    """310P and A1 have none."""
    said = said_on(model, "q = torch.zeros(1, 4, 2, 8).half().npu()\n"
                   "outcome(lambda: torch_npu.npu_fusion_attention(q, q, q, 4, 'BNSD'))")  # fmt: skip
    assert "attention for training is not there" in said


def test_ascend950() -> None:
    """The first two versions go through one operator there, gradients and dropout too; the third is refused."""
    said = said_on(
        "Ascend950",
        """
q, k, v = (torch.randn(1, 4, 6, 8).npu().requires_grad_() for _ in range(3))
mask = torch.ones(2048, 2048, dtype=torch.bool).triu(1).npu()
out = torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", scale=0.3, atten_mask=mask, sparse_mode=2)[0]
out.sum().backward()
here = [x.detach().cpu().double().requires_grad_() for x in (q, k, v)]
expected = torch.nn.functional.scaled_dot_product_attention(*here, is_causal=True, scale=0.3)
expected.sum().backward()
print(torch.allclose(out.cpu().double(), expected, atol=1e-6))
print(all(torch.allclose(a.grad.cpu().double(), b.grad, atol=1e-6) for a, b in zip((q, k, v), here)))
outcome(lambda: torch_npu.npu_fusion_attention(q, k, v, 4, "BNSD", keep_prob=0.5)[0].sum().backward())
outcome(lambda: torch_npu.npu_fusion_attention_v3(q, k, v, 4, "BNSD"))
""",
    )
    assert said.split()[:3] == ["True", "True", "done"]
    assert "Ascend950 not support" in said
