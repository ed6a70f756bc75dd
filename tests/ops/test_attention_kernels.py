"""Attention kernels that run on any device: torch's own, and the one in blocks, against the reference."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from llm_adapt.ops.attention import attention
from llm_adapt.ops.attention_parts import blocks, request
from llm_adapt.ops.attention_parts.sdpa import sdpa
from llm_adapt.ops.attention_parts.tolerances import ATTENTION
from llm_adapt.ops.dispatch.choice import refusal
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, find_op, load_library
from tests.ops.attention_loop import drawn, gradients
from tests.ops.cases import Case, cases

OP = find_op("attention")
CASES = [case for case in cases() if case.op is OP]


def kernel_of(library: str) -> Kernel:
    """The attention kernel of a library."""
    assert load_library(library) == ""
    return OP.kernels[library]


@pytest.fixture(params=[2**20, 64], ids=["one_block", "many_blocks"])
def block_size(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks as they are, and of two queries."""
    monkeypatch.setattr(blocks, "_MOST_SCORES", request.param)
    if request.param < 1000:
        monkeypatch.setattr(blocks, "_LEAST_ROWS", 2)


@pytest.mark.usefixtures("block_size")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_honour_every_argument(case: Case) -> None:
    """The kernel in blocks serves every call of the op's inputs, dropout and log-sum-exp too, and is right."""
    kernel = kernel_of("chunked")
    assert refusal(OP, kernel, case.call) == ""
    verdict = prove(OP, kernel, case.arguments)
    assert verdict.holds, verdict.reason


@st.composite
def calls(draw: Any) -> dict[str, Any]:
    """Dense and packed calls with masks by place, padding and unequal lengths."""
    number = draw(st.integers(1, 3))
    found: dict[str, Any] = {
        "causal": draw(st.sampled_from(["none", "top_left", "bottom_right"])),
        "window_left": draw(st.integers(-1, 4)),
        "window_right": draw(st.integers(-1, 3)),
        "dropout_p": draw(st.sampled_from([0.0, 0.3])),
        "seed": draw(st.integers(0, 9)),
    }
    if draw(st.booleans()):
        lengths = [draw(st.integers(0, 9)) for _ in range(2)]
        shape: tuple[tuple[int, ...], ...] = ((number, lengths[0]), (number, lengths[1]))
        room = [[n] * number for n in lengths]
    else:
        room = [[draw(st.integers(0, 6)) for _ in range(number)] for _ in range(2)]
        padding = draw(st.integers(0, 2))
        shape = ((sum(room[0]) + padding,), (sum(room[1]) + padding,))
        ends = [torch.tensor([0, *sizes]).cumsum(0).to(torch.int32) for sizes in room]
        found |= {"layout": "thd", "cu_seqlens_q": ends[0], "cu_seqlens_k": ends[1]}
    for name, sizes in zip(("seqused_q", "seqused_k"), room, strict=True):
        if draw(st.booleans()):
            found[name] = torch.tensor([draw(st.integers(0, n)) for n in sizes], dtype=torch.int32)
    found |= {"q": drawn(1, *shape[0], 2, 4), "k": drawn(2, *shape[1], 1, 4), "v": drawn(3, *shape[1], 1, 4)}
    return found


@given(call=calls(), rows=st.integers(1, 4))
def test_keys_are_left_out_only_where_no_query_of_a_block_sees_them(call: dict[str, Any], rows: int) -> None:
    """In blocks of any size the result, the log-sum-exp and the gradients are the reference's."""
    leaves = [call[name].requires_grad_() for name in "qkv"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "_MOST_SCORES", 1)
        patch.setattr(blocks, "_LEAST_ROWS", rows)
        found = kernel_of("chunked").function(**call, return_lse=True)
        found_gradients = gradients(found[0], *leaves)
    expected = OP.reference(**call, return_lse=True)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradients, gradients(expected[0], *leaves))


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that was made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = function(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(found) if isinstance(x, torch.Tensor)
        ]
        self.numel = max([self.numel, *sizes])
        return found


