"""Grouped products, on the simulated NPU: torch_npu's own npu_grouped_matmul against loops over the groups.

M rows by expert, E experts, K and N columns.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, HALVES, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

M, K, N = 12, 16, 9
COUNTS = [4, 0, 3, 2]  # three rows belong to nobody
E, USED = len(COUNTS), sum(COUNTS)


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _random(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def _whole(*shape: int) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.int8)


def _groups() -> list[slice]:
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    return [slice(end - count, end) for end, count in zip(ends, COUNTS, strict=True)]


def _list(kind: int) -> torch.Tensor:
    counts = torch.tensor(COUNTS)
    return (counts if kind == 1 else counts.cumsum(0)).npu()


def _product(x: Any, weight: Any, **given: Any) -> torch.Tensor:
    """npu_grouped_matmul over rows with counts, unless another is asked."""
    given = {"group_list": _list(1), "group_list_type": 1, "split_item": 2, "group_type": 0, **given}
    weights = weight if isinstance(weight, list) else [weight]
    found: torch.Tensor = _npu().npu_grouped_matmul([x], weights, **given)[0]
    return found


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("kind", [0, 1])
@pytest.mark.parametrize("form", ["one", "transposed", "several"])
def test_over_rows(dtype: torch.dtype, kind: int, form: str) -> None:
    """group_type 0: each expert's rows by its weight, one tensor or several, cumulative list or counts."""
    x, weight = _random(M, K, dtype=dtype), _random(E, K, N, dtype=dtype)
    on_npu: Any = weight.npu()
    if form == "transposed":
        on_npu = weight.transpose(1, 2).contiguous().npu().transpose(1, 2)
    if form == "several":
        on_npu = list(on_npu)
    y = _product(x.npu(), on_npu, group_list=_list(kind), group_list_type=kind)
    close(y[:USED], torch.cat([x[rows].double() @ weight[e].double() for e, rows in enumerate(_groups())]))
    assert y[USED:].isnan().all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_bias(dtype: torch.dtype) -> None:
    """bias [E, N] is added; with bfloat16 it is float32."""
    x, weight = _random(M, K, dtype=dtype), _random(E, K, N, dtype=dtype)
    bias = _random(E, N, dtype=torch.float32 if dtype == torch.bfloat16 else dtype)
    y = _product(x.npu(), weight.npu(), bias=[bias.npu()])
    expected = [x[rows].double() @ weight[e].double() + bias[e].double() for e, rows in enumerate(_groups())]
    close(y[:USED], torch.cat(expected))


@pytest.mark.parametrize("dtype", FLOATS)
def test_over_the_inner_axis(dtype: torch.dtype) -> None:
    """group_type 2: x as a transposed view, one product for each expert; of no rows nothing is written."""
    x, dy = _random(M, K, dtype=dtype), _random(M, N, dtype=dtype)
    dw = _product(x.npu().t(), dy.npu(), split_item=3, group_type=2)
    assert dw.shape == (E, K, N)
    for e, rows in enumerate(_groups()):
        if COUNTS[e]:
            close(dw[e], x[rows].double().t() @ dy[rows].double())
        else:
            assert dw[e].isnan().all()


def test_several_x() -> None:
    """group_type -1: each x by its weight, also of more axes; group_type 0 of several x: one result."""
    sizes = [4, 1, 3]
    xs, ws = [_random(size, K) for size in sizes], [_random(K, N) * size for size in sizes]
    expected = [x.double() @ w.double() for x, w in zip(xs, ws, strict=True)]
    on_npu = [x.npu() for x in xs], [w.npu() for w in ws]
    for found, value in zip(_npu().npu_grouped_matmul(*on_npu, split_item=0, group_type=-1), expected, strict=True):
        close(found, value)
    lifted = [x[None] for x in on_npu[0]], on_npu[1]
    for found, value in zip(_npu().npu_grouped_matmul(*lifted, split_item=0, group_type=-1), expected, strict=True):
        close(found[0], value)
    close(_npu().npu_grouped_matmul(*on_npu, split_item=2, group_type=0)[0], torch.cat(expected))


@pytest.mark.parametrize("split_item", [0, 2])
def test_ends_on_the_host(split_item: int) -> None:
    """The overload with a list of ints: one x by several weights, into several results or one."""
    x, weight = _random(USED, K), _random(E, K, N)
    ends = torch.tensor(COUNTS).cumsum(0).tolist()
    found = _npu().npu_grouped_matmul([x.npu()], list(weight.npu()), group_list=ends, split_item=split_item)
    expected = [x[rows].double() @ weight[e].double() for e, rows in enumerate(_groups())]
    assert len(found) == (E if split_item == 0 else 1)
    close(torch.cat(found), torch.cat(expected))


