"""Cross entropy of torch_npu over the simulated NPU, whole and split over a vocabulary, and its masked softmax."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, HALVES, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(13)
    return [torch.randn(shape, generator=generator) for shape in shapes]


TARGET = torch.tensor([0, 4, 2, 8, 8, 1])


def _loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    reduction: str = "mean",
    ignored: int = -100,
    smoothing: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Row by row, from the sums of exponentials."""
    log_prob = logits - logits.exp().sum(-1, keepdim=True).log()
    weight = torch.ones(logits.shape[1], dtype=torch.float64) if weight is None else weight.double()
    rows, weights = [], []
    for row, one in zip(log_prob, target.tolist(), strict=True):
        kept = one != ignored
        sharp = -row[one] * weight[one] if kept else row[0] * 0
        smooth = -(row * weight).sum() / len(row) if kept else row[0] * 0
        rows.append((1 - smoothing) * sharp + smoothing * smooth)
        weights.append(weight[one] if kept else weight[0] * 0)
    if reduction == "none":
        return torch.stack(rows), log_prob
    total = torch.stack(rows).sum()
    return (total / torch.stack(weights).sum() if reduction == "mean" else total).reshape(1), log_prob


def _call(logits: torch.Tensor, target: torch.Tensor = TARGET, **arguments: Any) -> Any:
    given = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()}
    return _npu().npu_cross_entropy_loss(logits, target.npu(), **given)[:2]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy(reduction: str, dtype: torch.dtype) -> None:
    """npu_cross_entropy_loss gives a loss of shape [1] or [N] in the dtype of the logits, and the log-probabilities."""
    logits = _data((6, 9))
    call = lambda x: _call(x, reduction=reduction)  # noqa: E731
    formula = lambda x: _loss(x, TARGET, reduction=reduction)  # noqa: E731
    agrees(call, formula, logits, dtype, backward=dtype == torch.float32, node="NpuCrossEntropyLossBackward")


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_cross_entropy_in_16_bits_has_gradients(dtype: torch.dtype) -> None:
    """Gradients come from log-probabilities that were rounded to 16 bits."""
    (logits,) = _data((6, 9))
    here, there = logits.to(dtype).npu().requires_grad_(), logits.to(dtype).double().requires_grad_()
    _call(here)[0].backward()
    _loss(there, TARGET)[0].backward()
    assert here.grad is not None
    assert here.grad.dtype == dtype
    difference = (here.grad.cpu().double() - there.grad).abs().max()
    assert difference < 0.02 * there.grad.abs().max()


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_cross_entropy_with_weights_and_ignored_rows(reduction: str) -> None:
    """Sum and none have gradients with class weights and another ignore_index."""
    logits, (weight,) = _data((6, 9)), _data((9,))
    weight = weight.sigmoid()
    call = lambda x: _call(x, weight=weight, reduction=reduction, ignore_index=8)  # noqa: E731
    agrees(call, lambda x: _loss(x, TARGET, weight, reduction, 8), logits, torch.float32)


def test_cross_entropy_ignores_a_negative_index() -> None:
    """The default of -100 is left out of the mean and of the gradients."""
    target = torch.tensor([0, -100, 2, 8, -100, 1])
    agrees(lambda x: _call(x, target), lambda x: _loss(x, target), _data((6, 9)), torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_cross_entropy_forward_alone(reduction: str) -> None:
    """Without gradients every reduction has weights, ignored rows and label smoothing."""
    logits, (weight,) = _data((6, 9)), _data((9,))
    weight = weight.sigmoid()
    call = lambda x: _call(x, weight=weight, reduction=reduction, ignore_index=2, label_smoothing=0.2)  # noqa: E731
    agrees(call, lambda x: _loss(x, TARGET, weight, reduction, 2, 0.2), logits, torch.float32, backward=False)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"weight": torch.ones(9)}, "defaults of weight and ignore_index"),
        ({"ignore_index": 3}, "defaults of weight and ignore_index"),
        ({"label_smoothing": 0.1}, "label_smoothing 0 alone"),
        ({"label_smoothing": 0.1, "reduction": "sum"}, "label_smoothing 0 alone"),
    ],
    ids=str,
)
def test_cross_entropy_refuses_gradients(arguments: dict[str, Any], text: str) -> None:
    """What has no gradient is refused in backward, by name."""
    leaf = _data((6, 9))[0].npu().requires_grad_()
    loss = _call(leaf, **arguments)[0]
    with refuses(text):
        loss.backward()


