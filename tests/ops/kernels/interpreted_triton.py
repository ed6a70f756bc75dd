"""Our Triton kernels in Triton's interpreter. Run by test_triton.py in processes where TRITON_INTERPRET=1 was set."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import find_op, load_library
from llm_adapt.ops.kernels.triton import library, rotary, row_sums
from tests.ops.cases import Case, cases

OPS = ("add_rms_norm", "cross_entropy", "glu", "rms_norm", "rope")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ALL = [case for case in cases(FLOATS) if case.op.name in OPS]
REASONS = {"takes no empty tensors", "does not honour bias"}

assert load_library("triton") == ""


def draw(*sizes: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Normal numbers of a dtype."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed)).to(dtype)


def tables(*sizes: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Tables with columns of their own for both features of a pair: a kernel that mixes them up is found out."""
    angles = torch.rand(sizes, generator=torch.Generator().manual_seed(1)) * 6.28
    return {"cos": angles.cos().to(dtype), "sin": angles.sin().to(dtype)}


def run(name: str, **arguments: Any) -> Any:
    """Our kernel of an op."""
    kernel = find_op(name).kernels["triton"]
    return kernel.function(**arguments)


def prove_it(name: str, **arguments: Any) -> None:
    """The kernel serves the call, and its results and gradients are the reference's."""
    op = find_op(name)
    case = Case(op, 0, torch.float32, op.bind(**arguments))
    kernel = op.kernels["triton"]
    assert refusal(op, kernel, case.call) == ""
    verdict = prove(op, kernel, case.arguments)
    assert verdict.holds, verdict.reason


@pytest.mark.parametrize("case", ALL, ids=str)
def test_each_input_is_right_or_refused(case: Case) -> None:
    """Of each input of each op: the reference's results and gradients, or one of the reasons that are known."""
    kernel = case.op.kernels["triton"]
    reason = refusal(case.op, kernel, case.call)
    if reason:
        assert reason in REASONS
        return
    verdict = prove(case.op, kernel, case.arguments)
    assert verdict.holds, verdict.reason


