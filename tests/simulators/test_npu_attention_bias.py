"""What is added to attention over the simulated NPU: pse of all types, sinks, and dropout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests.simulators.npu_attention_checks import attend, causal_mask, dense, npu, numbers, packed, seen
from tests.simulators.npu_checks import agrees, close, refuses

pytestmark = pytest.mark.simulator("npu")

B, N, G, S, K, D = 2, 4, 2, 6, 8, 16
SCALE = 0.3


def _qkv(rows: int = S, keys: int = K, batch: int = B) -> list[torch.Tensor]:
    return [numbers(batch, n, s, D, seed=i) for i, (n, s) in enumerate(((N, rows), (G, keys), (G, keys)))]


def _call(version: str = "_v2", **options: Any) -> Callable[..., torch.Tensor]:
    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        there = {name: x.npu() if isinstance(x, torch.Tensor) else x for name, x in options.items()}
        function = getattr(npu(), f"npu_fusion_attention{version}")
        out: torch.Tensor = function(q, k, v, N, "BNSD", scale=SCALE, **there)[0]
        return out

    return operator


@pytest.mark.parametrize("shape", [(B, N, S, K), (B, N, 1, K), (1, N, S, K)])
@pytest.mark.parametrize(("version", "options"), [("", {}), ("_v2", {"pse_type": 1}), ("_v2", {"pse_type": 0})])
def test_pse(version: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """The first version and type 1 add it before the scores are scaled, type 0 after it."""
    pse = numbers(*shape)
    factor = 1.0 if options.get("pse_type") == 0 else SCALE
    bias = pse.double().expand(B, -1, -1, -1) * factor
    formula = dense("BNSD", N, G, scale=SCALE, bias=lambda batch: bias[batch])
    agrees(_call(version, pse=pse, **options), formula, _qkv(), torch.float32)


@pytest.mark.parametrize("kind", [2, 3])
@pytest.mark.parametrize("shape", [(N,), (B, N)])
def test_slopes(shape: tuple[int, ...], kind: int) -> None:
    """Types 2 and 3: the kernel makes -slope |j - i|, or the root of the distance, in later parts of a sequence too."""
    slopes = numbers(*shape).abs()
    for shift in (0, 3):
        distance = (torch.arange(S)[None] - torch.arange(S)[:, None] + shift).abs().double()
        distance = distance.sqrt() if kind == 3 else distance
        bias = -slopes.double().expand(B, N)[:, :, None, None] * distance
        operator = _call(pse=slopes, pse_type=kind, q_start_idx=[2], kv_start_idx=[2 + shift])
        formula = dense("BNSD", N, G, scale=SCALE, bias=lambda batch, bias=bias: bias[batch])
        agrees(operator, formula, _qkv(keys=S), torch.float32)


def _alibi(tokens: int) -> torch.Tensor:
    places = torch.arange(tokens)
    return numbers(N).abs()[None, :, None, None] * (places[None] - places[:, None]) / tokens


def test_compressed_pse() -> None:
    """The last 1024 rows stand for all rows, where the bias depends on the distance and the call is causal."""
    tokens = 1100
    pse = _alibi(tokens)
    tensors = _qkv(tokens, tokens, 1)
    keep = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    formula = dense("BNSD", N, G, scale=SCALE, keep=keep, bias=pse[0].double())
    mask = {"atten_mask": causal_mask(), "sparse_mode": 2}
    for version in ("", "_v2"):
        options = {"pse": (pse / SCALE if version == "" else pse)[:, :, -1024:].contiguous()} | mask
        options |= {} if version == "" else {"pse_type": 0}
        agrees(_call(version, **options), formula, tensors, torch.float32)


def test_compressed_pse_of_packed_sequences() -> None:
    """Packed sequences take it in that form."""
    ends = [3, 7]
    tokens = 1030
    pse = _alibi(tokens)
    tensors = [numbers(7, n, D, seed=i) for i, n in enumerate((N, G, G))]
    distance = lambda rows: torch.arange(rows)[None] - torch.arange(rows)[:, None]  # noqa: E731
    slopes = numbers(N).abs().double()[:, None, None] / tokens
    formula = packed(
        ends, ends, scale=SCALE,
        keep=lambda index, rows, keys: seen(rows, keys, lambda i, j: j <= i),
        bias=lambda index, rows, keys: slopes * distance(rows),
    )  # fmt: skip

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = npu().npu_fusion_attention_v2(
            q, k, v, N, "TND", pse=pse[:, :, -1024:].contiguous().npu(), pse_type=0, scale=SCALE, sparse_mode=2,
            atten_mask=causal_mask().npu(), actual_seq_qlen=ends, actual_seq_kvlen=ends,
        )[0]  # fmt: skip
        return out

    agrees(operator, formula, tensors, torch.float32)


def test_pse_has_no_gradient() -> None:
    """Its documents call that output reserved: what comes out is not a number, not the gradient."""
    pse = numbers(B, N, S, K).npu().requires_grad_()
    _call("", pse=pse)(*(x.npu() for x in _qkv())).sum().backward()
    assert pse.grad is not None
    assert bool(pse.grad.isnan().all())


PSE_REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"pse": torch.zeros(B, N, S, K).half()}, "pse has the dtype of q"),
    "axes": ({"pse": torch.zeros(N, S, K)}, "pse has shape"),
    "rows": ({"pse": torch.zeros(B, N, 2, K)}, "pse has shape"),
    "one row for all batches": ({"pse": torch.zeros(1, N, 1, K)}, "pse has shape"),
    "slopes in float16": ({"pse": torch.ones(N).half(), "pse_type": 2}, "slopes in float32"),
    "slopes of other heads": ({"pse": torch.ones(3), "pse_type": 2}, "slopes .N. or .B, N."),
    "slopes of unlike lengths": ({"pse": torch.ones(N), "pse_type": 3}, "as many queries as keys"),
    "no slopes": ({"pse_type": 2}, "pse is missing"),
    "type": ({"pse_type": 4}, "pse_type is 0, 1, 2 or 3"),
}


@pytest.mark.parametrize("name", PSE_REFUSED)
def test_limits_of_pse(name: str) -> None:
    """What the documents refuse."""
    options, text = PSE_REFUSED[name]
    with refuses(text):
        _call(**options)(*(x.npu() for x in _qkv()))


@pytest.mark.parametrize("version", ["", "_v2", "_v3"])
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_sink(layout: str, version: str) -> None:
    """One more logit of each head in the sum of the softmax, with a gradient; packed in both softmax layouts."""
    for softmax_layout in ("", "TND") if layout == "TND" else ("",):
        _check_sink(layout, version, softmax_layout)


def _check_sink(layout: str, version: str, softmax_layout: str) -> None:
    ends = [2, 6]
    host = (lambda x: torch.tensor(x)) if version == "_v3" else list
    options: dict[str, Any] = {"scale": SCALE, "softmax_layout": softmax_layout}
    if layout == "TND":
        options |= {"actual_seq_qlen": host(ends), "actual_seq_kvlen": host(ends)}

    def operator(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        function = getattr(npu(), f"npu_fusion_attention{version}")
        out: torch.Tensor = function(q, k, v, N, layout, sink=sink, **options)[0]
        return out

    def formula(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sink: torch.Tensor) -> torch.Tensor:
        how = {"scale": SCALE, "sink": sink}
        return packed(ends, ends, **how)(q, k, v) if layout == "TND" else dense("BNSD", N, G, **how)(q, k, v)

    tensors = _qkv() if layout == "BNSD" else [numbers(6, n, D, seed=i) for i, n in enumerate((N, G, G))]
    agrees(operator, formula, [*tensors, numbers(N, seed=9)], torch.float32)


def test_limits_of_sink() -> None:
    """It is float32 of shape [head_num]."""
    q, k, v = (x.npu() for x in _qkv())
    with refuses("sink is float32"):
        _call("", sink=torch.zeros(N).half())(q, k, v)
    with refuses("sink has shape .head_num."):
        _call("", sink=torch.zeros(3))(q, k, v)


def _kept(seed: int, offset: int, count: int, keep: float) -> torch.Tensor:
    """A mask of torch_npu's own as a factor of each score."""
    options = {"seed": seed, "offset": offset, "p": 1 - keep}
    bits = npu()._npu_dropout_gen_mask(torch.zeros(1).npu(), [count], **options).cpu()
    places = torch.arange(count)
    return ((bits[places // 8] >> (places % 8)) & 1).double() / keep


@pytest.mark.parametrize("version", ["", "_v2"])
@pytest.mark.parametrize("layout", ["BNSD", "TND"])
def test_dropout(layout: str, version: str) -> None:
    """The results name seed, offset and count of the mask; with them the gradient makes the same mask again."""
    keep, ends = 0.75, [2, 6]
    options: dict[str, Any] = {"scale": SCALE, "keep_prob": keep}
    sizes = [(S, K)] * B
    tensors = _qkv()
    if layout == "TND":
        options |= {"actual_seq_qlen": ends, "actual_seq_kvlen": ends}
        sizes = [(2, 2), (4, 4)]
        tensors = [numbers(6, n, D, seed=i) for i, n in enumerate((N, G, G))]
    here = [x.npu().requires_grad_() for x in tensors]
    out, *_, seed, offset, count = getattr(npu(), f"npu_fusion_attention{version}")(*here, N, layout, **options)
    assert count == sum(N * rows * keys for rows, keys in sizes)
    parts = _kept(seed, offset, count, keep).split([N * rows * keys for rows, keys in sizes])
    factors = [part.view(N, *size) for part, size in zip(parts, sizes, strict=True)]
    assert 0 < float((torch.cat(parts) == 0).double().mean()) < 0.5
    if layout == "TND":
        formula = packed(ends, ends, scale=SCALE, factor=lambda index, rows, keys: factors[index])
    else:
        formula = dense("BNSD", N, G, scale=SCALE, factor=lambda index: factors[index])
    there = [x.double().requires_grad_() for x in tensors]
    expected = formula(*there)
    close(out, expected)
    out.sum().backward()
    expected.sum().backward()
    for one, value in zip(here, there, strict=True):
        close(one.grad, value.grad)


def test_dropout_of_sdpa() -> None:
    """Its gradient uses the mask of its result; the generator's seed makes the call reproducible."""
    results = []
    for _ in range(2):
        torch.npu.manual_seed(5)
        q, k, v = (x.npu().requires_grad_() for x in _qkv())
        out = F.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
        out.sum().backward()
        results.append((out, v.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    out, grad = (x.detach().cpu().double() for x in results[0])
    # The result is linear in v, and the sum of the gradient times v is the sum of the result.
    assert abs(float((grad * _qkv()[2].double()).sum() - out.sum())) < 1e-4


def test_a_mask_of_the_caller() -> None:
    """dropout_mask is used as it is; without it and with keep_prob=1 nothing is dropped."""
    keep = 0.5
    factor = _kept(3, 0, B * N * S * K, keep).view(B, N, S, K)
    mask = npu()._npu_dropout_gen_mask(torch.zeros(1).npu(), [B, N, S, K], p=1 - keep, seed=3, offset=0)
    operator = _call("", keep_prob=keep, dropout_mask=mask)
    formula = dense("BNSD", N, G, scale=SCALE, factor=lambda batch: factor[batch])
    agrees(operator, formula, _qkv(), torch.float32, backward=False)
    q, k, v = (x.npu() for x in _qkv())
    with refuses("a bit for each of"):
        _call("", keep_prob=keep, dropout_mask=mask[:16])(q, k, v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_elementwise_dropout(dtype: torch.dtype) -> None:
    """F.dropout scales what it keeps, and its gradient drops the same."""
    x = numbers(4000).to(dtype).npu().requires_grad_()
    out = F.dropout(x, 0.25)
    out.backward(torch.ones_like(out))
    kept = x.grad != 0
    assert 0.7 < kept.float().mean().item() < 0.8
    close(out, torch.where(kept.cpu(), x.detach().cpu().double() / 0.75, 0.0))
    close(x.grad, kept.cpu().double() / 0.75)


def test_masks_depend_on_seed_and_offset_only() -> None:
    """The same pair makes the same mask, another offset another one."""
    make = lambda seed, offset: _kept(seed, offset, 4096, 0.5)  # noqa: E731
    assert torch.equal(make(1, 10), make(1, 10))
    for other in (make(1, 20), make(2, 10)):
        agreement = (make(1, 10) == other).double().mean().item()
        assert 0.45 < agreement < 0.55


def test_lse_has_no_gradient() -> None:
    """The statistics are results with a node, and what is done to them does not reach q and k."""
    q, k, v = (x.npu().requires_grad_() for x in _qkv())
    out, top, total, *_ = npu().npu_fusion_attention(q, k, v, N, "BNSD", scale=SCALE)
    (out.sum() + (top + total.log()).sum()).backward()
    here = [x.double().requires_grad_() for x in _qkv()]
    sum(attend(*(x[b] for x in here), SCALE)[0].sum() for b in range(B)).backward()
    close(q.grad, here[0].grad)