@pytest.mark.parametrize("act_type", [0, 1, 2, 4, 5])
@pytest.mark.parametrize("dtype", HALVES)
def test_int8(act_type: int, dtype: torch.dtype) -> None:
    """int8 by int8 with a scale of columns and of tokens, an int32 bias under the scales, then the activation."""
    x, weight = _whole(M, K), _whole(E, K, N)
    scale, tokens = torch.rand(E, N) / 1e3, torch.rand(M)
    bias = torch.arange(E * N, dtype=torch.int32).reshape(E, N)
    y = _product(
        x.npu(), weight.npu(), scale=[scale.npu()], per_token_scale=[tokens.npu()], bias=[bias.npu()],
        act_type=act_type, output_dtype=dtype,
    )  # fmt: skip
    sums = [
        (x[rows].double() @ weight[e].double() + bias[e]) * scale[e] * tokens[rows, None]
        for e, rows in enumerate(_groups())
    ]
    z = torch.cat(sums).double()
    activation = {
        0: z,
        1: z.clamp(min=0),
        2: 0.5 * z * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (z + 0.044715 * z**3))),
        4: z / (1 + torch.exp(-1.702 * z)),
        5: z / (1 + torch.exp(-z)),
    }
    close(y[:USED], activation[act_type])


def test_int8_into_integers() -> None:
    """A packed scale gives int8, rounded and kept within its range; no scale gives the int32 sums."""
    x, weight = _whole(M, K), _whole(E, K, N)
    sums = torch.cat([x[rows].double() @ weight[e].double() for e, rows in enumerate(_groups())])
    packed = _npu().npu_trans_quant_param(torch.full((E, N), 2.0**-8).npu())
    y = _product(x.npu(), weight.npu(), scale=[packed])
    assert torch.equal(y[:USED].cpu(), (sums / 256).round().clamp(-128, 127).to(torch.int8))
    whole = _product(x.npu(), weight.npu(), output_dtype=torch.int32)
    assert torch.equal(whole[:USED].cpu(), sums.int())


@pytest.mark.parametrize("dtype", HALVES)
def test_int8_weight(dtype: torch.dtype) -> None:
    """float by int8: x @ ((weight + offset) * scale)."""
    x, weight = _random(M, K, dtype=dtype), _whole(E, K, N)
    scale, offset = _random(E, N, dtype=dtype), _random(E, N, dtype=dtype)
    y = _product(x.npu(), weight.npu(), antiquant_scale=[scale.npu()], antiquant_offset=[offset.npu()])
    real = (weight.double() + offset.double()[:, None]) * scale.double()[:, None]
    close(y[:USED], torch.cat([x[rows].double() @ real[e] for e, rows in enumerate(_groups())]))