def test_memory_grows_with_the_length_not_with_its_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither forward nor backward of the kernel in blocks makes a tensor larger than a block or the inputs."""
    monkeypatch.setattr(blocks, "_MOST_SCORES", 2**14)
    q, k, v = (drawn(n, 1, 512, 2, 8, dtype=torch.float32).requires_grad_() for n in (1, 2, 3))
    sizes = {}
    for name, function in (("blocks", kernel_of("chunked").function), ("reference", OP.reference)):
        with Largest() as largest:
            function(q, k, v, causal="bottom_right", sinks=torch.zeros(2)).sum().backward()
        sizes[name] = largest.numel
    assert sizes["reference"] >= 2 * 512 * 512
    assert sizes["blocks"] <= 2 * 16 * 512  # two heads, 16 queries


def test_causal_blocks_read_half_of_the_keys_and_windows_a_strip() -> None:
    """Blocks leave out the keys after their last query, and those before the window of their first."""
    zeros = torch.zeros(1, 64, 1, 4)
    sequences, biases = request.Sequences(*(None,) * 4), request.Biases(*(None,) * 3)
    options = request.Options("bshd", "bottom_right", 4, -1, None, 0.0, 0.0, 0)
    call = request.Request(zeros, zeros, zeros, sequences, biases, options)
    found = [(b.rows.start, b.rows.stop, b.columns.start, b.columns.stop) for b in blocks._blocks(call, 2**20)]
    assert found == [(0, 16, 0, 16), (16, 32, 12, 32), (32, 48, 28, 48), (48, 64, 44, 64)]


@given(st.data())
def test_torchs_kernel_gives_zero_where_a_query_sees_no_key(data: Any) -> None:
    """Masks with empty rows, windows beside the keys, more queries than keys: output and gradients as the reference."""
    rows, columns = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    leaves = [drawn(1, 2, rows, 2, 4), drawn(2, 2, columns, 1, 4), drawn(3, 2, columns, 1, 4)]
    options: dict[str, Any] = {
        "causal": data.draw(st.sampled_from(["none", "top_left", "bottom_right"])),
        "window_left": data.draw(st.integers(-1, 2)),
        "window_right": data.draw(st.integers(-1, 2)),
    }
    kind = data.draw(st.sampled_from(["none", "bool", "added", "by_key"]))
    if kind != "none":
        number = drawn(data.draw(st.integers(0, 50)), 2, 1, 1 if kind == "by_key" else rows, columns)
        options["mask"] = number.masked_fill(number < 0.3, -math.inf) if kind == "added" else number > 0.3
    for leaf in leaves:
        leaf.requires_grad_()
    found = kernel_of("torch_native").function(*leaves, **options)
    expected = attention(*leaves, **options)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(gradients(found, *leaves), gradients(expected, *leaves))


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"softcap": 1.0}, "does not honour softcap"),
    ({"sinks": torch.zeros(2)}, "does not honour sinks"),
    ({"alibi_slopes": torch.zeros(2)}, "does not honour alibi_slopes"),
    ({"dropout_p": 0.1}, "does not honour dropout_p"),
    ({"return_lse": True}, "does not honour return_lse"),
    ({"seqused_k": torch.tensor([1])}, "does not honour seqused_k"),
    ({"layout": "thd"}, "packed sequences"),
    ({"mask": torch.zeros(4, 4)}, "would round the torch.float32 mask"),
]


@pytest.mark.parametrize(("extra", "words"), REFUSALS, ids=lambda x: str(x)[:30])
def test_torchs_kernel_refuses_what_it_cannot_compute(extra: dict[str, Any], words: str) -> None:
    """Each argument that scaled_dot_product_attention has no place for is refused with the reason."""
    q = torch.zeros(1, 4, 2, 8, dtype=torch.bfloat16)
    call = Case(OP, 0, q.dtype, OP.bind(**({"q": q, "k": q, "v": q} | extra))).call
    assert words in refusal(OP, kernel_of("torch_native"), call)


def test_seeds_and_lengths_on_the_host_do_not_keep_torchs_kernel_away() -> None:
    """Numbers without effect on a call without dropout do not make it ineligible."""
    q = torch.zeros(1, 4, 2, 8)
    call = Case(OP, 0, q.dtype, OP.bind(q, q, q, seed=3, max_seqlen_q=4, max_seqlen_k=4, deterministic=True)).call
    assert refusal(OP, kernel_of("torch_native"), call) == ""


def test_gradients_of_many_16_bit_queries_add_up_in_float32() -> None:
    """Beyond 2048 queries torch's kernel for the CPU would lose gradients of key and value; they keep the tolerance."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dy = (torch.randn(1, 4096, heads, 16, generator=generator).bfloat16() for heads in (4, 1, 1, 4))
    found = {}
    for dtype in (torch.bfloat16, torch.float64):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        y = sdpa(*leaves, None, "bshd", "top_left", -1, -1, None)
        found[dtype] = torch.autograd.grad(y, leaves, dy.to(dtype))
    rtol = ATTENTION.rtol(torch.bfloat16)  # of the output: a quarter of what gradients may have
    for ours, exact in zip(found[torch.bfloat16], found[torch.float64], strict=True):
        allowed = rtol * (exact.abs() + exact.square().mean().sqrt())
        assert bool(((ours.double() - exact).abs() <= allowed).all())
