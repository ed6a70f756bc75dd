"""What torch_npu does in backward alone: the fake fails there as op-plugin does, and our kernels do not come there."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.proof import compare, run_op
from llm_adapt.ops.dispatch.registry import all_ops
from tests.contracts.fake_npu import fake_npu
from tests.contracts.kernels import why_not
from tests.contracts.recording import ContractError, FakeVendor
from tests.ops.cases import Case

HALF = torch.bfloat16


@pytest.fixture(scope="module", autouse=True)
def npu() -> Iterator[FakeVendor]:
    """The fake, with our kernels loaded against it."""
    with fake_npu() as vendor:
        yield vendor


def vendor(name: str, *args: Any, **kwargs: Any) -> Any:
    """A call of torch_npu."""
    return getattr(sys.modules["torch_npu"], name)(*args, **kwargs)


def ours(op: str, *args: Any, **kwargs: Any) -> Any:
    """Our kernel of an op, called as the op would be."""
    kernel = all_ops()[op].kernels["torch_npu"]
    bound = all_ops()[op].bind(*args, **kwargs)
    return kernel.function(**{name: value for name, value in bound.items() if name in kernel.honours})


def refused(op: str, *args: Any, **kwargs: Any) -> str:
    """Why our kernel refuses a call."""
    arguments = all_ops()[op].bind(*args, **kwargs)
    return why_not(all_ops()[op].kernels["torch_npu"], Case(all_ops()[op], 0, torch.float32, arguments))


def ask(*sizes: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random numbers that want a gradient."""
    return torch.randn(sizes).to(dtype).requires_grad_()


def test_gradients_of_tables_have_a_limit_of_their_own() -> None:
    """B N of more than 1024 fails in backward where cos and sin need a gradient; x alone has one."""
    x, table = ask(2, 1, 600, 2), torch.randn(1, 1, 1, 2)
    vendor("npu_rotary_mul", x, table, table).sum().backward()
    y = vendor("npu_rotary_mul", x, table.clone().requires_grad_(), table)
    with pytest.raises(ContractError, match="at most 1024"):
        y.sum().backward()


def test_tables_are_detached(npu: FakeVendor) -> None:
    """Calls that want a gradient of cos or sin are refused; others never ask torch_npu for one."""
    x, table = ask(2, 1, 600, 2), torch.randn(1, 2)
    assert refused("rope", x, table, table) == ""
    assert refused("rope", x, ask(1, 2), table) == "gives no gradient of cos, which the reference does"
    ours("rope", x, ask(1, 2), ask(1, 2)).sum().backward()
    assert not npu.last("npu_rotary_mul")["r1"].requires_grad


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ignore_index": 1}, "'mean' takes"),
        ({"weight": torch.ones(5)}, "'mean' takes"),
        ({"label_smoothing": 0.1}, "label smoothing"),
    ],
)
def test_options_of_the_loss_without_a_gradient(options: Any, message: str) -> None:
    """Options that the gradient of the loss does not know are right in forward and fail in backward."""
    loss = vendor("npu_cross_entropy_loss", ask(3, 5), torch.zeros(3).long(), **options)[0]
    with pytest.raises(ContractError, match=message):
        loss.sum().backward()


def test_our_loss_refuses_options_without_a_gradient() -> None:
    """Every option whose gradient fails is refused, and so is an ignore_index that is no class and above them."""
    logits, target = ask(3, 5), torch.zeros(3).long()
    for options in ({"ignore_index": 1}, {"class_weight": torch.ones(5)}):
        assert "has a gradient of the mean without" in refused("cross_entropy", logits, target, **options)
        assert refused("cross_entropy", logits, target, **options, reduction="sum") == ""
    assert refused("cross_entropy", logits, target, label_smoothing=0.1) == "does not honour label_smoothing"
    assert "below the number" in refused("cross_entropy", logits, target, ignore_index=5, reduction="sum")


