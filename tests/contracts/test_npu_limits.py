"""The fake of torch_npu refuses what torch_npu documents as wrong, so that no kernel of ours can do it unseen."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, find_op
from tests.contracts.fake_npu import fake_npu
from tests.contracts.recording import ContractError, FakeVendor

HALF = torch.float16
CAUSAL = torch.ones(2048, 2048, dtype=torch.bool).triu(1)


@pytest.fixture(scope="module", autouse=True)
def npu() -> Iterator[FakeVendor]:
    """The fake of torch_npu."""
    with fake_npu() as vendor:
        yield vendor


def call(name: str, *args: Any, **kwargs: Any) -> Any:
    """A call of the vendor."""
    return getattr(sys.modules["torch_npu"], name)(*args, **kwargs)


def draw(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers."""
    return torch.randn(sizes).to(dtype)


Q = draw(1, 4, 2, 16)
TWO_OF = torch.ones(2, 2, dtype=torch.bool)  # two tokens, each with two experts
ROWS = torch.arange(4, dtype=torch.int32)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("npu_rms_norm", (draw(2, 4), draw(3)), {}, "trailing axes"),
        ("npu_rms_norm", (draw(2, 4), draw(4, dtype=HALF)), {}, "does not go with"),
        ("npu_rms_norm", (draw(2, 4).double(), draw(4).double()), {}, "takes float32"),
        ("npu_rms_norm", (draw(4), draw(4)), {}, "2 to 8 axes"),
        ("npu_add_rms_norm", (draw(2, 4, dtype=HALF), draw(2, 4, dtype=HALF), draw(4)), {}, "one dtype"),
        ("npu_rotary_mul", (draw(1, 3, 2, 8), draw(1, 3, 1, 4), draw(1, 3, 1, 4)), {}, "full D"),
        (
            "npu_rotary_mul",
            (draw(2, 3, 2, 8), draw(2, 3, 1, 8), draw(2, 3, 1, 8)),
            {"rotary_mode": "interleave"},
            "fit no",
        ),
        ("npu_rotary_mul", (draw(1, 3, 2, 7), draw(1, 3, 1, 7), draw(1, 3, 1, 7)), {}, "even head size"),
        (
            "npu_rotary_mul",
            (draw(1, 3, 2, 8), draw(1, 3, 1, 8), draw(1, 3, 1, 8)),
            {"rotary_mode": "full"},
            "rotary_mode",
        ),
        ("npu_rotary_mul", (draw(1, 1, 2000, 2), draw(1, 1, 1, 2), draw(1, 1, 1, 2)), {}, "below 1000"),
        ("npu_rotary_mul", (draw(2, 1000, 2), draw(2, 1, 2), draw(2, 1, 2)), {}, "below 1000"),
        (
            "npu_rotary_mul",
            (draw(10, 1, 100, 2), draw(1, 1, 1, 2), draw(1, 1, 1, 2)),
            {"rotary_mode": "interleave"},
            "B N too",
        ),
        ("npu_swiglu", (draw(2, 5),), {}, "even along dim"),
        ("npu_swiglu", (draw(4, 2).t(),), {}, "contiguous"),
        ("npu_gelu", (draw(2),), {"approximate": "erf"}, "approximate='erf'"),
        ("npu_scaled_masked_softmax", (draw(1, 1, 16, 32), CAUSAL[None, None, :16, :32]), {}, "32 to 4096"),
        ("npu_scaled_masked_softmax", (draw(1, 1, 32, 32), CAUSAL[None, None, :32, :32].int()), {}, "mask is bool"),
        ("npu_scaled_masked_softmax", (draw(1, 1, 32, 32), CAUSAL[None, None, :32, :32] | True), {}, "as a whole"),
        ("npu_scaled_masked_softmax", (draw(1, 32, 32), CAUSAL[None, :32, :32]), {}, "four axes"),
        ("npu_cross_entropy_loss", (draw(3, 5), torch.zeros(3, dtype=torch.int32)), {}, "int64"),
        ("npu_cross_entropy_loss", (draw(3, 5), torch.zeros(3).long()), {"ignore_index": 5}, "not below C"),
        ("npu_cross_entropy_loss", (draw(3, 5), torch.zeros(3).long()), {"return_zloss": True}, "zloss"),
        ("npu_dynamic_quant", (draw(3, 5),), {}, "float16 and bfloat16"),
        ("npu_moe_token_permute_with_routing_map", (draw(2, 4), TWO_OF), {"num_out_tokens": 3}, "is not T K"),
        ("npu_moe_token_permute_with_routing_map", (draw(2, 4), TWO_OF), {"num_out_tokens": 2}, "exactly 1 experts"),
        ("npu_moe_token_permute_with_routing_map", (draw(2, 4), TWO_OF.int()), {"num_out_tokens": 4}, "bool or int8"),
        (
            "npu_moe_token_permute_with_routing_map",
            (draw(2, 4, dtype=HALF), TWO_OF),
            {"num_out_tokens": 4, "probs": draw(2, 2)},
            "do not go with",
        ),
        ("npu_moe_token_unpermute_with_routing_map", (draw(4, 4), torch.arange(4), [2, 4]), {}, "are int32"),
        ("npu_moe_token_unpermute_with_routing_map", (draw(4, 4), ROWS // 2, [2, 4]), {}, "are the rows"),
        ("npu_fusion_attention", (Q, Q, Q, 3, "BSND"), {}, "head_num=3"),
        ("npu_fusion_attention", (Q, Q, Q, 2, "bsnd"), {}, "input_layout"),
        ("npu_fusion_attention", (Q[..., :8], Q[..., :8], Q[..., :8], 2, "BSND"), {}, "multiple of 16"),
        ("npu_fusion_attention", (Q, Q, Q.half(), 2, "BSND"), {}, "one dtype"),
        ("npu_fusion_attention", (Q, Q, Q, 2, "BSND"), {"atten_mask": CAUSAL[:4, :4], "sparse_mode": 3}, "compressed"),
        ("npu_fusion_attention", (Q, Q, Q, 2, "BSND"), {"atten_mask": ~CAUSAL, "sparse_mode": 2}, "compressed"),
        (
            "npu_fusion_attention",
            (Q, Q, Q, 2, "BSND"),
            {"atten_mask": CAUSAL.float(), "sparse_mode": 2},
            "bool or uint8",
        ),
        ("npu_fusion_attention", (Q, Q, Q, 2, "BSND"), {"atten_mask": CAUSAL[:4, :3], "sparse_mode": 1}, "atten_mask"),
        ("npu_fusion_attention", (Q, Q, Q, 2, "BSND"), {"atten_mask": CAUSAL[:4, :4], "pre_tockens": 0}, "agree"),
        ("npu_fusion_attention_v2", (Q, Q[:, :2], Q[:, :2], 2, "BSND"), {"atten_mask": CAUSAL, "sparse_mode": 3}, "v2"),
        ("npu_fusion_attention", (Q[0], Q[0], Q[0], 2, "TND"), {}, "list of cumulative ends"),
    ],
)
def test_documented_limits_are_errors(name: str, args: Any, kwargs: Any, message: str) -> None:
    """Shapes, dtypes, layouts and masks that a document excludes are errors of the fake."""
    with pytest.raises(ContractError, match=message):
        call(name, *args, **kwargs)


