"""Attention for inference over the simulated NPU: prompts and decoding, pages, log-sum-exp, layouts, and limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.simulators.npu_attention_checks import attend, causal_mask, from_heads, npu, numbers, seen, to_heads
from tests.simulators.npu_checks import HALVES, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

B, N, G, S, K, D = 2, 4, 2, 6, 9, 16
SCALE = 0.3
FUSED = ("", "_v2")


def _qkv(rows: int = S, keys: int = K, dtype: torch.dtype = torch.float16, size: int = D) -> list[torch.Tensor]:
    shapes = ((N, rows), (G, keys), (G, keys))
    return [numbers(B, n, s, size, seed=i).to(dtype) for i, (n, s) in enumerate(shapes)]


def _fused(version: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> list[torch.Tensor]:
    """Both versions of the fused operator, called by the names of the first."""
    second = {"num_heads": "num_query_heads", "scale": "softmax_scale", "softmax_lse_flag": "return_softmax_lse"}
    second |= {"actual_seq_lengths": "actual_seq_qlen", "actual_seq_lengths_kv": "actual_seq_kvlen"}
    options = {"num_heads": N, "num_key_value_heads": G, "scale": SCALE} | options
    if version == "_v2":
        options = {second.get(name, name): item for name, item in options.items()}
    there = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
    return list(getattr(npu(), f"npu_fused_infer_attention_score{version}")(q.npu(), k.npu(), v.npu(), **there))


def _expected(
    tensors: list[torch.Tensor],
    keep: Callable[[int], torch.Tensor] | None = None,
    lengths: tuple[list[int], list[int]] | None = None,
    **how: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp [B, N, S, 1]; zero behind the length of the queries."""
    q, k, v = (x.double() for x in tensors)
    out, lse = torch.zeros(*q.shape[:3], v.shape[-1], dtype=torch.float64), torch.zeros(*q.shape[:3], 1).double()
    for b in range(q.shape[0]):
        rows, keys = (x[b] for x in lengths) if lengths else (q.shape[2], k.shape[2])
        mask = keep(b)[..., :rows, :keys] if keep else None
        one, top, total = attend(q[b, :, :rows], k[b, :, :keys], v[b, :, :keys], SCALE, mask, **how)
        out[b, :, :rows], lse[b, :, :rows] = one, top + total.log()
    return out, lse


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", ["BSH", "BSND", "BNSD", "BNSD_BSND", "BSH_BNSD", "BSND_BNSD"])
@pytest.mark.parametrize("version", FUSED)
def test_prompt_in_every_layout(version: str, layout: str, dtype: torch.dtype) -> None:
    """Results in the layout behind the underscore, and the log-sum-exp [B, N, S, 1] in float32."""
    tensors = _qkv(dtype=dtype)
    there = [from_heads(x, layout.split("_", maxsplit=1)[0]) for x in tensors]
    out, lse = _fused(version, *there, input_layout=layout, softmax_lse_flag=True)
    expected, expected_lse = _expected(tensors)
    close(to_heads(out, layout.rsplit("_", maxsplit=1)[-1], N), expected)
    assert lse.dtype == torch.float32
    close(lse, expected_lse)


@pytest.mark.parametrize("version", FUSED)
def test_causal_prompt_with_lengths(version: str) -> None:
    """Mode 3 counts from the last key that counts; queries behind their length are zero."""
    tensors, lengths = _qkv(), ([4, 6], [7, 9])
    keep = lambda b: seen(S, K, lambda i, j: j <= i + lengths[1][b] - lengths[0][b])  # noqa: E731
    options = {"actual_seq_lengths": lengths[0], "actual_seq_lengths_kv": lengths[1]}
    found = _fused(version, *tensors, input_layout="BNSD", atten_mask=causal_mask(), sparse_mode=3, **options)[0]
    close(found, _expected(tensors, keep, lengths)[0])


MODES: dict[int, tuple[dict[str, int], Callable[[int, int], bool]]] = {
    2: ({}, lambda i, j: j <= i),
    3: ({}, lambda i, j: j <= i + K - S),
    4: ({"pre_tokens": 2, "next_tokens": 1}, lambda i, j: -2 <= j - i - (K - S) <= 1),
}