def test_a_step_with_betas_of_float32_is_within_the_tolerance() -> None:
    """op-plugin casts the betas to float32: a first step shows that in the second moment, and it is allowed."""
    op = all_ops()["adamw"]
    p, g, zero = torch.randn(1000), torch.randn(1000), torch.zeros(1000)
    given = op.bind([p], [g], [zero], [zero.clone()], weight_decay=0.1)
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    narrow = given | {name: float(torch.tensor(given[name], dtype=torch.float32)) for name in names}
    expected, found = (run_op(op, op.reference, one, oracle=torch.float64) for one in (given, narrow))
    assert compare(op, found, expected, [torch.float32]).holds
    wrong = run_op(op, op.reference, given | {"beta2": 0.9991}, oracle=torch.float64)
    assert not compare(op, wrong, expected, [torch.float32]).holds


CHOSEN = torch.eye(4, dtype=torch.bool)


def test_a_loss_of_the_probs_alone() -> None:
    """torch_npu's permutation fails in backward where nothing reaches the rows; ours gives the tokens zeros."""
    tokens, probs = ask(4, 8), ask(4, 4)
    _, weights, _ = vendor("npu_moe_token_permute_with_routing_map", tokens, CHOSEN, probs=probs, num_out_tokens=4)
    with pytest.raises(IndexError):
        weights.sum().backward()
    for x in (tokens, tokens.detach()):
        x.grad = probs.grad = None
        _, weights, _ = ours("moe_permute", x, CHOSEN, 4, probs=probs, topk=1)
        weights.sum().backward()
        assert torch.equal(probs.grad, CHOSEN.float())
        assert x.grad is None or x.grad.count_nonzero() == 0


def test_permuted_rows_may_be_written_to() -> None:
    """The results are no views: they can be changed in place as those of the reference."""
    tokens = ask(4, 8)
    rows, weights, _ = ours("moe_permute", tokens, CHOSEN, 4, probs=ask(4, 4), topk=1)
    rows.mul_(2)
    (rows.sum() + weights.sum()).backward()
    assert torch.equal(tokens.grad, torch.full((4, 8), 2.0))


def test_without_probs_there_are_none() -> None:
    """The permutation's second result is None where no probs are given."""
    found = vendor("npu_moe_token_permute_with_routing_map", ask(4, 8), CHOSEN, num_out_tokens=4)
    assert found[1] is None


def test_gradients_of_wide_probs_are_not_rounded(npu: FakeVendor) -> None:
    """torch_npu writes the gradient of float32 probs in the dtype of bfloat16 rows; our kernel keeps all its digits."""
    rows, probs, dy = ask(4, 64, dtype=HALF), ask(4, 4), torch.randn(4, 64).to(HALF)
    expected = torch.diag((rows.double() * dy.double()).sum(1))
    place = torch.arange(4, dtype=torch.int32)
    given = {"probs": probs, "routing_map": CHOSEN}
    vendor("npu_moe_token_unpermute_with_routing_map", rows, place, [4, 64], **given).backward(dy)
    assert (probs.grad - expected).abs().max() > 1e-4
    probs.grad = rows.grad = None
    y = ours("moe_unpermute", rows, place.long(), 4, **given, topk=1)
    y.backward(dy)
    assert y.dtype == rows.grad.dtype == HALF
    assert (probs.grad - expected).abs().max() < 1e-5
    assert npu.last("npu_moe_token_unpermute_with_routing_map")["permuted_tokens"].dtype == torch.float32
    assert refused("moe_unpermute", rows.half(), place.long(), 4, **given, topk=1) == ""


@pytest.mark.parametrize("counts", [[6], [2, 4]])
def test_grouped_products_of_transposed_memory(npu: FakeVendor, counts: list[int]) -> None:
    """x and the gradient of y may lie transposed or in wider memory; one expert is given as its end, not its count."""
    weight, groups = ask(len(counts), 4, 4), torch.tensor(counts)
    for x in (torch.randn(4, 6).t(), torch.randn(6, 8)[:, :4]):
        left = x.detach().requires_grad_()
        dy = torch.randn(4, 6).t()
        weight.grad = None
        ours("grouped_gemm", left, weight, groups).backward(dy)
        parts = zip(x.split(counts), dy.split(counts), strict=True)
        torch.testing.assert_close(weight.grad, torch.stack([a.t() @ b for a, b in parts]))
        assert left.grad is not None
    assert npu.last("npu_grouped_matmul")["group_list_type"] == (0 if len(counts) == 1 else 1)
