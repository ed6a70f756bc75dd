"""Rotary embeddings of torch_npu over the simulated NPU: results, gradients, and the limits that are documented."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.simulators.npu_checks import FLOATS, HALVES, agrees, close, refuses, said_on

pytestmark = pytest.mark.simulator("npu")

# Shape of x and of its tables, by layout: B = 2, S = 6, N = 4, T = 12, D = 16.
SHARED = {
    "BNSD": ((2, 4, 6, 16), (1, 1, 6, 16)),
    "BSND": ((2, 6, 4, 16), (1, 6, 1, 16)),
    "SBND": ((6, 2, 4, 16), (6, 1, 1, 16)),
    "TND": ((12, 4, 16), (12, 1, 16)),
}
OWN = {
    "BNSD by batch": ((2, 4, 6, 16), (2, 1, 6, 16)),
    "BNSD whole": ((2, 4, 6, 16), (2, 4, 6, 16)),
    "BSND by batch": ((2, 6, 4, 16), (2, 6, 1, 16)),
    "TND whole": ((12, 4, 16), (12, 4, 16)),
}


def _npu() -> Any:
    import torch_npu

    return torch_npu


def _data(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.rand(shape, generator=generator) * 2 - 1 for shape in shapes]


def _matrix(size: int, mode: str) -> torch.Tensor:
    """The turn as a matrix: row of the input feature, column of the output feature."""
    turn = torch.zeros(size, size, dtype=torch.float64)
    for pair in range(size // 2):
        left, right = (pair, pair + size // 2) if mode == "half" else (2 * pair, 2 * pair + 1)
        turn[right, left], turn[left, right] = -1, 1
    return turn


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    return x * cos + x @ _matrix(x.shape[-1], mode) * sin


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", [*SHARED, *OWN])
def test_half(layout: str, dtype: torch.dtype) -> None:
    """Halves in every documented layout and dtype, with gradients of x, cos and sin."""
    x, table = (SHARED | OWN)[layout]
    call = lambda *a: _npu().npu_rotary_mul(*a, "half")  # noqa: E731
    agrees(call, lambda *a: _rotated(*a, "half"), _data(x, table, table), dtype, node="NpuRotaryMulBackward")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", SHARED)
def test_interleave(layout: str, dtype: torch.dtype) -> None:
    """Interleaved pairs in every documented layout and dtype, with gradients of x, cos and sin."""
    x, table = SHARED[layout]
    call = lambda *a: _npu().npu_rotary_mul(*a, "interleave")  # noqa: E731
    agrees(call, lambda *a: _rotated(*a, "interleave"), _data(x, table, table), dtype)


def test_tables_are_cast_down() -> None:
    """Tables of float32 are cast to the dtype of x without a word, in forward and backward."""
    x, cos, sin = _data((2, 4, 6, 16), (1, 1, 6, 16), (1, 1, 6, 16))
    x, rough = x.bfloat16(), [t.bfloat16().double() for t in (cos, sin)]
    here, there = x.npu().requires_grad_(), x.double().requires_grad_()
    found = _npu().npu_rotary_mul(here, cos.npu(), sin.npu())
    expected = _rotated(there, *rough, "half")
    assert found.dtype == torch.bfloat16
    close(found, expected)
    found.sum().backward()
    expected.sum().backward()
    close(here.grad, there.grad)


def test_a_matrix_takes_the_place_of_the_turn() -> None:
    """With `rotate` the turned x is x @ rotate."""
    x, cos, sin, rotate = _data((2, 4, 6, 16), (1, 1, 6, 16), (1, 1, 6, 16), (16, 16))
    found = _npu().npu_rotary_mul(x.npu(), cos.npu(), sin.npu(), "half", rotate.npu())
    close(found, x.double() * cos + x.double() @ rotate.double() * sin)


@pytest.mark.parametrize(
    ("mode", "x", "table", "text"),
    [
        ("half", (1, 1, 2, 15), (1, 1, 2, 15), "even and below 896"),
        ("half", (1, 1, 2, 896), (1, 1, 2, 896), "even and below 896"),
        ("half", (1, 1, 2, 16), (1, 1, 2, 8), "as wide as x"),
        ("half", (2, 4, 6, 16), (1, 4, 6, 16), "no documented layout"),
        ("half", (2, 4, 6, 16), (1, 1, 1, 16), "no documented layout"),
        ("interleave", (2, 4, 6, 16), (2, 1, 6, 16), "no documented layout"),
        ("interleave", (12, 4, 16), (12, 4, 16), "TND takes T1D"),
        ("half", (2, 16), (2, 16), "3 to 4 axes"),
        ("half", (1000, 1, 1, 2), (1, 1, 1, 2), "too many sequences or heads"),
        ("interleave", (40, 25, 2, 2), (1, 1, 2, 2), "too many sequences or heads"),
        ("half", (2, 1000, 2), (2, 1, 2), "N must be below 1000"),
    ],
)
def test_refuses(mode: str, x: tuple[int, ...], table: tuple[int, ...], text: str) -> None:
    """Sizes and tables that are not documented are refused by name."""
    with refuses(text):
        _npu().npu_rotary_mul(torch.ones(x).npu(), torch.ones(table).npu(), torch.ones(table).npu(), mode)


def test_other_modes_are_refused_by_torch_npu() -> None:
    """torch_npu itself refuses modes other than half and interleave."""
    x = torch.ones(1, 1, 2, 16).npu()
    with refuses("should be half or interleave"):
        _npu().npu_rotary_mul(x, x, x, "quarter")


def test_gradients_of_tables_have_a_limit_of_their_own() -> None:
    """B N of at most 1024 where cos and sin need gradients; more without."""
    x, table = torch.ones(5, 205, 1, 2), torch.ones(1, 1, 1, 2).npu()
    leaf = x.npu().requires_grad_()
    _npu().npu_rotary_mul(leaf, table, table).sum().backward()
    assert leaf.grad is not None
    with refuses("B N at most 1024"):
        _npu().npu_rotary_mul(leaf, table.requires_grad_(), table).sum().backward()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("layout", ["BSND", "TND"])
def test_apply_rotary_pos_emb(layout: str, dtype: torch.dtype) -> None:
    """Queries and keys are turned in place, and returned."""
    leading = (2, 6) if layout == "BSND" else (12,)
    shapes = [(*leading, 4, 64), (*leading, 2, 64), (*leading, 1, 64), (*leading, 1, 64)]
    query, key, cos, sin = (t.to(dtype) for t in _data(*shapes))
    here = [t.npu() for t in (query, key)]
    found = _npu().npu_apply_rotary_pos_emb(*here, cos.npu(), sin.npu(), layout)
    for one, kept, given in zip(found, here, (query, key), strict=True):
        assert one.data_ptr() == kept.data_ptr()
        close(kept, _rotated(given.double(), cos.double(), sin.double(), "half"))


def test_apply_rotary_pos_emb_has_no_backward() -> None:
    """Its backward raises, as torch_npu registers it."""
    query = torch.ones(1, 2, 1, 64).npu().requires_grad_()
    table = torch.ones(1, 2, 1, 64).npu()
    out = _npu().npu_apply_rotary_pos_emb(query * 1, table.clone(), table, table)[0]
    with refuses("derivative for npu::npu_apply_rotary_pos_emb is not implemented"):
        out.sum().backward()


@pytest.mark.parametrize(
    ("shape", "table", "layout", "mode", "text"),
    [
        ((1, 2, 4, 32), (1, 2, 1, 32), "BSND", "half", "64 or 128"),
        ((1, 2, 4, 64), (1, 2, 4, 64), "BSND", "half", "must have the shape"),
        ((1, 2, 4, 64), (1, 2, 1, 64), "BNSD", "half", "BSND or TND"),
        ((1, 2, 4, 64), (1, 2, 1, 64), "BSND", "interleave", "must be half"),
        ((1, 2, 4, 128), (1, 2, 1, 64), "BSND", "half", "narrower than D"),
    ],
)
def test_apply_rotary_pos_emb_refuses(
    shape: tuple[int, ...], table: tuple[int, ...], layout: str, mode: str, text: str
) -> None:
    """Head sizes, tables, layouts and modes that an A2 does not have are refused by name."""
    x, tables = torch.ones(shape).npu(), torch.ones(table).npu()
    with refuses(text):
        _npu().npu_apply_rotary_pos_emb(x, x.clone(), tables, tables, layout, mode)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_interleave_rope(dtype: torch.dtype) -> None:
    """Pairs that lie together are brought apart and turned as halves."""
    x, cos, sin = _data((2, 4, 6, 64), (2, 1, 6, 64), (2, 1, 6, 64))

    def formula(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        apart = torch.cat([x[..., ::2], x[..., 1::2]], -1)
        return _rotated(apart, cos, sin, "half")

    agrees(_npu().npu_interleave_rope, formula, [x, cos, sin], dtype, backward=False)
    with refuses("must be float16 or bfloat16"):
        _npu().npu_interleave_rope(x.npu(), cos.npu(), sin.npu())
    with refuses("D must be 64"):
        _npu().npu_interleave_rope(*(t[..., :32].to(dtype).npu() for t in (x, cos, sin)))


def _cached(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, mode: str) -> torch.Tensor:
    """cos and sin [T, rotary_dim / 2]; heads of 64 features, of which the first are turned."""
    heads, width = x.double().unflatten(-1, (-1, 64)), 2 * cos.shape[-1]
    full = [torch.cat([t, t], -1) if mode == "half" else t.repeat_interleave(2, -1) for t in (cos, sin)]
    turned = _rotated(heads[..., :width], *(t.double().unsqueeze(1) for t in full), mode)
    return torch.cat([turned, heads[..., width:]], -1).flatten(-2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("mode", ["half", "interleave"])
def test_mrope_of_plain_positions(mode: str, dtype: torch.dtype) -> None:
    """One row of positions picks rows of a cache [cos | sin]; features beyond the cache stay."""
    query, key, cache = (t.to(dtype) for t in _data((8, 256), (8, 128), (32, 32)))
    positions = torch.tensor([0, 5, 1, 31, 7, 7, 2, 30])
    found = _npu().npu_mrope(positions.npu(), query.npu(), key.npu(), cache.npu(), 64, rotary_mode=mode)
    cos, sin = cache[positions].chunk(2, -1)
    for one, given in zip(found, (query, key), strict=True):
        close(one, _cached(given, cos, sin, mode))


@pytest.mark.parametrize("cache_mode", ["default", "interleave"])
def test_mrope_of_sections(cache_mode: str) -> None:
    """Three rows of positions each fill their sections of the features, in a row or every third."""
    query, key, cache = _data((8, 128), (8, 64), (32, 64))
    sections = [8, 12, 12]
    positions = torch.randint(0, 32, (3, 8), generator=torch.Generator().manual_seed(1))
    owner = [0] * 8 + [1] * 12 + [2] * 12
    if cache_mode == "interleave":
        owner = [i % 3 if i % 3 and i < 36 else 0 for i in range(32)]
    halves = cache[positions].unflatten(-1, (2, 32))  # [3, T, 2, 32]
    picked = torch.stack([halves[row, :, :, column] for column, row in enumerate(owner)], -1)
    found = _npu().npu_mrope(
        positions.npu(), query.npu(), key.npu(), cache.npu(), 64, mrope_section=sections, cache_mode=cache_mode
    )
    close(found[0], _cached(query, picked[:, 0], picked[:, 1], "half"))
    close(found[1], _cached(key, picked[:, 0], picked[:, 1], "half"))


def test_mrope_refuses() -> None:
    """Caches of other widths, and sections that do not fill them."""
    query, positions = torch.ones(8, 128).npu(), torch.zeros(3, 8, dtype=torch.long).npu()
    with refuses("multiple of 16"):
        _npu().npu_mrope(positions[0], query, query, torch.ones(32, 24).npu(), 64)
    with refuses("must sum to half"):
        _npu().npu_mrope(positions, query, query, torch.ones(32, 64).npu(), 64, mrope_section=[8, 8, 8])


def test_mrope_drops_gradients() -> None:
    """Without a derivative its backward leaves inputs without a gradient, as torch_npu does."""
    query = torch.ones(2, 64).npu().requires_grad_()
    cache = torch.ones(4, 64).npu()
    _npu().npu_mrope(torch.zeros(2, dtype=torch.long).npu(), query, query, cache, 64)[0].sum().backward()
    assert query.grad is None


def test_newest_chip_has_more_modes() -> None:
    """Ascend 950: D of 896, tables that broadcast, quarters; D of more than 1024 is refused there too."""
    code = """
one = lambda *shape: torch.ones(*shape).npu()
outcome(lambda: torch_npu.npu_rotary_mul(one(1, 1, 2, 896), one(1, 1, 2, 896), one(1, 1, 2, 896)))
x = torch.arange(8.0).reshape(1, 1, 1, 8).npu()
print(torch_npu.npu_rotary_mul(x, x * 0, x * 0 + 1, "quarter").cpu().flatten().tolist())
outcome(lambda: torch_npu.npu_rotary_mul(one(1, 1, 2, 1028), one(1, 1, 2, 1028), one(1, 1, 2, 1028)))
"""
    done, quarter, *refused = said_on("Ascend950", code).splitlines()
    assert done == "done"
    assert quarter == "[-2.0, -3.0, 0.0, 1.0, -6.0, -7.0, 4.0, 5.0]"
    assert "at most 1024" in "".join(refused)