LEFT, GROUPS = draw(4, 6), torch.tensor([2, 4])
INNER = {"group_type": 2, "split_item": 3, "group_list_type": 1}
BY_ROWS = {"group_type": 0, "split_item": 2, "group_list_type": 1}


@pytest.mark.parametrize(
    ("x", "weight", "groups", "options", "message"),
    [
        (LEFT.t(), draw(2, 4, 3), GROUPS, BY_ROWS, "x is no transposed view"),
        (LEFT.contiguous(), draw(6, 3), GROUPS, INNER, "x is a transposed view"),
        (draw(6, 4).t(), draw(3, 6).t(), GROUPS, INNER, "weight is no transposed view"),
        (draw(6, 4), draw(1, 4, 3), torch.tensor([6]), BY_ROWS, "length 1"),
    ],
)
def test_grouped_products_have_rules(x: Any, weight: Any, groups: Any, options: Any, message: str) -> None:
    """Which operand lies transposed is fixed for each kind of group, and one group is given by its end."""
    with pytest.raises(ContractError, match=message):
        call("npu_grouped_matmul", [x], [weight], group_list=groups, **options)


def test_norms_take_what_the_real_ones_take() -> None:
    """npu_rms_norm takes an empty tensor, npu_add_rms_norm one axis."""
    assert call("npu_rms_norm", draw(0, 4), draw(4))[0].shape == (0, 4)
    assert call("npu_add_rms_norm", draw(4), draw(4), draw(4))[0].shape == (4,)
    with pytest.raises(ContractError, match="1 to 8 axes and no empty"):
        call("npu_add_rms_norm", draw(0, 4), draw(0, 4), draw(4))


