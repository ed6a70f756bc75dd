"""Rotary embedding: what it computes in every layout, dtype and option, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llm_adapt.ops.rope import _shrink, rope
from tests.ops.rope_checks import LAYOUTS, PAIRS, drawn, full_width, tables_of, with_gradient


def test_padding_after_the_last_sequence_uses_the_first_row() -> None:
    """Tokens of no sequence, before the first or after the last, are as at position 0, however many there are."""
    cos, sin = tables_of(4, 4)
    x = drawn(12, 2, 8)
    found = rope(x, cos, sin, cu_seqlens=torch.tensor([2, 4, 6]), layout="thd", table="half")
    rows = torch.tensor([0, 0, 0, 1, 0, 1, *[0] * 6])
    assert torch.equal(found, rope(x, cos[rows], sin[rows], layout="thd", table="half"))


@given(
    st.sampled_from(list(LAYOUTS)),
    st.sampled_from(PAIRS),
    st.sampled_from(["full", "half"]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["float32", "x"]),
    st.booleans(),
    st.tuples(st.integers(0, 3), st.integers(0, 9), st.integers(0, 3), st.integers(0, 9), st.integers(0, 4)),
    st.integers(0, 1000),
)
def test_it_is_multiplication_by_complex_numbers(
    layout: str,
    pairs: str,
    table: str,
    dtype: torch.dtype,
    compute: str,
    inverse: bool,
    sizes: tuple[int, int, int, int, int],
    seed: int,
) -> None:
    """In every layout, form, dtype, size and stride: (x_i + i x_j) exp(i angle), computed with complex numbers."""
    batch, length, heads, rotated, passed = sizes
    x = drawn(batch, length, heads, 2 * rotated + passed, dtype=dtype, seed=seed)
    cos, sin = tables_of(length, rotated, dtype=torch.float64)
    first, second = pairs.partition("_to_")[0], pairs.partition("_to_")[2] or pairs
    read, write = (second, first) if inverse else (first, second)
    wide = x.double()[..., : 2 * rotated]
    i, j = (wide[..., 0::2], wide[..., 1::2]) if read == "interleaved" else (wide[..., :rotated], wide[..., rotated:])
    turned = torch.complex(i, j) * torch.complex(cos, -sin if inverse else sin)[:, None]
    parts = torch.view_as_real(turned)
    expected = torch.cat(
        ((parts if write == "interleaved" else parts.mT).flatten(-2), x.double()[..., 2 * rotated :]), -1
    )

    tables = (cos, sin) if table == "half" else (full_width(cos, pairs), full_width(sin, pairs))
    moved = x.permute(LAYOUTS[layout])  # strided, as a transpose before the call leaves it
    options = {"layout": layout, "pairs": pairs, "table": table, "compute": compute, "inverse": inverse}
    found = rope(moved, *(t.to(torch.float32 if dtype != torch.float64 else dtype) for t in tables), **options)
    assert found.dtype == dtype
    assert found.shape == moved.shape
    backward = sorted(range(4), key=LAYOUTS[layout].__getitem__)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found.permute(backward).double(), expected, rtol=4 * eps, atol=16 * eps)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("table", ["full", "half"])
def test_the_inverse_undoes_it_and_is_its_gradient(pairs: str, table: str) -> None:
    """inverse=True gives x back, and the gradient of y is the inverse of the upstream gradient."""
    x, (cos, sin) = drawn(2, 7, 3, 20).double(), tables_of(7, 8, dtype=torch.float64)
    if table == "full":
        cos, sin = full_width(cos, pairs), full_width(sin, pairs)
    options = {"pairs": pairs, "table": table}
    y, gradient = with_gradient(rope, x, cos, sin, **options)
    torch.testing.assert_close(rope(y, cos, sin, inverse=True, **options), x)
    upstream = drawn(*y.shape, dtype=y.dtype, seed=9)
    torch.testing.assert_close(rope(upstream, cos, sin, inverse=True, **options), gradient)


def test_scores_depend_on_distance_alone() -> None:
    """q at position m and k at position n have a product that depends on m - n (RoFormer, equation 16)."""
    q, k = drawn(1, 1, 1, 16).double(), drawn(1, 1, 1, 16, seed=1).double()
    cos, sin = tables_of(40, 8, dtype=torch.float64)

    def score(m: int, n: int) -> torch.Tensor:
        at = [torch.tensor([m]), torch.tensor([n])]
        return (rope(q, cos, sin, at[0], table="half") * rope(k, cos, sin, at[1], table="half")).sum()

    torch.testing.assert_close(score(12, 5), score(33, 26))
    assert score(12, 5) != score(12, 6)


@pytest.mark.parametrize("layout", [*LAYOUTS, "thd"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
@pytest.mark.parametrize("has_batch", [True, False])
def test_positions_are_rows_of_the_tables(layout: str, dtype: torch.dtype, has_batch: bool) -> None:
    """Looking rows up is the same as giving the tables of those rows."""
    cos, sin = tables_of(20, 4)
    if layout == "thd":
        x, positions = drawn(6, 3, 8), torch.randint(0, 20, (6,), dtype=dtype)
    else:
        x = drawn(2, 6, 3, 8).permute(LAYOUTS[layout])
        positions = torch.randint(0, 20, (2, 6) if has_batch else (6,), dtype=dtype)
    found = rope(x, cos, sin, positions, layout=layout, table="half")
    assert torch.equal(found, rope(x, cos[positions], sin[positions], layout=layout, table="half"))
    assert not torch.equal(found, rope(x, cos, sin, layout=layout, table="half"))


def test_rows_beyond_the_last_position_are_not_used() -> None:
    """A table may be longer than the sequence."""
    x, (cos, sin) = drawn(2, 6, 3, 8), tables_of(20, 4)
    assert torch.equal(rope(x, cos, sin, table="half"), rope(x, cos[:6], sin[:6], table="half"))


@pytest.mark.parametrize("position", [-1, 20])
def test_a_row_that_is_not_there_is_an_error(position: int) -> None:
    """A position beyond the table raises on the CPU, and a negative one does not count from the end."""
    cos, sin = tables_of(20, 4)
    with pytest.raises(IndexError):
        rope(drawn(1, 1, 1, 8), cos, sin, torch.tensor([position]), table="half")


def test_where_rounding_happens() -> None:
    """compute="float32" rounds once; "x" rounds tables, products and sum, and so has several times the error."""
    x, (cos, sin) = drawn(4, 64, 4, 64, dtype=torch.bfloat16), tables_of(64, 32)
    exact = rope(x.double(), cos.double(), sin.double(), table="half")
    once, often = (rope(x, cos, sin, table="half", compute=compute) for compute in ("float32", "x"))
    assert torch.equal(once, rope(x.float(), cos, sin, table="half").to(torch.bfloat16))
    assert torch.equal(often, rope(x, cos.bfloat16(), sin.bfloat16(), table="half", compute="x"))
    assert (often - exact).abs().mean() > 1.3 * (once - exact).abs().mean()


def test_each_flag_changes_the_result() -> None:
    """No option can be dropped unnoticed."""
    x, (cos, sin) = drawn(3, 3, 3, 16, dtype=torch.bfloat16), tables_of(3, 4)
    base: dict[str, Any] = {"layout": "bshd", "pairs": "half", "table": "half", "compute": "float32", "inverse": False}
    expected = rope(x, cos, sin, **base)
    flips = [("layout", "sbhd"), ("layout", "bhsd"), ("table", "full"), ("compute", "x"), ("inverse", True)]
    for name, value in flips + [("pairs", pairs) for pairs in PAIRS[1:]]:
        assert not torch.equal(rope(x, cos, sin, **base | {name: value}), expected), name


def test_tables_that_are_learned_get_a_gradient() -> None:
    """The reference differentiates the tables as well, also through positions."""
    x, (cos, sin) = drawn(2, 3, 2, 8).double(), tables_of(5, 4, dtype=torch.float64)
    leaves = [t.clone().requires_grad_() for t in (x, cos, sin)]
    positions = torch.tensor([[4, 0, 4], [1, 2, 1]])
    assert torch.autograd.gradcheck(lambda x, c, s: rope(x, c, s, positions, table="half"), leaves)


def test_one_graph_serves_every_length() -> None:
    """Compiled with sizes that change, packed sequences need no graph break and no value on the host."""
    cos, sin = tables_of(64, 4)
    traced: list[int] = []

    def counted(graph: Any, example: Any) -> Any:
        traced.append(1)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(rope, fullgraph=True, dynamic=True, backend=counted)
    for tokens in (30, 41, 57):
        x, ends = drawn(tokens, 2, 8), torch.tensor([0, 7, tokens - 3])
        options: dict[str, Any] = {"cu_seqlens": ends, "layout": "thd", "table": "half"}
        assert torch.equal(compiled(x, cos, sin, **options), rope(x, cos, sin, **options))
    assert len(traced) == 1


def test_inputs_are_left_alone() -> None:
    """The op never changes x, the tables or the positions."""
    tensors = [drawn(2, 6, 3, 8), *tables_of(20, 4), torch.arange(6)]
    before = [t.clone() for t in tensors]
    rope(*tensors, table="half")
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


GOOD: dict[str, Any] = {"x": torch.ones(2, 3, 1, 8), "cos": torch.ones(3, 8), "sin": torch.ones(3, 8)}
THD: dict[str, Any] = GOOD | {"x": torch.ones(3, 1, 8), "layout": "thd"}
ENDS = torch.tensor([0, 3])


@pytest.mark.parametrize(
    ("error", "message", "arguments"),
    [
        (ValueError, "layout='bsd' was asked", GOOD | {"layout": "bsd"}),
        (ValueError, "pairs='gptj' was asked", GOOD | {"pairs": "gptj"}),
        (ValueError, "table='quarter' was asked", GOOD | {"table": "quarter"}),
        (ValueError, "compute='bfloat16' was asked", GOOD | {"compute": "bfloat16"}),
        (TypeError, "x is torch.int64", GOOD | {"x": torch.ones(2, 3, 1, 8, dtype=torch.long)}),
        (TypeError, "sin is torch.complex64", GOOD | {"sin": torch.ones(3, 8, dtype=torch.complex64)}),
        (TypeError, "positions is torch.float32", GOOD | {"positions": torch.ones(3)}),
        (TypeError, "cu_seqlens is torch.float32", THD | {"cu_seqlens": torch.ones(3)}),
        (ValueError, "pass 3 axes", GOOD | {"layout": "thd"}),
        (ValueError, "pass equal shapes", GOOD | {"sin": torch.ones(3, 4)}),
        (ValueError, "rotate 10 features, and x has 8", GOOD | {"cos": torch.ones(3, 10), "sin": torch.ones(3, 10)}),
        (ValueError, "rotate 16 features", GOOD | {"table": "half"}),
        (ValueError, "rotate 7 features", GOOD | {"cos": torch.ones(3, 7), "sin": torch.ones(3, 7)}),
        (ValueError, r"cos has shape \(\)", GOOD | {"cos": torch.ones(()), "sin": torch.ones(())}),
        (ValueError, "pass one axis of 3 positions", GOOD | {"cos": torch.ones(2, 8), "sin": torch.ones(2, 8)}),
        (ValueError, "pass one axis of 3", GOOD | {"cos": torch.ones(3, 3, 8), "sin": torch.ones(3, 3, 8)}),
        (ValueError, "pass one axis of 3", THD | {"cos": torch.ones(1, 3, 8), "sin": torch.ones(1, 3, 8)}),
        (ValueError, "pass one axis of 3", GOOD | {"positions": torch.arange(2)}),
        (ValueError, "pass one axis of 3", GOOD | {"positions": torch.zeros(3, 3, dtype=torch.long)}),
        (
            ValueError,
            "must have two axes",
            GOOD | {"cos": torch.ones(2, 3, 8), "sin": torch.ones(2, 3, 8), "positions": torch.arange(3)},
        ),
        (ValueError, "layout='thd' and no positions", GOOD | {"cu_seqlens": ENDS}),
        (ValueError, "layout='thd' and no positions", THD | {"cu_seqlens": ENDS, "positions": torch.arange(3)}),
        (ValueError, "pass one axis", THD | {"cu_seqlens": ENDS[None]}),
        (ValueError, "cu_seqlens is empty", THD | {"cu_seqlens": ENDS[:0]}),
    ],
)
def test_what_cannot_be_is_refused(error: type[Exception], message: str, arguments: dict[str, Any]) -> None:
    """Each guard says what was asked, what was found and what to pass."""
    with pytest.raises(error, match=message):
        rope(**arguments)


@pytest.mark.parametrize(
    ("layout", "rows"),
    [(layout, rows) for layout in LAYOUTS for rows in ("first", "positions", "of each sequence")]
    + [("thd", rows) for rows in ("first", "positions", "packed")],
)
def test_a_large_call_is_proved_on_a_part(layout: str, rows: str) -> None:
    """shrink gives the corner of the call: the result is the corner of the result."""
    cos, sin = tables_of(1200, 4)
    call: dict[str, Any] = {"cos": cos, "sin": sin, "layout": layout, "table": "half"}
    if layout == "thd":
        call["x"] = drawn(1100, 6, 8)
    else:
        call["x"] = drawn(3, 1100, 6, 8).permute(LAYOUTS[layout])
    if rows == "positions":
        call["positions"] = torch.arange(1100) + 7
    if rows == "of each sequence":
        call |= {"cos": torch.stack([cos, sin, cos]), "sin": torch.stack([sin, cos, cos])}
    if rows == "packed":
        call["cu_seqlens"] = torch.tensor([0, 100, 700, 1100])
    whole = rope.op.bind(**call)
    small = _shrink(whole)
    y = rope(**small)
    assert y.numel() <= 2 * 512 * 4 * 8
    assert torch.equal(y, rope(**whole)[tuple(slice(size) for size in y.shape)])
    assert rows != "packed" or int(small["cu_seqlens"].max()) == small["x"].shape[0]
    assert small["x"].is_contiguous() == call["x"].is_contiguous()