@pytest.mark.parametrize(
    ("logits", "target", "arguments", "text"),
    [
        ((6, 9), TARGET.int(), {}, "target must be int64"),
        ((6, 9), TARGET[:5], {}, "target must have the shape"),
        ((6, 9), TARGET, {"weight": torch.ones(9).half()}, "weight must be float32"),
        ((6, 9), TARGET, {"ignore_index": 9}, "must be below C"),
        ((6, 9), TARGET, {"lse_square_scale_for_zloss": 0.1}, "z-loss is not supported"),
        ((6, 9), TARGET, {"return_zloss": True}, "z-loss is not supported"),
        ((200_001, 1), torch.zeros(200_001, dtype=torch.long), {}, "N of 1 to 200000"),
    ],
    ids=["int32", "length", "weight", "ignored", "scale", "z-loss", "rows"],
)
def test_cross_entropy_refuses(
    logits: tuple[int, ...], target: torch.Tensor, arguments: dict[str, Any], text: str
) -> None:
    """Dtypes, sizes and options that are not documented are refused by name."""
    with refuses(text):
        _call(torch.ones(logits).npu(), target, **arguments)


@pytest.mark.parametrize("keep_logits", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_vocabulary_split_over_two_ranks(keep_logits: bool, dtype: torch.dtype) -> None:
    """Max and sum of each rank, reduced by hand, give the loss; its backward the gradients of each rank."""
    x, weight = (t.to(dtype) for t in _data((13, 32), (256, 32)))
    x, weight = x / 4, weight / 4
    target = torch.randint(0, 256, (13,), generator=torch.Generator().manual_seed(2))
    target[0] = 255
    here, there = (x.npu(), weight.npu()), [t.double().requires_grad_() for t in (x, weight)]
    parts = [
        _npu().npu_fused_linear_online_max_sum(
            here[0], here[1][start : start + 128], target.npu(), start, start + 127, keep_logits
        )
        for start in (0, 128)
    ]
    maxima = torch.maximum(parts[0][0], parts[1][0])
    sums = sum(part[1] * (part[0] - maxima).exp() for part in parts)
    hits = [unpacked(part[3], 13) for part in parts]
    predicted = sum(
        torch.where(hit.npu(), 0.0, part[2] + part[0] - maxima) for hit, part in zip(hits, parts, strict=True)
    )
    assert [hit.tolist() for hit in hits] == [(target >= 128).tolist(), (target < 128).tolist()]
    losses = [
        _npu().npu_fused_cross_entropy_loss_with_max_sum(
            maxima, sums, predicted, vocab_parallel_logits=part[5] if keep_logits else None
        )
        for part in parts
    ]
    logits = there[0] @ there[1].t()
    expected = logits.exp().sum(-1).log() - logits[torch.arange(13), target]
    close(losses[0][0], expected)
    (d_loss,) = _data((13,))
    expected.backward(d_loss.double())
    d_input = 0
    for rank, (part, (_, softmax)) in enumerate(zip(parts, losses, strict=True)):
        rows = slice(rank * 128, rank * 128 + 128)
        given = {"softmax": softmax} if keep_logits else {"logits_max": maxima, "sum_exp_logits": sums}
        found, d_weight = _npu().npu_fused_linear_cross_entropy_loss_with_max_sum_backward(
            d_loss.npu(), here[0], here[1][rows], part[3], part[4], **given
        )
        close(d_weight, there[1].grad[rows], what=f"gradient of the weight of rank {rank}")
        d_input = d_input + found.float()
    close(d_input.to(dtype), there[0].grad)


def unpacked(mask: torch.Tensor, rows: int) -> torch.Tensor:
    """Bits of a packed mask, the first row in the lowest bit."""
    bits = (mask.cpu().long().unsqueeze(-1) >> torch.arange(8)) & 1
    return bits.flatten()[:rows].bool()


def test_vocabulary_split_refuses() -> None:
    """float32, a vocabulary of fewer than 128 words, label smoothing, indices that do not fit."""
    x, weight, target = torch.ones(4, 8).half().npu(), torch.ones(64, 8).half().npu(), torch.zeros(4).long().npu()
    with refuses("must be float16 or bfloat16"):
        _npu().npu_fused_linear_online_max_sum(x.float(), weight.float(), target, 0, 1)
    with refuses("lies beyond"):
        _npu().npu_fused_linear_online_max_sum(x, weight, target, 0, 64)
    row = torch.ones(4).npu()
    with refuses("label_smoothing must be 0"):
        _npu().npu_fused_cross_entropy_loss_with_max_sum(row, row, row, label_smoothing=0.1)
    mask = torch.zeros(1, dtype=torch.uint8).npu()
    backward = _npu().npu_fused_linear_cross_entropy_loss_with_max_sum_backward
    with refuses("at least 128 rows"):
        backward(row, x, weight, mask, target, logits_max=row, sum_exp_logits=row)
    with refuses("must be given where softmax is not"):
        backward(row, x, torch.ones(128, 8).half().npu(), mask, target)


def test_scaled_masked_softmax_is_an_aclnn_operator_of_ascend_950() -> None:
    """On Ascend 950: results and gradients in three dtypes, and the documented limits."""
    code = """
import math
torch.manual_seed(0)
x, dy = torch.randn(2, 2, 32, 64), torch.randn(2, 2, 32, 64)
mask = torch.ones(1, 1, 32, 64, dtype=torch.bool).triu(33)
for dtype in (torch.float32, torch.float16, torch.bfloat16):
    here, there = x.to(dtype).npu().requires_grad_(), x.to(dtype).double().requires_grad_()
    y = torch_npu.npu_scaled_masked_softmax(here, mask.npu(), 0.3, False)
    e = torch.where(mask, 0.0, (there * 0.3).exp())
    expected = e / e.sum(-1, keepdim=True)
    y.backward(dy.to(dtype).npu())
    expected.backward(dy.to(dtype).double())
    pairs = ((y, expected), (here.grad, there.grad))
    error = max(((a.cpu().double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)
    print(error < {torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 2e-2}[dtype], y.grad_fn.name())
one = lambda *shape: torch.ones(*shape).npu()
call = torch_npu.npu_scaled_masked_softmax
outcome(lambda: call(one(1, 1, 32, 40), mask.npu()[..., :40], 1.0, False))
outcome(lambda: call(one(1, 1, 32, 64), mask.npu(), 1.0, True))
outcome(lambda: call(one(1, 1, 32, 64), mask.npu().byte(), 1.0, False))
outcome(lambda: call(one(1, 2, 32, 64), mask.npu().expand(3, 1, 32, 64), 1.0, False))
outcome(lambda: call(one(1, 1, 32, 64), torch.ones_like(mask).npu(), 1.0, False))
"""
    text = said_on("Ascend950", code)
    assert text.count("True NpuScaledMaskedSoftmaxBackward0") == 3, text
    for part in ("steps of 32", "fixed_triu_mask", "must be bool", "does not broadcast", "masked as a whole"):
        assert part in text, f"{part!r} is not in:\n{text}"


def test_losses_are_those_of_training_chips() -> None:
    """310P has no npu_cross_entropy_loss."""
    code = """
outcome(lambda: torch_npu.npu_cross_entropy_loss(torch.ones(4, 8).npu(), torch.zeros(4, dtype=torch.long).npu()))
"""
    assert "documented for Atlas A2, A3 and Ascend 950 alone" in said_on("Ascend310P3", code)
    assert math.isfinite(_call(_data((6, 9))[0].npu())[0].item())
