"""Our kernels of torch_npu against the fake of it. Nothing here ran on an NPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.registry import all_ops
from tests.contracts.fake_npu import FUNCTIONS, fake_npu
from tests.contracts.kernels import cases_of, served, why_not
from tests.contracts.recording import FakeVendor, contracts, fake_vendor
from tests.ops.cases import Case

with fake_npu():
    OPS = [name for name, op in all_ops().items() if "torch_npu" in op.kernels]


@pytest.fixture(scope="module")
def npu() -> Iterator[FakeVendor]:
    """The fake, with our kernels loaded against it."""
    with fake_npu() as vendor:
        yield vendor


@pytest.mark.parametrize("case", cases_of(OPS), ids=str)
def test_a_kernel_refuses_or_is_right(npu: FakeVendor, case: Case) -> None:
    """A kernel gives the reference's results and gradients, or a reason why it does not serve."""
    if not served(case.op.kernels["torch_npu"], case):
        assert why_not(case.op.kernels["torch_npu"], case) != ""


@pytest.mark.parametrize("name", OPS)
def test_a_kernel_serves_something(npu: FakeVendor, name: str) -> None:
    """No kernel refuses all of its op's inputs."""
    kernel = all_ops()[name].kernels["torch_npu"]
    assert any(why_not(kernel, case) == "" for case in cases_of([name]))


def call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Our kernel of an op, called as the op would be."""
    kernel = all_ops()[op].kernels["torch_npu"]
    bound = all_ops()[op].bind(*args, **kwargs)
    return kernel.function(**{name: value for name, value in bound.items() if name in kernel.honours})


def refused(op: str, *args: Any, **kwargs: Any) -> str:
    """Why our kernel refuses a call."""
    arguments = all_ops()[op].bind(*args, **kwargs)
    return why_not(all_ops()[op].kernels["torch_npu"], Case(all_ops()[op], 0, torch.float32, arguments))


def three(rows: int = 5, columns: int = 5, size: int = 16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k, v of two heads."""
    return torch.randn(1, rows, 2, size), torch.randn(1, columns, 2, size), torch.randn(1, columns, 2, size)


@pytest.mark.parametrize(
    ("options", "mode"),
    [
        ({"causal": "top_left"}, 2),
        ({"causal": "bottom_right"}, 3),
        ({"causal": "bottom_right", "window_left": 2}, 4),
        ({"window_left": 2, "window_right": 1}, 4),
    ],
)
def test_causal_and_windows_bring_the_compressed_mask(npu: FakeVendor, options: Any, mode: int) -> None:
    """Without a mask torch_npu would ignore the mode, so it is always there, one for each device."""
    call("attention", *three(), **options)
    given = npu.last("npu_fusion_attention")
    assert given["sparse_mode"] == mode
    assert torch.equal(given["atten_mask"], torch.ones(2048, 2048, dtype=torch.bool).triu(1))
    first = given["atten_mask"]
    call("attention", *three(7, 9), **options)
    assert npu.last("npu_fusion_attention")["atten_mask"] is first


def test_the_scale_is_that_of_the_head_size_before_padding(npu: FakeVendor) -> None:
    """A head size of 20 is padded to 32; the scale, always given, is 1 / sqrt(20)."""
    call("attention", *three(size=20))
    given = npu.last("npu_fusion_attention")
    assert (given["query"].shape[-1], given["scale"]) == (32, 20**-0.5)
    call("attention", *three(size=20), scale=0.7)
    assert npu.last("npu_fusion_attention")["scale"] == 0.7


