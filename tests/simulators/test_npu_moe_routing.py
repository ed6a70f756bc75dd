"""Choice of experts and expansion for inference, on the simulated NPU: torch_npu's operators against plain loops.

T tokens, H columns, E experts, K experts of each token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, agrees, close, refuses

pytestmark = pytest.mark.simulator("npu")

T, H, E, K = 6, 10, 12, 3


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _best(scores: list[float], count: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda place: (-scores[place], place))[:count]


def _gating(
    x: torch.Tensor, bias: torch.Tensor, groups: int, chosen: int, mode: int, norm_type: int, factor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """y [T, K] and the experts [T, K], row by row."""
    normed = x.softmax(-1) if norm_type == 0 else x.sigmoid()
    values, experts = [], []
    for row in normed:
        scores = (row + bias).tolist()
        parts = [scores[E // groups * group : E // groups * (group + 1)] for group in range(groups)]
        of_groups = [max(part) if mode == 0 else sum(sorted(part)[-2:]) for part in parts]
        kept = _best(of_groups, chosen)
        allowed = [score if place // (E // groups) in kept else float("-inf") for place, score in enumerate(scores)]
        best = _best(allowed, K)
        weights = row[best] if norm_type == 0 else row[best] / (row[best].sum() + 1e-20)
        values.append(weights * factor)
        experts.append(best)
    return torch.stack(values), torch.tensor(experts)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("norm_type", [0, 1])
@pytest.mark.parametrize(("groups", "chosen", "mode"), [(1, 1, 0), (4, 2, 0), (4, 2, 1)])
def test_gating_top_k(dtype: torch.dtype, norm_type: int, groups: int, chosen: int, mode: int) -> None:
    """npu_moe_gating_top_k: the bias chooses, within the best groups; sigmoid weights are normalised."""
    x, bias = _random(T, E).to(dtype), _random(E).to(dtype)
    y, experts, normed = _npu().npu_moe_gating_top_k(
        x.npu(), K, bias=bias.npu(), k_group=chosen, group_count=groups, group_select_mode=mode, norm_type=norm_type,
        routed_scaling_factor=2.5, out_flag=True,
    )  # fmt: skip
    expected, chosen_experts = _gating(x.double(), bias.double(), groups, chosen, mode, norm_type, 2.5)
    assert experts.dtype == torch.int32
    assert normed.dtype == torch.float32
    assert torch.equal(experts.cpu().long(), chosen_experts)
    close(y, expected)
    close(normed, x.double().softmax(-1) if norm_type == 0 else x.double().sigmoid())


@pytest.mark.parametrize("dtype", FLOATS)
def test_gating_top_k_has_a_gradient(dtype: torch.dtype) -> None:
    """The gradient of sigmoid scores, with out_flag=True."""
    call = lambda x: _npu().npu_moe_gating_top_k(x, K, norm_type=1, out_flag=True, routed_scaling_factor=2.5)[0]  # noqa: E731
    formula = lambda x: _gating(x, torch.zeros(E), 1, 1, 0, 1, 2.5)[0]  # noqa: E731
    agrees(call, formula, [_random(T, E)], dtype, node="NpuMoeGatingTopKBackward")


def test_gating_top_k_needs_out_flag_for_its_gradient() -> None:
    """The gradient reads norm_out, which is written with out_flag alone: without it nothing may be believed."""
    x = _random(T, E).npu().requires_grad_()
    y, _, normed = _npu().npu_moe_gating_top_k(x, K, norm_type=1)
    y.sum().backward()
    assert normed.isnan().all()
    assert x.grad is not None
    assert x.grad.isnan().any()


def test_gating_top_k_has_no_gradient_of_softmax() -> None:
    """norm_type 0 is refused by the backward."""
    x = _random(T, E).npu().requires_grad_()
    with refuses("norm_type must be 1"):
        _npu().npu_moe_gating_top_k(x, K, out_flag=True)[0].sum().backward()


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"renorm": 1}, "renorm must be 0"),
        ({"norm_type": 2}, "norm_type must be 0"),
        ({"group_select_mode": 2}, "group_select_mode must be"),
        ({"group_count": 5}, "must divide the 12 experts"),
        ({"group_count": 4, "k_group": 5}, "k_group must be from 1"),
        ({"group_count": 6, "k_group": 1}, "k must be from 1 to"),
        ({"x": torch.zeros(2, 2049)}, "at most 2048 experts"),
    ],
)
def test_gating_top_k_refuses(given: dict[str, Any], text: str) -> None:
    """Each documented limit of npu_moe_gating_top_k."""
    x = given.pop("x", _random(T, E))
    with refuses(text):
        _npu().npu_moe_gating_top_k(x.npu(), K, **given)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(T, E), (2, 3, E)])
def test_gating_top_k_softmax(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """npu_moe_gating_top_k_softmax does not normalise again; its third result counts pairs by rank, then token."""
    x = _random(T, E).reshape(shape).to(dtype)
    finished = torch.zeros(shape[:-1], dtype=torch.bool)
    finished.view(-1)[1] = True
    y, experts, rows = (t.cpu() for t in _npu().npu_moe_gating_top_k_softmax(x.npu(), finished.npu(), K))
    expected, best = _gating(x.reshape(T, E).double(), torch.zeros(E), 1, 1, 0, 0, 1.0)
    close(y.reshape(T, K), expected)
    best[1] = E
    assert torch.equal(experts.reshape(T, K).long(), best)
    assert torch.equal(rows.reshape(T, K).long(), torch.tensor([[j * T + t for j in range(K)] for t in range(T)]))


def test_gating_top_k_softmax_has_no_gradient() -> None:
    """torch_npu refuses its backward; that of the second version leaves no gradient behind."""
    x = _random(T, E).npu().requires_grad_()
    with pytest.raises(RuntimeError, match="derivative for npu::npu_moe_gating_top_k_softmax is not implemented"):
        _npu().npu_moe_gating_top_k_softmax(x, None, K)[0].sum().backward()
    _npu().npu_moe_gating_top_k_softmax_v2(x, k=K)[0].sum().backward()
    assert x.grad is None


@pytest.mark.parametrize("renorm", [0, 1])
def test_gating_top_k_softmax_v2(renorm: int) -> None:
    """renorm=0 is softmax, then the best; renorm=1 the best, then softmax of them alone."""
    x = _random(T, E)
    y, experts, scores = _npu().npu_moe_gating_top_k_softmax_v2(x.npu(), k=K, renorm=renorm, output_softmax=True)
    best = torch.tensor([_best(row.tolist(), K) for row in x])
    picked = x.double().gather(1, best)
    close(y, picked.softmax(-1) if renorm else x.double().softmax(-1).gather(1, best))
    assert torch.equal(experts.cpu().long(), best)
    if renorm == 0:
        close(scores, x.double().softmax(-1))


def test_gating_top_k_softmax_refuses() -> None:
    """At most 1024 experts of a token."""
    with refuses("k must be from 1 to 1024"):
        _npu().npu_moe_gating_top_k_softmax(torch.zeros(2, 2000).npu(), None, 1025)


def _chosen() -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(T)]).int()


def _sorted_pairs(first: int, end: int) -> list[int]:
    flat = _chosen().reshape(-1).tolist()
    return sorted((pair for pair in range(T * K) if first <= flat[pair] < end), key=lambda pair: (flat[pair], pair))


@pytest.mark.parametrize("kind", [0, 1, 2])
@pytest.mark.parametrize(("first", "end"), [(0, E), (3, 9)])
def test_init_routing_v2(kind: int, first: int, end: int) -> None:
    """npu_moe_init_routing_v2: rows by expert within the range, where each pair went, and the experts' rows."""
    x, scale = _random(T, H), torch.rand(T)
    rows, place, counts, scales = _npu().npu_moe_init_routing_v2(
        x.npu(), _chosen().npu(), scale=scale.npu(), expert_num=E, expert_tokens_num_flag=True,
        expert_tokens_num_type=kind, active_expert_range=[first, end],
    )  # fmt: skip
    pairs = _sorted_pairs(first, end)
    close(rows[: len(pairs)], x.double()[torch.tensor(pairs) // K])
    assert rows[len(pairs) :].isnan().all()
    close(scales[: len(pairs)], scale.double()[torch.tensor(pairs) // K])
    assert place.cpu().tolist() == [pairs.index(pair) if pair in pairs else -1 for pair in range(T * K)]
    of_experts = [_chosen().eq(expert).sum().item() for expert in range(first, end)]
    if kind == 2:
        present = [[first + place, count] for place, count in enumerate(of_experts) if count]
        assert counts.cpu().tolist() == present + [[0, 0]] * (E - len(present))
    else:
        expected = torch.tensor(of_experts)
        assert torch.equal(counts.cpu(), expected if kind == 1 else expected.cumsum(0))


def test_init_routing_v2_says_the_pairs_of_rows() -> None:
    """row_idx_type=1 gives the pair of each row."""
    given = {"expert_num": E, "active_expert_range": [0, E], "row_idx_type": 1}
    place = _npu().npu_moe_init_routing_v2(_random(T, H).npu(), _chosen().npu(), **given)[1]
    assert place.cpu().tolist() == _sorted_pairs(0, E)


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"quant_mode": 1}, "quant_mode 1 is not modelled"),
        ({"drop_pad_mode": 1, "expert_capacity": 2}, "drop_pad_mode 1 is not modelled"),
        ({"row_idx_type": 2}, "row_idx_type must be"),
        ({"active_expert_range": [4, 13]}, "active_expert_range must be"),
        ({"expert_num": 5121, "expert_tokens_num_type": 2, "active_expert_range": [0, 5121]}, "expert_num 5121 is out"),
    ],
)
def test_init_routing_v2_refuses(given: dict[str, Any], text: str) -> None:
    """What is documented and what is not modelled of npu_moe_init_routing_v2."""
    with refuses(text):
        _npu().npu_moe_init_routing_v2(
            _random(T, H).npu(), _chosen().npu(), **{"expert_num": E, "active_expert_range": [0, E], **given}
        )