def test_there_is_no_gradient() -> None:
    """npu_grouped_matmul has no derivative: a backward leaves the parameters without gradients."""
    weight = _random(E, K, N).npu().requires_grad_()
    y = _product(_random(M, K).npu(), weight)
    assert y.requires_grad
    y[:USED].sum().backward()
    assert weight.grad is None


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(E, K, N), (E * K, N)])
def test_add(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """npu_grouped_matmul_add_ adds x' dy of each expert to float32, and leaves those without rows."""
    x, dy, before = _random(M, K, dtype=dtype), _random(M, N, dtype=dtype), _random(E * K, N).reshape(shape)
    total = before.npu()
    _npu().npu_grouped_matmul_add_(total, x.npu(), dy.npu(), _list(0))
    products = torch.stack([x[rows].double().t() @ dy[rows].double() for rows in _groups()])
    close(total, before.double() + products.reshape(shape))
    assert torch.equal(total.reshape(E, K, N)[1].cpu(), before.reshape(E, K, N)[1])


def test_add_takes_counts_for_ends() -> None:
    """Off Ascend950 op-plugin drops group_list_type on the way: counts are read as ends, without a word."""
    x, dy, total = _random(3, K).half(), _random(3, N).half(), torch.zeros(2, K, N).npu()
    _npu().npu_grouped_matmul_add_(total, x.npu(), dy.npu(), torch.tensor([1, 2]).npu(), group_list_type=1)
    close(total[1], x[1:2].double().t() @ dy[1:2].double())


_X, _W = torch.zeros(M, K), torch.zeros(E, K, N)


@pytest.mark.parametrize(
    ("x", "weight", "given", "text"),
    [
        (_X, _W.half(), {}, "does not go with weight of Half"),
        (_X.int(), _W.int(), {}, "weight of Int is not modelled"),
        (_X, _W, {"group_list": torch.tensor(COUNTS).int()}, "group_list must be Long"),
        (_X, _W, {"group_list": torch.tensor(COUNTS[:3])}, "group_list must have one number for each of 4"),
        (_X, _W, {"group_list_type": 2}, "group_list_type 2 is not modelled"),
        (_X, _W, {"split_item": 0, "group_list": torch.tensor([4, 4, 7, 9])}, "split_item must be 2 or 3"),
        (_X, _W, {"act_type": 1}, "act_type is supported with per_token_scale alone"),
        (_X, _W, {"act_type": 3}, "act_type must be 0, 1, 2, 4 or 5"),
        (
            _X.bfloat16(),
            _W.bfloat16(),
            {"bias": [torch.zeros(E, N).bfloat16()]},
            "bias must be Float with x of BFloat16",
        ),
        (torch.zeros(2, 65536), torch.zeros(E, 65536, 1), {}, "the inner axis must be below 65536"),
        (_X.half(), torch.zeros(E, K, N).char(), {}, "needs antiquant_scale"),
        (torch.zeros(M, K).t().contiguous().t(), _W, {}, "x must not be a transposed view"),
    ],
)
def test_refuses(x: torch.Tensor, weight: torch.Tensor, given: dict[str, Any], text: str) -> None:
    """Each documented limit of npu_grouped_matmul over rows."""
    on_npu = {name: value.npu() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    if "bias" in given:
        on_npu["bias"] = [one.npu() for one in given["bias"]]
    strided = x.t().npu().t() if x.stride(0) == 1 else x.npu()
    with refuses(text):
        _product(strided, weight.npu(), **on_npu)


def test_refuses_over_the_inner_axis() -> None:
    """group_type 2 takes x as a transposed view, weight not as one, and no bias."""
    x, dy = torch.zeros(M, K).npu(), torch.zeros(M, N).npu()
    given = {"split_item": 3, "group_type": 2}
    with refuses("takes x as a transposed view"):
        _product(x.t().contiguous(), dy, **given)
    with refuses("does not take weight as a transposed view"):
        _product(x.t(), dy.t().contiguous().t(), **given)
    with refuses("bias must be absent"):
        _product(x.t(), dy, bias=[torch.zeros(N).npu()], **given)


def test_refuses_long_lists() -> None:
    """At most 128 tensors of x and weight."""
    many = [torch.zeros(1, 8).npu()] * 129
    with refuses("x must have 1 to 128 tensors, not 129"):
        _npu().npu_grouped_matmul(many, [torch.zeros(8, 8).npu()] * 129, split_item=0, group_type=-1)


def test_add_refuses() -> None:
    """npu_grouped_matmul_add_ takes 16-bit x and dy, a float32 total, and x alone transposed."""
    x, dy, total, ends = torch.zeros(M, K).npu(), torch.zeros(M, N).npu(), torch.zeros(E, K, N).npu(), _list(0)
    with refuses("x must be Half, BFloat16"):
        _npu().npu_grouped_matmul_add_(total, x, dy, ends)
    with refuses("weight must have the dtype of x"):
        _npu().npu_grouped_matmul_add_(total, x.half(), dy.bfloat16(), ends)
    with refuses("input must be Float"):
        _npu().npu_grouped_matmul_add_(total.half(), x.half(), dy.half(), ends)
    with refuses("transpose_x must be True and transpose_weight False"):
        _npu().npu_grouped_matmul_add_(total, x.half(), dy.half(), ends, transpose_x=False)
    with refuses("group_type must be 2"):
        _npu().npu_grouped_matmul_add_(total, x.half(), dy.half(), ends, group_type=0)


_VALUES = """
def product(groups, dtype=torch.float16):
    x, w = torch.ones(4, 8).to(dtype).npu(), torch.ones(2, 8, 16).to(dtype).npu()
    return torch_npu.npu_grouped_matmul([x], [w], group_list=torch.tensor(groups).npu(), split_item=2, group_type=0)
outcome(lambda: product([2, 1]))
outcome(lambda: product([2, 5]))
outcome(lambda: product([2, 4]))
outcome(lambda: product([2, 4], torch.float32))
"""


def _said(model: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("TASK_QUEUE_ENABLE", "0")  # with the queue torch_npu runs nothing after the first such error
    return [line[:7] for line in said_on(model, _VALUES).splitlines() if line.startswith(("done", "refused"))]


def test_refuses_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """A list that decreases or goes beyond the rows is refused where the kernel runs."""
    assert _said("Ascend910B3", monkeypatch) == ["refused", "refused", "done", "done"]


def test_the_310p_takes_float16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the 310P npu_grouped_matmul is documented for float16."""
    assert _said("Ascend310P3", monkeypatch) == ["refused", "refused", "done", "refused"]


def test_a1_has_no_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """npu_grouped_matmul is documented for A2, A3, 310P and Ascend950."""
    assert _said("Ascend910A", monkeypatch) == ["refused"] * 4