@pytest.mark.parametrize("shape", [(2048, 2048), (1, 2048, 2048), (1, 1, 2048, 2048)])
@pytest.mark.parametrize("mode", MODES)
def test_compressed_mask(mode: int, shape: tuple[int, ...]) -> None:
    """The modes 2, 3 and 4 with the mask of 2048 x 2048 in its three shapes."""
    options, rule = MODES[mode]
    tensors = _qkv()
    mask = causal_mask().view(shape)
    found = _fused("", *tensors, input_layout="BNSD", atten_mask=mask, sparse_mode=mode, **options)[0]
    close(found, _expected(tensors, lambda b: seen(S, K, rule))[0])


@pytest.mark.parametrize("shape", [(S, K), (1, S, K), (B, 1, S, K), (1, 1, S, K)])
@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int8])
def test_given_mask(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """A mask of full size, 1 = hidden; rows that see nothing are zero with inner_precise=2."""
    hide = numbers(*shape) > 0.3
    hide[..., 1, :] = True
    whole = hide.view(*(1,) * (4 - len(shape)), *shape).expand(B, 1, S, K)
    tensors = _qkv()
    options = {"input_layout": "BNSD", "sparse_mode": 1, "softmax_lse_flag": True}
    found, lse = _fused("", *tensors, atten_mask=hide.to(dtype), inner_precise=2, **options)
    close(found, _expected(tensors, lambda b: ~whole[b])[0])
    assert bool((lse[:, :, 1] == torch.inf).all())
    mean = tensors[2].double().mean(2).repeat_interleave(N // G, 1)
    close(_fused("", *tensors, atten_mask=hide.to(dtype), **options)[0][:, :, 1], mean)


@pytest.mark.parametrize("version", FUSED)
def test_packed_prompts(version: str) -> None:
    """Layout TND with cumulative ends of both, causal at the bottom right, and the log-sum-exp [T, N, 1]."""
    ends_q, ends_k, size = [3, 7], [5, 12], 64
    q, k, v = (numbers(t, n, size, seed=n).bfloat16() for t, n in ((7, N), (12, G), (12, G)))
    options = {"actual_seq_lengths": ends_q, "actual_seq_lengths_kv": ends_k, "softmax_lse_flag": True}
    out, lse = _fused(version, q, k, v, input_layout="TND", atten_mask=causal_mask(), sparse_mode=3, **options)
    for first, end, first_key, end_key in zip([0, 3], ends_q, [0, 5], ends_k, strict=True):
        rows, keys = end - first, end_key - first_key
        one = (
            x[i:j].transpose(0, 1).double()
            for x, i, j in ((q, first, end), (k, first_key, end_key), (v, first_key, end_key))
        )
        keep = seen(rows, keys, lambda i, j, shift=keys - rows: j <= i + shift)
        expected, top, total = attend(*one, SCALE, keep)
        close(out[first:end].transpose(0, 1), expected)
        close(lse[first:end].transpose(0, 1), top + total.log())


def _pages(cache: torch.Tensor, page: int, shape: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of [B, G, K, D] in a mixed order, and the table that names them."""
    batch, groups, keys, size = cache.shape
    count = -(-keys // page)
    padded = torch.nn.functional.pad(cache, (0, 0, 0, count * page - keys), value=100.0)
    pages = padded.view(batch, groups, count, page, size).transpose(1, 2).flatten(0, 1)
    order = torch.randperm(batch * count, generator=torch.Generator().manual_seed(1))
    mixed = torch.empty_like(pages)
    mixed[order] = pages
    if shape == "BSH":
        mixed = mixed.transpose(1, 2).flatten(2)
    return mixed.contiguous(), order.view(batch, count).int()


@pytest.mark.parametrize("shape", ["BSH", "BNSD"])
@pytest.mark.parametrize("version", [*FUSED, "incre"])
def test_decoding_from_pages(version: str, shape: str) -> None:
    """One query of each batch, keys from the pages that the table names, up to each length."""
    tensors, lengths = _qkv(rows=1, keys=40), [33, 40]
    key, table = _pages(tensors[1], 16, shape)
    value, _ = _pages(tensors[2], 16, shape)
    q = from_heads(tensors[0], shape)
    expected, expected_lse = _expected(tensors, lengths=([1, 1], lengths))
    options: dict[str, Any] = {"block_table": table, "block_size": 16, "input_layout": shape}
    if version == "incre":
        out = npu().npu_incre_flash_attention(
            q.npu(), key.npu(), value.npu(), num_heads=N, num_key_value_heads=G, scale_value=SCALE,
            actual_seq_lengths=lengths, **options | {"block_table": table.npu()},
        )  # fmt: skip
    else:
        options |= {"actual_seq_lengths_kv": lengths, "softmax_lse_flag": True}
        out, lse = _fused(version, q, key, value, **options)
        close(lse, expected_lse)
    close(to_heads(out, shape, N), expected)


def test_decoding_ignores_the_sparse_mode() -> None:
    """With one query only the lengths say what is seen; a mask then has a row for each batch."""
    tensors = _qkv(rows=1)
    hide = numbers(B, K) > 0.5
    hide[:, 0] = False
    options = {"input_layout": "BNSD", "sparse_mode": 3}
    close(_fused("", *tensors, **options)[0], _expected(tensors)[0])
    found = _fused("", *tensors, atten_mask=hide, **options)[0]
    close(found, _expected(tensors, lambda b: ~hide[b][None])[0])
    with refuses("atten_mask has shape"):
        _fused("", *tensors, atten_mask=torch.zeros(5, 3, dtype=torch.bool), **options)


def test_prompt_from_pages() -> None:
    """Several queries take pages of 128 tokens."""
    tensors, lengths = _qkv(keys=130), [130, 129]
    key, table = _pages(tensors[1], 128, "BNSD")
    value, _ = _pages(tensors[2], 128, "BNSD")
    keep = lambda b: seen(S, 130, lambda i, j: j <= i + lengths[b] - S)  # noqa: E731
    found = _fused(
        "", tensors[0], key, value, block_table=table, block_size=128, input_layout="BNSD", atten_mask=causal_mask(),
        sparse_mode=3, actual_seq_lengths_kv=lengths,
    )[0]  # fmt: skip
    close(found, _expected(tensors, keep, ([S, S], lengths))[0])


def test_a_bias_and_a_sink() -> None:
    """pse_shift is added to the scaled scores; learnable_sink is one more logit."""
    tensors, bias, sink = _qkv(), numbers(1, N, S, K).half(), numbers(N)
    found = _fused("", *tensors, input_layout="BNSD", pse_shift=bias)[0]
    close(found, _expected(tensors, bias=bias[0].double())[0])
    found = _fused("_v2", *tensors, input_layout="BNSD", learnable_sink=sink)[0]
    close(found, _expected(tensors, sink=sink.double())[0])


def test_prompt_flash_attention() -> None:
    """The older operator for prompts: next_tokens is 0 unless given, so a mask must be causal."""
    tensors = _qkv(keys=S)
    q, k, v = (x.npu() for x in tensors)
    options: dict[str, Any] = {"num_heads": N, "num_key_value_heads": G, "scale_value": SCALE, "input_layout": "BNSD"}
    close(npu().npu_prompt_flash_attention(q, k, v, **options), _expected(tensors)[0])
    keep = seen(S, S, lambda i, j: j <= i)
    found = npu().npu_prompt_flash_attention(q, k, v, atten_mask=~keep.npu(), **options)
    close(found, _expected(tensors, lambda b: keep)[0])
    found = npu().npu_prompt_flash_attention(q, k, v, atten_mask=causal_mask().npu(), sparse_mode=2, **options)
    close(found, _expected(tensors, lambda b: keep)[0])


def test_no_operator_has_a_gradient() -> None:
    """Backward warns on stderr, and the tensors get none."""
    q, k, v = (x.npu().requires_grad_() for x in _qkv())
    out = npu().npu_fused_infer_attention_score(q, k, v, num_heads=N, num_key_value_heads=G, input_layout="BNSD")[0]
    out.sum().backward()
    assert q.grad is None
    assert k.grad is None
    assert v.grad is None


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "float32": ({"dtype": torch.float32}, {}, "float16 or bfloat16"),
    "head size": ({"size": 24}, {}, "steps of 16"),
    "heads": ({}, {"num_heads": 8}, "q has 4 heads"),
    "key heads": ({}, {"num_key_value_heads": 3}, "one must divide the other"),
    "sparse mode": ({}, {"sparse_mode": 5}, "sparse_mode 5 is not modelled"),
    "compressed mask": ({}, {"sparse_mode": 3, "atten_mask": torch.zeros(S, K, dtype=torch.bool)}, "2048, 2048"),
    "mask": ({}, {"atten_mask": torch.zeros(S, K)}, "bool, int8 or uint8"),
    "long lengths": ({}, {"actual_seq_lengths_kv": [K + 1]}, "not in .0, 9."),
    "pages without lengths": (
        {},
        {"block_table": torch.zeros(B, 1).int(), "block_size": 128},
        "takes actual_seq_lengths_kv",
    ),
    "pages of int64": (
        {},
        {"block_table": torch.zeros(B, 1).long(), "block_size": 128, "actual_seq_lengths_kv": [1, 1]},
        "block_table is int32",
    ),
    "small pages": (
        {},
        {"block_table": torch.zeros(B, 1).int(), "block_size": K, "actual_seq_lengths_kv": [1, 1]},
        "128 to 512 in steps of 128",
    ),
    "quantised results": ({}, {"quant_scale2": torch.ones(1)}, "quantisation is not modelled"),
    "a shared prefix": ({}, {"key_shared_prefix": torch.zeros(1, G, 2, D).half()}, "shared prefix is not modelled"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_limits(name: str) -> None:
    """What the documents refuse raises, and says what was found."""
    shape, options, text = REFUSED[name]
    with refuses(text):
        _fused("", *_qkv(**shape), **({"input_layout": "BNSD"} | options))


def test_tensors_must_be_contiguous() -> None:
    """A transposed view of q is refused."""
    q, k, v = (x.npu() for x in _qkv())
    with refuses("q, k and v are contiguous"):
        _fused("", q.transpose(1, 2).contiguous().transpose(1, 2), k, v, input_layout="BNSD")


@pytest.mark.parametrize("size", [32, 256])
def test_head_sizes_of_packed_prompts(size: int) -> None:
    """They are 64, 128 and 192."""
    q, k = torch.zeros(3, N, size).half(), torch.zeros(3, G, size).half()
    with refuses("takes head sizes 64, 128 and 192"):
        _fused("", q, k, k, input_layout="TND", actual_seq_lengths=[3], actual_seq_lengths_kv=[3])


def test_wrong_pages() -> None:
    """A table that names a page that is not there is an error of the kernel."""
    code = """
q, pages = torch.zeros(1, 1, 64).half().npu(), torch.zeros(2, 16, 64).half().npu()
table = torch.tensor([[2]]).int().npu()
outcome(lambda: torch_npu.npu_fused_infer_attention_score(
    q, pages, pages, num_heads=1, block_table=table, block_size=16, actual_seq_lengths_kv=[3]))
"""
    assert "block_table names pages of batch 0 that are not in [0, 2)" in said_on("Ascend910B3", code)


def test_chips() -> None:
    """310P has the older two operators, in float16 and without grouped heads, and not the fused one."""
    code = """
q, k = torch.zeros(1, 2, 4, 16).half().npu(), torch.zeros(1, 1, 4, 16).half().npu()
fused = torch_npu.npu_fused_infer_attention_score
older = torch_npu.npu_prompt_flash_attention
outcome(lambda: fused(q, q, q, num_heads=2, input_layout="BNSD"))
outcome(lambda: older(q, k, k, num_heads=2, num_key_value_heads=1, input_layout="BNSD"))
outcome(lambda: older(q, q, q, num_heads=2, input_layout="BNSD"))
"""
    said = said_on("Ascend310P3", code)
    assert "npu_fused_infer_attention_score is not there on Ascend310P3" in said
    assert "as many key heads as query heads" in said
    assert said.rstrip().endswith("done")