@pytest.mark.parametrize("active", [T, 4])
def test_init_and_finalize_routing(active: int) -> None:
    """npu_moe_init_routing, npu_moe_compute_expert_tokens and npu_moe_finalize_routing go together."""
    x, scales, bias = _random(T, H), _random(T, K), _random(E, H)
    skip1, skip2 = _random(T, H), _random(T, H).flip(0)
    row_idx = torch.arange(T * K).reshape(K, T).t().int()
    rows, place, sorted_experts = _npu().npu_moe_init_routing(x.npu(), row_idx.npu(), _chosen().npu(), active)
    pairs = _sorted_pairs(0, E)
    close(rows, x.double()[torch.tensor(pairs)[: active * K] // K])
    assert sorted_experts.cpu().tolist() == sorted(_chosen().reshape(-1).tolist())
    ends = _npu().npu_moe_compute_expert_tokens(sorted_experts, E)
    assert ends.cpu().tolist() == [(_chosen() <= expert).sum().item() for expert in range(E)]
    if active < T:
        return
    tensors = [t.npu() for t in (skip1, skip2, bias, scales)]
    out = _npu().npu_moe_finalize_routing(rows * 2, *tensors, place, _chosen().npu())
    weighed = [(x[t].double() * 2 + bias.double()[_chosen()[t].long()]) * scales[t, :, None].double() for t in range(T)]
    close(out, torch.stack([one.sum(0) for one in weighed]) + skip1.double() + skip2.double())


def test_finalize_routing_drops_pairs() -> None:
    """In modes 1 and 3 rows are [E, C, H], and -1 is a dropped pair; mode 3 counts pairs by token."""
    rows, scales = _random(E, 2, H), _random(T, K)
    place = torch.arange(T * K).int()
    place[4] = -1
    out = _npu().npu_moe_finalize_routing(rows.npu(), None, None, None, scales.npu(), place.npu(), None, 3)
    picked = torch.where(place[:, None] >= 0, rows.reshape(-1, H)[place.clamp(min=0).long()], 0.0).double()
    close(out, (picked.reshape(T, K, H) * scales.double()[:, :, None]).sum(1))


def test_re_routing() -> None:
    """npu_moe_re_routing brings tokens from rank by rank to expert by expert."""
    counts = torch.tensor([[2, 1, 3], [1, 4, 2]])
    tokens = _random(int(counts.sum()), H).half()
    scales = torch.rand(len(tokens))
    found = _npu().npu_moe_re_routing(tokens.npu(), counts.npu(), per_token_scales=scales.npu())
    label = [(e, r) for r in range(2) for e in range(3) for _ in range(int(counts[r, e]))]
    order = sorted(range(len(label)), key=lambda place: (label[place], place))
    assert found[2].cpu().tolist() == order
    assert found[3].cpu().tolist() == counts.sum(0).tolist()
    close(found[0], tokens[order].double())
    close(found[1], scales[order].double())


def test_re_routing_refuses() -> None:
    """Counts alone, gather indices alone, fewer than 16384 columns."""
    counts = torch.tensor([[1, 1]]).npu()
    for given, columns, text in (
        ({"expert_token_num_type": 0}, H, "expert_token_num_type must be 1"),
        ({"idx_type": 1}, H, "idx_type must be 0"),
        ({}, 16384, "1 to 16383 columns"),
    ):
        with refuses(text):
            _npu().npu_moe_re_routing(torch.zeros(2, columns).half().npu(), counts, **given)