@pytest.mark.parametrize("case", [case for case in ALL if case.op.name == "rope"], ids=str)
def test_pairs_that_are_read_together_rope(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: neighbours are split after one load, and joined before one store."""
    monkeypatch.setattr(rotary, "_reads_by_pairs", lambda device: True)
    test_each_input_is_right_or_refused(case)


@pytest.mark.parametrize("name", OPS)
def test_float64_is_refused(name: str) -> None:
    """NPU and MLU have no float64, so no kernel takes it."""
    op = find_op(name)
    case = next(case for case in cases((torch.float64,)) if case.op is op)
    assert "is torch.float64; takes float32, float16 and bfloat16" in refusal(op, op.kernels["triton"], case.call)


def test_endless_rows_are_refused_rms_norm() -> None:
    """A row whose blocks would be more programs than a grid has is refused, with the limit."""
    op = find_op("rms_norm")
    call = Case(op, 0, torch.float32, op.bind(x=torch.empty(1).expand(1, 2**27 + 1))).call
    assert refusal(op, op.kernels["triton"], call) == "takes rows of at most 134217728 numbers"


@pytest.mark.parametrize("name", OPS)
def test_each_kernel_is_declared_as_it_is(name: str) -> None:
    """Every kernel has a backward and gives the same bits each time; none was traced by torch.compile."""
    kernel = find_op(name).kernels["triton"]
    assert (kernel.has_backward, kernel.deterministic) == (True, True)
    assert (kernel.compilable, kernel.functorch, kernel.inference_only) == (False, False, False)


# -- shapes ---------------------------------------------------------------------------------------------------

dtypes = st.sampled_from(FLOATS)
small = st.integers(1, 5)
odd = st.sampled_from([1, 2, 3, 7, 16, 33, 64])


@settings(max_examples=30)
@given(small, small, odd, dtypes, st.one_of(st.none(), dtypes), st.data())
def test_norms_of_any_shape_rms_norm_add_rms_norm(
    batch: int, rows: int, columns: int, dtype: torch.dtype, weight: torch.dtype | None, data: st.DataObject
) -> None:
    """Any shape, dtypes of x, residual and weight each their own, every form, every dtype of the result."""
    form = data.draw(st.sampled_from(["standard", "cast_first", "one_plus", "one_plus_rounded"]))
    result = data.draw(st.sampled_from(["x", "weight", "promoted"]))
    options: dict[str, Any] = {"eps": 0.1}  # large, or the gradient of a row of one number is what cancels
    if weight is not None:
        options |= {"weight": draw(columns, dtype=weight, seed=1), "form": form, "result_dtype": result}
    x = draw(batch, rows, columns, dtype=dtype)
    if data.draw(st.booleans()):
        prove_it("rms_norm", x=x, **options)
    else:
        residual = draw(batch, rows, columns, dtype=data.draw(dtypes), seed=2)
        prove_it("add_rms_norm", x=x, residual=residual, **options)


@settings(max_examples=30)
@given(small, small, small, odd, dtypes, dtypes, st.data())
def test_rotations_of_any_shape_rope(
    batch: int, length: int, heads: int, pairs: int, dtype: torch.dtype, of_table: torch.dtype, data: st.DataObject
) -> None:
    """Any layout, order of pairs, width of table and of what passes through; batched tables, positions, inverse."""
    layout = data.draw(st.sampled_from(["bshd", "sbhd", "bhsd", "thd"]))
    sizes = {"b": batch, "s": length, "h": heads, "t": length, "d": 2 * pairs + data.draw(st.integers(0, 3))}
    table = data.draw(st.sampled_from(["full", "half"]))
    width = 2 * pairs if table == "full" else pairs
    arguments: dict[str, Any] = {
        "layout": layout,
        "table": table,
        "pairs": data.draw(st.sampled_from(["half", "interleaved", "interleaved_to_half"])),
        "inverse": data.draw(st.booleans()),
    }
    source = data.draw(st.sampled_from(["rows", "batch", "positions", "lengths"]))
    if source == "positions":
        shape = (length,) if layout == "thd" else data.draw(st.sampled_from([(length,), (1, length), (batch, length)]))
        arguments["positions"] = torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(2))
        arguments |= tables(9, width, dtype=of_table)
    elif source == "lengths" and layout == "thd":
        arguments["cu_seqlens"] = torch.tensor([0, length // 2, length])
        arguments |= tables(length, width, dtype=of_table)
    elif source == "batch" and layout != "thd":
        rows = data.draw(st.sampled_from([1, batch]))
        arguments |= tables(rows, length + 1, width, dtype=of_table)
    else:
        arguments |= tables(length + 2, width, dtype=of_table)
    prove_it("rope", x=draw(*(sizes[axis] for axis in layout), dtype=dtype), **arguments)


@settings(max_examples=30)
@given(small, small, odd, dtypes, st.data())
def test_gates_of_any_shape_glu(batch: int, rows: int, columns: int, dtype: torch.dtype, data: st.DataObject) -> None:
    """Any shape, activation and layout, packed or separate, with limits, offsets and weights of the rows."""
    activations = ["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"]
    arguments: dict[str, Any] = {
        "activation": data.draw(st.sampled_from(activations)),
        "limit": data.draw(st.sampled_from([None, 0.5])),
        "up_offset": data.draw(st.sampled_from([0.0, 1.0])),
    }
    if arguments["activation"] == "silu":
        arguments["alpha"] = data.draw(st.sampled_from([1.0, 1.702]))
    if data.draw(st.booleans()):
        arguments["weights"] = draw(batch, rows, 1, dtype=data.draw(dtypes), seed=2)
    if data.draw(st.booleans()):
        arguments |= {
            "x": draw(batch, rows, columns, dtype=dtype),
            "up": draw(batch, rows, columns, dtype=dtype, seed=1),
        }
    else:
        layout = data.draw(st.sampled_from(["halves", "halves_swapped", "interleaved"]))
        arguments |= {"x": draw(batch, rows, 2 * columns, dtype=dtype), "layout": layout}
    prove_it("glu", **arguments)


@settings(max_examples=30)
@given(small, st.sampled_from([7, 16, 33, 64]), dtypes, st.sampled_from([torch.int64, torch.int32]), st.data())
def test_losses_of_any_shape_cross_entropy(
    rows: int, columns: int, dtype: torch.dtype, index: torch.dtype, data: st.DataObject
) -> None:
    """Any shape, with smoothing, class weights, z-loss, scale, softcap, every reduction, some rows ignored."""
    target = torch.randint(columns, (rows,), generator=torch.Generator().manual_seed(3)).to(index)
    target[1::2] = -1
    arguments = {
        "class_weight": data.draw(st.sampled_from([None, draw(columns, seed=4).abs() + 0.5])),
        "label_smoothing": data.draw(st.sampled_from([0.0, 0.1])),
        "z_loss": data.draw(st.sampled_from([0.0, 0.01])),
        "logit_scale": data.draw(st.sampled_from([1.0, -0.5])),
        "logit_softcap": data.draw(st.sampled_from([None, 3.0])),
        "reduction": data.draw(st.sampled_from(["none", "sum", "mean"])),
    }
    prove_it("cross_entropy", logits=draw(rows, columns, dtype=dtype) * 2, target=target, ignore_index=-1, **arguments)


def test_one_class_cross_entropy() -> None:
    """With one class alone there is nothing to learn: loss and gradient are exactly 0."""
    for smoothing in (0.0, 0.1):
        logits = draw(3, 1).requires_grad_()
        loss, _ = run("cross_entropy", logits=logits, target=torch.tensor([0, -100, 0]), label_smoothing=smoothing)
        (gradient,) = torch.autograd.grad(loss, logits)
        assert (float(loss), gradient.tolist()) == (0.0, [[0.0], [0.0], [0.0]])


# -- loops, strides -------------------------------------------------------------------------------------------

LONG = 5000  # columns: more than one block of any kernel


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_longer_than_a_block_rms_norm_add_rms_norm(dtype: torch.dtype) -> None:
    """A row of several blocks, whose weight gets its gradient from a kernel of its own."""
    x, weight = draw(3, LONG, dtype=dtype), draw(LONG, dtype=dtype, seed=1)
    prove_it("rms_norm", x=x, weight=weight, form="one_plus")
    prove_it("rms_norm", x=x)
    prove_it("add_rms_norm", x=x, residual=draw(3, LONG, seed=2), weight=weight, form="cast_first")


def test_rows_longer_than_a_block_glu() -> None:
    """A row of several blocks, and the sum over it that is the gradient of its weight."""
    prove_it("glu", x=draw(2, 2 * LONG), weights=draw(2, 1, seed=1), layout="interleaved")


def test_rows_longer_than_a_block_cross_entropy() -> None:
    """The maximum and the sum go on from block to block, whichever holds the largest logit, or -inf alone."""
    logits = draw(4, LONG)
    logits[0, :10] += 50.0
    logits[1, -10:] += 50.0
    logits[2, :4500] = -torch.inf
    logits[3, 4500:] = -torch.inf
    target = torch.tensor([3, LONG - 1, 4700, 9])
    prove_it("cross_entropy", logits=logits, target=target, z_loss=0.1)
    prove_it("cross_entropy", logits=logits[:2], target=target[:2], label_smoothing=0.1)


def test_heads_and_pairs_beyond_a_block_rope() -> None:
    """More pairs than a block holds, more heads than fit beside them, and a long rest that passes through."""
    prove_it("rope", x=draw(1, 2, 19, 700), **tables(2, 300))
    prove_it("rope", x=draw(1, 2, 19, 700), **tables(2, 300), pairs="interleaved", inverse=True)


@pytest.mark.parametrize("name", OPS)
def test_more_rows_than_programs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid has at most 65535 programs, so each takes several rows; of the weight's gradient likewise."""
    monkeypatch.setattr(library, "MOST_PROGRAMS", 2)
    monkeypatch.setattr(library, "_PROGRAMS_AT_ONCE", 2)
    for case in ALL:
        if case.op.name == name and not refusal(case.op, case.op.kernels["triton"], case.call):
            verdict = prove(case.op, case.op.kernels["triton"], case.arguments)
            assert verdict.holds, f"{case}: {verdict.reason}"


def test_many_parts_of_long_rows_rms_norm(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight's own kernel sums every so-many-th row of every block."""
    monkeypatch.setattr(library, "_PROGRAMS_AT_ONCE", 6)
    prove_it("rms_norm", x=draw(7, LONG), weight=draw(LONG, seed=1))


def test_more_parts_than_are_added_up_at_a_time_rms_norm() -> None:
    """The sums of all programs, in several steps over parts and several blocks of columns, the last ones not full."""
    prove_it("rms_norm", x=draw(2 * row_sums.ROWS + 3, row_sums.COLUMNS + 5), weight=draw(row_sums.COLUMNS + 5, seed=1))


def test_rows_with_strides_rms_norm_add_rms_norm() -> None:
    """Rows that lie apart, columns that lie apart, and rows that are one and the same."""
    weight = draw(40, seed=1)[::2]
    for x in (draw(6, 30)[:, 5:25], draw(20, 6).t(), draw(4, 6, 40)[::2, :, ::2], draw(1, 20).expand(5, 20)):
        prove_it("rms_norm", x=x, weight=weight)
        prove_it("add_rms_norm", x=x, residual=draw(*x.shape, seed=2), weight=weight)
        prove_it("add_rms_norm", x=draw(*x.shape, seed=2), residual=x, weight=weight)


def test_rows_with_strides_glu() -> None:
    """Rows that lie apart, columns that lie apart, of a packed tensor and of two."""
    for x in (draw(6, 30)[:, 5:25], draw(20, 6).t(), draw(4, 6, 40)[::2, :, ::2]):
        prove_it("glu", x=x, layout="interleaved")
        prove_it("glu", x=x, up=draw(*x.shape, seed=1))


def test_rows_with_strides_cross_entropy() -> None:
    """Logits without the last position, as a language model shifts them; targets that lie apart."""
    target = torch.randint(20, (2, 6), generator=torch.Generator().manual_seed(0))
    prove_it("cross_entropy", logits=draw(2, 6, 20)[:, :-1], target=target[:, 1:])
    prove_it("cross_entropy", logits=draw(12, 30)[:, :20], target=target.t().reshape(-1))
    prove_it("cross_entropy", logits=draw(20, 6).t(), target=target[0])


def test_heads_with_strides_rope() -> None:
    """Heads that are a part of a fused projection, features that lie apart, tables that are a part of longer ones."""
    longer = {name: table[3:, :8] for name, table in tables(10, 16).items()}
    prove_it("rope", x=draw(2, 5, 9, 8)[:, :, 3:6], **longer)
    prove_it("rope", x=draw(2, 5, 3, 16)[..., ::2], **longer)
    prove_it("rope", x=draw(5, 2, 3, 8).transpose(0, 1), **longer)
    apart = {name: table.t() for name, table in tables(8, 7).items()}
    prove_it("rope", x=draw(2, 5, 3, 8), **apart)
    prove_it("rope", x=draw(2, 5, 3, 8), cos=longer["cos"], sin=longer["sin"].contiguous())
    batched = {name: table[:, 1:, 4:12] for name, table in tables(2, 7, 16).items()}
    prove_it("rope", x=draw(2, 5, 3, 8), **batched)
    positions = torch.tensor([[4, 0, 1, 9, 2], [3, 3, 0, 1, 7]]).t().contiguous().t()
    prove_it("rope", x=draw(2, 5, 3, 8), **tables(10, 8), positions=positions)


# -- gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_one_gradient_alone_rms_norm(wanted: str) -> None:
    """x or weight may be frozen: the other gets the gradient that it gets together with it."""
    tensors = {"x": draw(4, 16), "weight": draw(16, seed=1)}
    tensors[wanted].requires_grad_()
    run("rms_norm", **tensors).sum().backward()
    found = tensors[wanted].grad
    copies = {name: tensor.detach().clone().requires_grad_() for name, tensor in tensors.items()}
    find_op("rms_norm").reference(**copies).sum().backward()
    torch.testing.assert_close(found, copies[wanted].grad)
    assert [name for name, tensor in tensors.items() if tensor.grad is not None] == [wanted]


@pytest.mark.parametrize("used", [(0,), (1,), (0, 1)], ids=["y", "h", "both"])
@pytest.mark.parametrize("dtype", FLOATS[:2], ids=str)
def test_either_result_may_be_used_add_rms_norm(used: tuple[int, ...], dtype: torch.dtype) -> None:
    """A loss of y, of the sum or of both gives the reference's gradients; a result that is not used, none."""
    gradients = []
    for function in (find_op("add_rms_norm").kernels["triton"].function, find_op("add_rms_norm").reference):
        tensors = draw(4, 16, dtype=dtype), draw(4, 16, seed=1), draw(16, seed=2)
        for tensor in tensors:
            tensor.requires_grad_()
        results = function(*tensors)
        sum((results[index] * draw(4, 16, seed=3 + index)).sum() for index in used).backward()
        gradients.append([tensor.grad for tensor in tensors])
    for found, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", OPS)
def test_second_derivatives_are_refused(name: str) -> None:
    """A backward that is differentiated raises: without that, the second derivative would silently be 0."""
    case = next(case for case in ALL if case.op.name == name)
    first = next(iter(case.arguments))
    leaf = case.arguments[first].clone().requires_grad_()
    taken = {key: value for key, value in case.arguments.items() if key in case.op.kernels["triton"].honours}
    found = run(name, **taken | {first: leaf})
    found = found[0] if isinstance(found, tuple) else found
    (gradient,) = torch.autograd.grad(found.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


# -- what a kernel cannot raise for ---------------------------------------------------------------------------


def test_targets_beyond_the_vocabulary_are_nan_cross_entropy() -> None:
    """Loss and gradient of such a row are NaN, no memory beyond the row is read, and other rows are as ever."""
    logits = draw(4, 10).requires_grad_()
    loss, _ = run("cross_entropy", logits=logits, target=torch.tensor([1, 10, -1, 2]), reduction="none")
    loss.sum().backward()
    assert torch.isnan(loss).tolist() == [False, True, True, False]
    assert logits.grad is not None
    assert torch.isnan(logits.grad).any(-1).tolist() == [False, True, True, False]


def test_positions_beyond_the_table_are_nan_rope() -> None:
    """A token whose position has no row in the table is NaN, and so is a negative one."""
    y = run("rope", x=draw(1, 4, 1, 8), **tables(5, 8), positions=torch.tensor([0, 5, -1, 4]))
    assert torch.isnan(y).all(-1).flatten().tolist() == [False, True, True, False]
    assert torch.isnan(y).any(-1).flatten().tolist() == [False, True, True, False]


def test_nan_stays_nan_glu() -> None:
    """No activation and no limit turns NaN into a number."""
    for activation in ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"):
        for row in ([torch.nan, 1.0], [1.0, torch.nan]):
            assert torch.isnan(run("glu", x=torch.tensor([row]), activation=activation, limit=2.0)).all()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("rms_norm", {"x": draw(2, 8), "weight": draw(7)}, "pass a weight of the size"),
        ("add_rms_norm", {"x": draw(2, 8), "residual": draw(1, 8)}, "residual"),
        ("rope", {"x": draw(1, 6, 2, 8), **tables(5, 8)}, "pass one axis of 6 positions"),
        ("glu", {"x": draw(2, 8), "up": draw(2, 7)}, "must be equal"),
        ("glu", {"x": draw(2, 8), "weights": draw(3, 1)}, "one a row"),
        ("cross_entropy", {"logits": draw(2, 8), "target": torch.tensor([1])}, "one a row"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_shapes_raise(name: str, arguments: dict[str, Any], message: str) -> None:
    """A kernel reads memory by the shapes it is given, so it checks them itself: proofs can be off."""
    with pytest.raises(ValueError, match=message):
        run(name, **arguments)