def test_lengths_are_read_once_for_each_version(npu: FakeVendor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The list of cumulative lengths is read from the device once, and again when the tensor was written to."""
    reads: list[int] = []
    original = torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: reads.append(1) or original(self))
    q, k, v = (x[0] for x in three(6, 6))
    ends = torch.tensor([0, 2, 6], dtype=torch.int32)
    for _ in range(3):
        call("attention", q, k, v, ends, ends, layout="thd", causal="bottom_right")
    assert len(reads) == 1
    assert npu.last("npu_fusion_attention")["actual_seq_qlen"] == [2, 6]
    ends[1] = 5
    call("attention", q, k, v, ends, ends, layout="thd", causal="bottom_right")
    assert (len(reads), npu.last("npu_fusion_attention")["actual_seq_qlen"]) == (2, [5, 6])


def test_a_bias_is_added_after_the_scale(npu: FakeVendor) -> None:
    """An additive mask goes to the second version with pse_type 0; the first would multiply it by the scale."""
    call("attention", *three(), mask=torch.randn(5, 5))
    given = npu.last("npu_fusion_attention_v2")
    assert (given["pse_type"], given["inner_precise"], given["sparse_mode"]) == (0, 2, 1)


def test_true_keeps_for_the_op_and_hides_for_the_vendor(npu: FakeVendor) -> None:
    """A boolean mask is inverted, and rows that it masks whole are asked to be zero."""
    keep = torch.rand(5, 5) > 0.5
    keep[2] = False
    out = call("attention", *three(), mask=keep)
    given = npu.last("npu_fusion_attention")
    assert torch.equal(given["atten_mask"][0, 0], ~keep)
    assert given["inner_precise"] == 2
    assert out[:, 2].count_nonzero() == 0


def test_float32_tables_are_not_rounded(npu: FakeVendor) -> None:
    """16-bit x with float32 tables is computed in float32, unless the op's option asks for the dtype of x."""
    x, table = torch.randn(1, 4, 2, 8, dtype=torch.bfloat16), torch.randn(4, 8)
    call("rope", x, table, table)
    assert npu.last("npu_rotary_mul")["input"].dtype == torch.float32
    call("rope", x, table, table, compute="x")
    assert npu.last("npu_rotary_mul")["input"].dtype == torch.bfloat16


def test_the_optimizer_refuses_what_its_kernel_ignores(npu: FakeVendor) -> None:
    """torch._fused_adamw_ on an NPU ignores grad_scale and found_inf without a word."""
    lists = [[torch.ones(3)] for _ in range(4)]
    steps = [torch.tensor(1.0)]
    assert refused("adamw", *lists, state_steps=steps, grad_scale=torch.ones(1)) == "does not honour grad_scale"
    assert refused("adamw", *lists, state_steps=steps, found_inf=torch.ones(1)) == "does not honour found_inf"
    assert refused("adamw", *lists, state_steps=steps) == ""


def test_permutation_wants_the_word_that_tokens_have_the_same_experts(npu: FakeVendor) -> None:
    """torch_npu permutes tokens with the same number of experts each; all else is refused, and a wrong word raises."""
    x, chosen, rows = torch.randn(4, 8), torch.eye(4, dtype=torch.bool), torch.arange(4)
    for op, arguments in (("moe_permute", (x, chosen, 4)), ("moe_unpermute", (x, rows, 4))):
        assert refused(op, *arguments, topk=1) == ""
        assert "give topk" in refused(op, *arguments)
        assert "1 to 51" in refused(op, *arguments, topk=513)
        assert "does not honour drop_and_pad" in refused(op, *arguments, drop_and_pad=True)
        with pytest.raises(ValueError, match="does not go with 4 rows"):
            call(op, *arguments, topk=2)
    assert "takes probs of the dtype" in refused("moe_permute", x.half(), chosen, 4, probs=torch.ones(4, 4), topk=1)
    assert "together" in refused("moe_unpermute", x, rows, 4, probs=torch.ones(4, 4), topk=1)
    wide = torch.ones(1, 1, dtype=torch.bool).expand(1, 16777215)
    assert "fewer than" in refused("moe_permute", x[:1], wide, 1, topk=1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"softcap": 2.0}, "does not honour softcap"),
        ({"dropout_p": 0.1}, "does not honour dropout_p"),
        ({"deterministic": True}, "does not honour deterministic"),
        ({"seqused_k": torch.ones(1).int()}, "does not honour seqused_k"),
        ({"mask": torch.ones(5, 5, dtype=torch.bfloat16)}, "takes an additive mask of the dtype of q"),
        ({"mask": torch.ones(5, 5).requires_grad_()}, "gives no gradient of mask, which the reference does"),
        ({"mask": torch.ones(5, 5), "return_lse": True}, "gives the log-sum-exp without mask, ALiBi and sinks"),
    ],
)
def test_attention_refuses_with_a_reason(npu: FakeVendor, options: Any, reason: str) -> None:
    """What the kernel cannot do is refused, never left out."""
    assert refused("attention", *three(), **options) == reason


def test_an_older_torch_npu_refuses(npu: FakeVendor) -> None:
    """A function that the installed torch_npu lacks is named in the reason."""
    functions = {name: function for name, function in FUNCTIONS.items() if name != "npu_add_rms_norm"}
    x = torch.randn(2, 8)
    with fake_vendor("torch_npu", {"torch_npu": functions}, contracts("npu")):
        assert refused("add_rms_norm", x, x, x[0]) == "the torch_npu installed has no npu_add_rms_norm"
        assert refused("rms_norm", x, x[0]) == ""
