"""The OpenMP kernels: right wherever they do not refuse, for any shape, stride and dtype, and any number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.dispatch.call import describe
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import prove, run_op
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel, find_op, load_library
from tests.contracts.more_cases import more_cases
from tests.ops.cases import Case, cases
from tests.ops.norm_checks import hidden_states

if load_library("openmp"):
    pytest.skip(load_library("openmp"), allow_module_level=True)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CASES = [case for case in (*cases(DTYPES), *more_cases(DTYPES)) if "openmp" in case.op.kernels]
# The same examples each time: a lone number whose terms cancel may be off by more than a tolerance allows for.
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
SLOWER = "is no faster"  # how refusals begin that speak of time, and of nothing else
# Options of a call by op: what changes how a kernel computes.
FORMS = ("standard", "cast_first", "one_plus", "one_plus_rounded")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """The numbers that tests draw are the same in each run."""
    torch.manual_seed(0)


def kernel_of(op: FusedOp) -> Kernel:
    """Our kernel."""
    return op.kernels["openmp"]


def call_of(op: FusedOp, **arguments: Any) -> tuple[dict[str, Any], Call]:
    """A call with its defaults, and its facts."""
    bound = op.bind(**arguments)
    return bound, describe(op.name, op.signature, bound, op.lists)


def check(name: str, **arguments: Any) -> None:
    """The kernel refuses for its speed alone, and is right."""
    op = find_op(name)
    bound, call = call_of(op, **arguments)
    reason = refusal(op, kernel_of(op), call)
    assert reason == "" or reason.startswith(SLOWER), reason
    verdict = prove(op, kernel_of(op), bound)
    assert verdict.holds, f"{call}: {verdict.reason}"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_input_of_an_op_is_computed_rightly(case: Case) -> None:
    """What the kernel takes, or refuses for its speed alone, has the float64 results and gradients."""
    kernel = kernel_of(case.op)
    reason = refusal(case.op, kernel, case.call)
    if reason and not reason.startswith(SLOWER):
        pytest.skip(reason)
    verdict = prove(case.op, kernel, case.arguments)
    assert verdict.holds, verdict.reason


def test_few_inputs_are_refused() -> None:
    """Nearly all inputs are taken, or would be if they were large: the test above is not empty by mistake."""
    reasons = {str(case): refusal(case.op, kernel_of(case.op), case.call) for case in CASES}
    # Norms of lists are for 16 bits alone, and have tests of their own.
    reasons = {name: reason for name, reason in reasons.items() if not name.startswith(("multi_tensor", "clip_grads"))}
    refused = {name for name, reason in reasons.items() if reason and not reason.startswith(SLOWER)}
    assert {name.partition("-")[0] for name in refused} == {"activation"}  # a bias for each element
    assert len(refused) == len(DTYPES)
    assert len(reasons) > 400


@pytest.fixture
def two_threads() -> Iterator[None]:
    """Two threads whatever the machine has; afterwards as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


LARGE: dict[str, dict[str, Any]] = {
    "rms_norm": {"x": (67, 1031), "weight": (1031,)},
    "add_rms_norm": {"x": (67, 1031), "residual": (67, 1031), "weight": (1031,)},
    "layer_norm": {"x": (67, 1031), "weight": (1031,), "bias": (1031,)},
    "rope": {"x": (2, 33, 9, 64), "cos": (33, 64), "sin": (33, 64)},
    "glu": {"x": (67, 1031), "up": (67, 1031), "bias": (2062,)},
    "activation": {"x": (67, 1031), "bias": (1031,), "function": "gelu_tanh"},
    "cross_entropy": {"logits": (40, 2051), "target": (40,)},
    "softmax_partials": {"logits": (40, 2051), "target": (40,)},
    "scaled_masked_softmax": {"x": (2, 3, 40, 300), "sinks": (3,), "causal": True},
}


