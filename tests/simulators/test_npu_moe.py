"""Permutation by experts, on the simulated NPU: torch_npu's own operators and gradients against plain indexing.

T tokens, H columns, E experts, K experts of each token; a pair is a token and one of its experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

T, H, E, K = 7, 6, 5, 3


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _experts(topk: int = K) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.stack([torch.randperm(E, generator=generator)[:topk] for _ in range(T)])


def _map() -> torch.Tensor:
    return torch.zeros(T, E, dtype=torch.bool).scatter(1, _experts(), True)


def _pairs_by_expert(experts: torch.Tensor) -> list[int]:
    flat = experts.reshape(-1).tolist()
    return sorted(range(len(flat)), key=lambda pair: (flat[pair], pair))


def _rows_of_pairs(order: list[int]) -> torch.Tensor:
    return torch.tensor(sorted(range(len(order)), key=lambda row: order[row]))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [None, 9, -2], ids=str)
def test_permute(dtype: torch.dtype, rows: int | None) -> None:
    """npu_moe_token_permute sorts pairs by expert, keeps the first rows, and adds their gradients up by token."""
    experts, order = _experts(), _pairs_by_expert(_experts())
    call = lambda x: _npu().npu_moe_token_permute(x, experts.npu(), rows)[0]  # noqa: E731
    formula = lambda x: x[torch.tensor(order[:rows]) // K]  # noqa: E731
    agrees(call, formula, [_random(T, H)], dtype, node="NpuMoeTokenPermuteBackward")


def test_permute_says_the_row_of_each_pair() -> None:
    """sorted_indices is int32, the row of each pair, and is not cut to num_out_tokens."""
    _, rows = _npu().npu_moe_token_permute(_random(T, H).npu(), _experts().npu(), 9)
    assert rows.dtype == torch.int32
    assert torch.equal(rows.cpu().long(), _rows_of_pairs(_pairs_by_expert(_experts())))


def test_permute_takes_one_expert_of_each_token() -> None:
    """indices [T] is one expert of each token."""
    experts = _experts(1)[:, 0].int()
    order = torch.tensor(_pairs_by_expert(experts))
    agrees(
        lambda x: _npu().npu_moe_token_permute(x, experts.npu())[0], lambda x: x[order], [_random(T, H)], torch.bfloat16
    )


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rows", [T * K, 9])
def test_unpermute(dtype: torch.dtype, rows: int) -> None:
    """npu_moe_token_unpermute weighs and adds up what is left of each token, with gradients of rows and probs."""
    place = _rows_of_pairs(_pairs_by_expert(_experts()))
    kept = place < rows

    def formula(permuted: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
        of_pairs = torch.where(kept[:, None], permuted[place.clamp(max=rows - 1)], 0.0)
        return (of_pairs * probs.reshape(-1, 1)).reshape(T, K, H).sum(1)

    call = lambda permuted, probs: _npu().npu_moe_token_unpermute(permuted, place.int().npu(), probs)  # noqa: E731
    agrees(call, formula, [_random(rows, H), _random(T, K)], dtype, node="NpuMoeTokenUnpermuteBackward")


def test_unpermute_without_probs_is_for_one_expert() -> None:
    """Without probs each token has one row."""
    place = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    call = lambda permuted: _npu().npu_moe_token_unpermute(permuted, place.int().npu())  # noqa: E731
    agrees(call, lambda permuted: permuted[place], [_random(T, H)], torch.float32)


def _by_expert(values: torch.Tensor) -> torch.Tensor:
    return values.t().masked_select(_map().t())


def _tokens_of_rows() -> torch.Tensor:
    return torch.tensor([token for expert in range(E) for token in range(T) if _map()[token, expert]])


@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float32)], ids=str)
@pytest.mark.parametrize("kind", [torch.bool, torch.int8])
def test_permute_by_a_map(dtypes: tuple[torch.dtype, torch.dtype], kind: torch.dtype) -> None:
    """npu_moe_token_permute_with_routing_map: rows and their probs by expert, then token; gradients of both."""
    tokens, probs = (t.to(d) for t, d in zip((_random(T, H), _random(T, E)), dtypes, strict=True))
    here = [t.npu().requires_grad_() for t in (tokens, probs)]
    there = [t.double().requires_grad_() for t in (tokens, probs)]
    rows, weights, place = _npu().npu_moe_token_permute_with_routing_map(
        here[0], _map().to(kind).npu(), probs=here[1], num_out_tokens=T * K
    )
    expected = there[0][_tokens_of_rows()], _by_expert(there[1])
    close(rows, expected[0])
    close(weights, expected[1])
    assert torch.equal(place.cpu().long(), _tokens_of_rows().argsort(stable=True))
    factors = _random(T * K, H).to(dtypes[0]), _random(T * K).to(dtypes[1])
    ((rows * factors[0].npu()).sum() + (weights * factors[1].npu()).sum()).backward()
    ((expected[0] * factors[0]).sum() + (expected[1] * factors[1]).sum()).backward()
    for found, value in zip(here, there, strict=True):
        assert found.grad is not None
        assert value.grad is not None
        close(found.grad, value.grad)


def test_a_loss_of_permuted_probs_alone_fails_in_torch_npu() -> None:
    """Its backward reads the shape of the gradient of the rows, which is not there when only the probs are used."""
    tokens, probs = _random(T, H).npu().requires_grad_(), _random(T, E).npu().requires_grad_()
    _, weights, _ = _npu().npu_moe_token_permute_with_routing_map(
        tokens, _map().npu(), probs=probs, num_out_tokens=T * K
    )
    with pytest.raises(IndexError):
        weights.sum().backward()


def _unpermuted(rows: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    place = _tokens_of_rows().argsort(stable=True)
    return (rows[place] * probs.masked_select(_map())[:, None]).reshape(T, K, H).sum(1)


def _unpermute(rows: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    place = _tokens_of_rows().argsort(stable=True).int().npu()
    found: torch.Tensor = _npu().npu_moe_token_unpermute_with_routing_map(
        rows, place, [T, H], probs=probs, routing_map=_map().npu()
    )
    return found


@pytest.mark.parametrize("dtype", FLOATS)
def test_unpermute_by_a_map(dtype: torch.dtype) -> None:
    """npu_moe_token_unpermute_with_routing_map weighs rows by the probs of their pairs, with both gradients."""
    agrees(
        _unpermute, _unpermuted, [_random(T * K, H), _random(T, E)], dtype, node="NpuMoeTokenUnpermuteWithRoutingMap"
    )


def test_unpermute_by_a_map_rounds_the_gradient_of_float32_probs() -> None:
    """With bfloat16 rows op-plugin has the gradient of float32 probs written in bfloat16."""
    rows, probs = _random(T * K, H).bfloat16(), _random(T, E)
    here, there = [rows.npu(), probs.npu().requires_grad_()], [rows.double(), probs.double().requires_grad_()]
    _unpermute(*here).sum().backward()
    _unpermuted(*there).sum().backward()
    assert here[1].grad is not None
    assert there[1].grad is not None
    assert here[1].grad.dtype == torch.float32
    assert torch.equal(here[1].grad.cpu(), here[1].grad.cpu().bfloat16().float())
    close(here[1].grad.bfloat16(), there[1].grad)


def test_unpermute_by_a_map_without_probs() -> None:
    """Without probs rows are added up as they are, and the map is not needed."""
    place = _tokens_of_rows().argsort(stable=True)
    call = lambda rows: _npu().npu_moe_token_unpermute_with_routing_map(rows, place.int().npu(), [T, H])  # noqa: E731
    agrees(call, lambda rows: rows[place].reshape(T, K, H).sum(1), [_random(T * K, H)], torch.bfloat16)


def _permute(**changed: Any) -> Any:
    given = {"tokens": _random(T, H), "routing_map": _map(), "probs": None, "num_out_tokens": T * K, **changed}
    on_npu = {name: one.npu() if isinstance(one, torch.Tensor) else one for name, one in given.items()}
    return _npu().npu_moe_token_permute_with_routing_map(on_npu.pop("tokens"), on_npu.pop("routing_map"), **on_npu)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"drop_and_pad": True, "num_out_tokens": E * 2}, "drop_and_pad=True is not modelled"),
        ({"tokens": torch.ones(T, H, dtype=torch.int32)}, "tokens must be Float, Half, BFloat16"),
        ({"routing_map": torch.ones(T, E)}, "routing_map must be Bool, Char"),
        ({"probs": torch.ones(T, E).half()}, "do not go with rows of Float"),
        ({"probs": torch.ones(T, E - 1)}, "must have the shape of routing_map"),
        ({"num_out_tokens": T * E + T}, "num_out_tokens must be from 0 to T x E"),
        ({"routing_map": torch.ones(T, 600).bool(), "num_out_tokens": T * 512}, "must be below 512"),
    ],
)
def test_permute_by_a_map_refuses(changed: dict[str, Any], text: str) -> None:
    """Each documented limit of the permutation by a map."""
    with refuses(text):
        _permute(**changed)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda npu: npu.npu_moe_token_permute(torch.ones(4, 8).int().npu(), torch.zeros(4, 2).int().npu()),
            "tokens must be",
        ),
        (
            lambda npu: npu.npu_moe_token_permute(torch.ones(4, 8).npu(), torch.zeros(4, 2).npu()),
            "indices must be Int, Long",
        ),
        (lambda npu: npu.npu_moe_token_permute(torch.ones(2, 8).npu(), torch.zeros(2, 513).int().npu()), "at most 512"),
        (
            lambda npu: npu.npu_moe_token_permute(torch.ones(32768, 1).npu(), torch.zeros(32768, 512).int().npu()),
            "fewer than 16777215",
        ),
        (
            lambda npu: npu.npu_moe_token_permute(torch.ones(4, 8).npu(), torch.zeros(4, 2).int().npu(), None, True),
            "padded_mode=True is not modelled",
        ),
        (
            lambda npu: npu.npu_moe_token_unpermute(torch.ones(8, 8).npu(), torch.arange(8).npu()),
            "sorted_indices must be Int",
        ),
        (
            lambda npu: npu.npu_moe_token_unpermute_with_routing_map(
                torch.ones(8, 8).npu(), torch.arange(8).int().npu(), [4, 8], probs=torch.ones(4, 2).npu()
            ),
            "probs need routing_map",
        ),
        (
            lambda npu: npu.npu_moe_token_unpermute_with_routing_map(
                torch.ones(1026, 8).npu(), torch.arange(1026).int().npu(), [2, 8]
            ),
            "topK must be at most 512, not 513",
        ),
    ],
)
def test_permutation_refuses(call: Any, text: str) -> None:
    """Each documented limit that can be seen without the values."""
    with refuses(text):
        call(_npu())


_VALUES = """
x = torch.ones(4, 8).npu()
outcome(lambda: torch_npu.npu_moe_token_permute(x, torch.full((4, 2), 16777215).npu()))
outcome(lambda: torch_npu.npu_moe_token_permute(x, torch.full((4, 2), 16777214).npu()))
even, uneven = torch.eye(4).bool(), torch.ones(4, 4).bool().tril()
outcome(lambda: torch_npu.npu_moe_token_permute_with_routing_map(x, uneven.npu(), num_out_tokens=8))
outcome(lambda: torch_npu.npu_moe_token_permute_with_routing_map(x, even.npu(), num_out_tokens=4))
outcome(lambda: torch_npu.npu_moe_token_unpermute_with_routing_map(x, torch.tensor([0, 1, 2, -1]).int().npu(), [4, 8]))
"""


def test_permutation_refuses_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """What depends on values is refused where the kernel runs: experts out of range, unequal numbers of them."""
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")  # with the queue torch_npu runs nothing after the first such error
    said = [line for line in said_on("Ascend910B3", _VALUES).splitlines() if line.startswith(("done", "refused"))]
    assert [line[:7] for line in said] == ["refused", "done", "refused", "done", "refused"]


def test_permute_is_not_on_the_310p() -> None:
    """npu_moe_token_permute is documented for A2, A3 and Ascend950."""
    code = "outcome(lambda: torch_npu.npu_moe_token_permute(torch.ones(4, 8).npu(), torch.zeros(4, 2).int().npu()))"
    assert "is not supported on Ascend310P3" in said_on("Ascend310P3", code)