def test_permutation_by_a_map_gives_the_documented_example() -> None:
    """sorted_indices say the row of each pair counted by token, not the token of a row."""
    x = draw(3, 4)
    found = call("npu_moe_token_permute_with_routing_map", x, torch.ones(3, 2, dtype=torch.int8), num_out_tokens=6)
    assert torch.equal(found[0], torch.cat([x, x]))
    assert found[2].tolist() == [0, 3, 1, 4, 2, 5]


def packed(ends_q: list[int], ends_k: list[int], **options: Any) -> Any:
    """A call of packed sequences."""
    return call(
        "npu_fusion_attention", Q[0], Q[0], Q[0], 2, "TND", actual_seq_qlen=ends_q, actual_seq_kvlen=ends_k, **options
    )


@pytest.mark.parametrize(
    ("ends_q", "ends_k", "options", "message"),
    [
        ([0, 2, 4], [0, 2, 4], {}, "no leading zero"),
        ([2, 3], [2, 4], {}, "does not rise to 4"),
        ([2, 4], [4], {}, "different lengths"),
        ([2, 4], [0, 4], {}, "queries and no keys"),
        ([3, 4], [1, 4], {"atten_mask": CAUSAL, "sparse_mode": 3, "inner_precise": 2}, "masked as a whole"),
    ],
)
def test_packed_sequences_have_rules(ends_q: list[int], ends_k: list[int], options: Any, message: str) -> None:
    """Lists of cumulative ends have no leading zero and reach the end, and no row of them is masked whole."""
    with pytest.raises(ContractError, match=message):
        packed(ends_q, ends_k, **options)


def test_without_a_mask_the_sparse_mode_is_ignored() -> None:
    """sparse_mode=3 without atten_mask is full attention, as documented."""
    full = call("npu_fusion_attention", Q, Q, Q, 2, "BSND", scale=0.25)[0]
    assert torch.equal(call("npu_fusion_attention", Q, Q, Q, 2, "BSND", scale=0.25, sparse_mode=3)[0], full)


def test_statistics_of_packed_sequences_stand_by_sequence() -> None:
    """By default the statistics hold one sequence after the other; softmax_layout='TND' has them by token."""
    by_sequence, by_token = (packed([1, 4], [1, 4], softmax_layout=layout)[1] for layout in ("", "TND"))
    assert torch.equal(by_sequence.flatten(0, 1)[2:5], by_token[1:, 0])
    assert not torch.equal(by_sequence, by_token)


def causal_attention(**changed: Any) -> Any:
    """A kernel of causal attention that follows the contract but for what is changed."""

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: str = "bshd", causal: str = "none"
    ) -> torch.Tensor:
        options = {"atten_mask": CAUSAL, "sparse_mode": 3, "scale": q.shape[-1] ** -0.5} | changed
        options = {name: value for name, value in options.items() if value is not None}
        return call("npu_fusion_attention", q, k, v, q.shape[2], "BSND", **options)[0]

    return Kernel("attention", "toy", attention, "none")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"scale": None}, "is wrong"),
        ({"atten_mask": None}, "is wrong"),
        ({"atten_mask": ~CAUSAL}, "compressed mask"),
        ({"sparse_mode": 2}, "is wrong"),
        ({"scale": 0.2}, "is wrong"),
    ],
)
def test_a_kernel_against_the_contract_fails_its_proof(changed: Any, reason: str) -> None:
    """A forgotten scale, a forgotten mask, a mask the wrong way round or another alignment is found by the proof."""
    op = find_op("attention")
    arguments = op.bind(draw(1, 3, 2, 16), draw(1, 5, 2, 16), draw(1, 5, 2, 16), causal="bottom_right")
    assert prove(op, causal_attention(), arguments).holds
    verdict = prove(op, causal_attention(**changed), arguments)
    assert not verdict.holds
    assert reason in verdict.reason