def drawn(shapes: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Tensors of these shapes; `target` holds classes, and other values are as they are."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, value in shapes.items():
        if name == "target":
            found[name] = torch.randint(2051, value, generator=generator)
        elif isinstance(value, tuple):
            found[name] = torch.randn(value, generator=generator).to(dtype)
        else:
            found[name] = value
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", LARGE)
def test_bits_do_not_depend_on_threads(name: str, dtype: torch.dtype, two_threads: None) -> None:
    """Results and gradients of one thread and of two are the same bits, and so are those of a second run."""
    op = find_op(name)
    arguments = drawn(LARGE[name], dtype)
    check(name, **arguments)
    runs = []
    for threads in (2, 2, 1):
        torch.set_num_threads(threads)
        runs.append(run_op(op, kernel_of(op).function, arguments))
    assert len(runs[0]) > 1
    for run in runs[1:]:
        assert run.keys() == runs[0].keys()
        assert all(torch.equal(run[key], runs[0][key]) for key in run)


@pytest.mark.parametrize("name", LARGE)
def test_defaults_of_the_process_change_nothing(name: str) -> None:
    """torch.set_default_dtype and a default device decide about no buffer of ours."""
    op, arguments = find_op(name), drawn(LARGE[name], torch.bfloat16)
    expected = run_op(op, kernel_of(op).function, arguments)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        leaves = {
            name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in arguments.items()
        }
        first = next(iter(leaves.values())).requires_grad_()
        with torch.device("meta"):
            found = kernel_of(op).function(**leaves)
            outputs = found if isinstance(found, tuple) else (found,)
            outputs[0].sum().backward()
    finally:
        torch.set_default_dtype(before)
    key = "output[0]" if isinstance(found, tuple) else "output"
    assert torch.equal(outputs[0], expected[key])
    assert first.grad is not None
    assert first.grad.device.type == "cpu"


def narrowed(x: torch.Tensor) -> torch.Tensor:
    """x in a dtype that the library takes; one element that has strides of its own is copied."""
    x = x.float() if x.dtype == torch.float64 else x
    return x.clone(memory_format=torch.contiguous_format) if x.numel() == 1 else x


@EXAMPLES
@given(x=hidden_states(), data=st.data())
def test_norms_of_any_shape_and_stride(x: torch.Tensor, data: st.DataObject) -> None:
    """Norms are right for any axes, strides, forms and mixtures of dtypes."""
    x = narrowed(x)
    x = x if x.shape[-1] > 2 else torch.randn(*x.shape[:-1], 4).to(x.dtype)
    name = data.draw(st.sampled_from(["rms_norm", "layer_norm", "add_rms_norm"]))
    form = data.draw(st.sampled_from([form for form in FORMS if name != "layer_norm" or form != "cast_first"]))
    vector = torch.randn(x.shape[-1]).to(data.draw(st.sampled_from(DTYPES)))
    arguments = {"x": x, "weight": vector, "form": form, "eps": data.draw(st.sampled_from([1e-6, 1e-3]))}
    if name == "add_rms_norm":
        arguments["residual"] = torch.randn(x.shape).to(data.draw(st.sampled_from(DTYPES)))
    if name == "layer_norm" and data.draw(st.booleans()):
        arguments["bias"] = vector.flip(0)
    arguments["result_dtype"] = data.draw(st.sampled_from(["x", "weight", "promoted"]))
    check(name, **arguments)


@EXAMPLES
@given(x=hidden_states(), data=st.data())
def test_gates_of_any_shape_and_stride(x: torch.Tensor, data: st.DataObject) -> None:
    """Gated units are right for any axes, strides, layouts and options, packed or apart."""
    x = narrowed(x)
    names = ("gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu")
    arguments: dict[str, Any] = {"x": x, "activation": data.draw(st.sampled_from(names))}
    width = 2 * x.shape[-1]
    if data.draw(st.booleans()):
        arguments["up"] = torch.randn(x.shape).to(x.dtype)
    else:
        arguments |= {"x": torch.cat((x, x.flip(-1)), -1)}
        arguments["layout"] = data.draw(st.sampled_from(["halves", "halves_swapped", "interleaved"]))
    if data.draw(st.booleans()):
        arguments["bias"] = torch.randn(width).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        arguments["weights"] = torch.rand(*x.shape[:-1], 1).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):
        arguments |= {"limit": 1.0, "up_offset": 1.0}
    if arguments["activation"] == "silu" and data.draw(st.booleans()):
        arguments["alpha"] = 1.702
    check("glu", **arguments)


@EXAMPLES
@given(data=st.data())
def test_rotations_of_any_layout(data: st.DataObject) -> None:
    """Rotations are right for any layout, pairs, tables, strides, looked-up positions, and both directions."""
    layout = data.draw(st.sampled_from(["bshd", "sbhd", "bhsd", "thd"]))
    batch, length, heads = (data.draw(st.integers(1, size)) for size in (3, 40, 4))
    pairs = data.draw(st.integers(1, 20))
    features = 2 * pairs + data.draw(st.integers(0, 5))
    sizes = {"b": batch, "s": length, "t": length, "h": heads, "d": features}
    x = torch.randn([sizes[axis] for axis in layout]).to(data.draw(st.sampled_from(DTYPES)))
    if data.draw(st.booleans()):  # axes that lie in memory in another order
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
    table = data.draw(st.sampled_from(["full", "half"]))
    rows = length + data.draw(st.integers(0, 3))
    angles = 6.28 * torch.rand(rows, pairs if table == "half" else 2 * pairs)
    tables = torch.stack((angles.cos(), angles.sin())).to(data.draw(st.sampled_from(DTYPES)))
    arguments: dict[str, Any] = {"x": x, "cos": tables[0], "sin": tables[1], "layout": layout, "table": table}
    if data.draw(st.booleans()):
        arguments["positions"] = torch.randint(rows, (length,))
    elif layout != "thd" and data.draw(st.booleans()):
        arguments |= {"cos": tables[:1].expand(batch, -1, -1), "sin": tables[1:].repeat(batch, 1, 1)}
    arguments["pairs"] = data.draw(st.sampled_from(["half", "interleaved", "interleaved_to_half"]))
    arguments |= {"compute": data.draw(st.sampled_from(["float32", "x"])), "inverse": data.draw(st.booleans())}
    check("rope", **arguments)


@EXAMPLES
@given(data=st.data())
def test_losses_of_any_shape_and_options(data: st.DataObject) -> None:
    """Losses, and what a shard gives to one, are right for any shape, stride and option."""
    rows, classes = data.draw(st.integers(0, 9)), data.draw(st.integers(4, 40))
    logits = torch.randn(classes, rows).t() if data.draw(st.booleans()) else torch.randn(rows, classes)
    logits = logits.to(data.draw(st.sampled_from(DTYPES)))
    target = torch.randint(classes, (rows,), dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    scale = {"logit_scale": data.draw(st.sampled_from([1.0, 0.5]))}
    scale["logit_softcap"] = data.draw(st.sampled_from([None, 2.0]))
    total = data.draw(st.booleans())
    check("softmax_partials", logits=logits, target=target, start=classes // 2, with_total=total, **scale)
    options: dict[str, Any] = {"reduction": data.draw(st.sampled_from(["none", "sum", "mean"]))} | scale
    options["label_smoothing"] = data.draw(st.sampled_from([0.0, 0.2]))
    options["z_loss"] = data.draw(st.sampled_from([0.0, 0.1]))
    if data.draw(st.booleans()):
        options["class_weight"] = torch.rand(classes).to(data.draw(st.sampled_from(DTYPES))) + 0.5
    target[: rows // 2] = -100
    check("cross_entropy", logits=logits, target=target, **options)


@EXAMPLES
@given(data=st.data())
def test_softmax_of_any_mask(data: st.DataObject) -> None:
    """The softmax of scores is right for any shape, mask, window and sinks."""
    sizes = [data.draw(st.integers(1, size)) for size in (2, 3, 9, 40)]
    x = torch.randn(sizes).to(data.draw(st.sampled_from(DTYPES)))
    arguments: dict[str, Any] = {"x": x, "scale": 0.5, "causal": data.draw(st.booleans())}
    if data.draw(st.booleans()):
        shape = [size if data.draw(st.booleans()) else 1 for size in sizes]
        arguments["mask"] = torch.rand(shape) < 0.4
    if data.draw(st.booleans()):
        arguments["sinks"] = torch.randn(sizes[1])
    arguments["window"] = data.draw(st.sampled_from([None, (2, 1), (-1, 3), (0, -1)]))
    check("scaled_masked_softmax", **arguments)
