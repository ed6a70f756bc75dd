"""Rotary position embedding.

x = queries or keys; B batch, S positions, T = tokens of all sequences packed, H heads, D head size; R = features that
are rotated, the first of D; W = width of the tables, R or R/2; P = rows of a table that is looked up; N sequences.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, TypeAlias

import torch
from torch.nn import functional as F

from llm_adapt.ops.dispatch import HEAD_SIZES, fused_op

__all__ = ["rope"]

Layout: TypeAlias = Literal["bshd", "sbhd", "bhsd", "thd"]
_BATCH = {"bshd": 0, "sbhd": 1, "bhsd": 0}  # where the batch axis of x is; thd has none
_POSITION = {"bshd": 1, "sbhd": 0, "bhsd": 2, "thd": 0}
_OPTIONS = {
    "layout": tuple(_POSITION),
    "pairs": ("half", "interleaved", "interleaved_to_half"),
    "table": ("full", "half"),
    "compute": ("float32", "x"),
}
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_INTEGERS = (torch.int64, torch.int32)
_FEW = {"batch": 2, "heads": 4, "positions": 512}  # what a proof of a large call keeps


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    def tables(*sizes: int, repeat: str = "", to: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
        angles = torch.rand(sizes, generator=generator) * 6.28
        if repeat:  # each angle once for each feature of its pair
            angles = torch.cat([angles, angles], -1) if repeat == "half" else angles.repeat_interleave(2, -1)
        return {"cos": angles.cos().to(to), "sin": angles.sin().to(to)}

    last = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    yield {"x": draw(2, 7, 3, 16), **tables(7, 8, repeat="half")}
    yield {"x": draw(2, 7, 3, 16), **tables(7, 8, repeat="half"), "inverse": True}
    yield {"x": draw(2, 3, 7, 16), **tables(2, 7, 8, repeat="half", to=dtype), "layout": "bhsd", "compute": "x"}
    yield {"x": draw(2, 1, 7, 12), **tables(1, 7, 4, repeat="half"), "layout": "bhsd"}
    yield {"x": draw(5, 2, 3, 16), **tables(9, 4, repeat="pairs"), "layout": "sbhd", "pairs": "interleaved"}
    yield {"x": draw(2, 7, 3, 16), **tables(7, 8), "pairs": "interleaved", "table": "half", "inverse": True}
    yield {"x": draw(2, 5, 3, 16), **tables(5, 8, repeat="half"), "pairs": "interleaved_to_half"}
    yield {"x": draw(2, 5, 3, 16), **tables(5, 8), "pairs": "interleaved_to_half", "table": "half", "inverse": True}
    positions = torch.randint(0, 20, (2, 6), generator=generator)
    yield {"x": draw(2, 6, 3, 8), **tables(20, 4, repeat="half"), "positions": positions}
    yield {"x": draw(6, 2, 3, 8), **tables(20, 4), "positions": positions[0], "layout": "sbhd", "table": "half"}
    yield {"x": draw(10, 3, 16), **tables(10, 8, repeat="half"), "layout": "thd"}
    yield {"x": draw(10, 3, 16), **tables(8, 8, repeat="half"), "cu_seqlens": last, "layout": "thd"}
    yield {"x": draw(12, 3, 16), **tables(8, 4), "cu_seqlens": last, "layout": "thd", "table": "half", "compute": "x"}
    yield {"x": draw(0, 3, 16), **tables(8, 8, repeat="half"), "layout": "thd"}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same call with fewer sequences, heads and positions. Tables that are looked up stay whole."""
    layout, x, positions = arguments["layout"], arguments["x"], arguments["positions"]
    found, few = dict(arguments), _FEW["positions"]
    keep = {_POSITION[layout]: few, (1 if layout == "bhsd" else x.ndim - 2): _FEW["heads"]}
    if layout in _BATCH:
        keep[_BATCH[layout]] = _FEW["batch"]
    found["x"] = _corner(x, keep)
    if positions is not None:
        found["positions"] = _corner(positions, {0: _FEW["batch"], 1: few} if positions.ndim == 2 else {0: few})
    elif arguments["cu_seqlens"] is not None:
        # The sequences that begin after the tokens that are kept become empty.
        found["cu_seqlens"] = arguments["cu_seqlens"].clamp(max=few)
    else:
        for name in ("cos", "sin"):
            table = arguments[name]
            found[name] = _corner(table, {0: _FEW["batch"], 1: few} if table.ndim == 3 else {0: few})
    return found


def _corner(tensor: torch.Tensor, keep: dict[int, int]) -> torch.Tensor:
    part = tensor[tuple(slice(keep.get(axis)) for axis in range(tensor.ndim))]
    return part.contiguous() if tensor.is_contiguous() else part


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    batch, positions, heads, size = shape
    angles = torch.rand(positions, size // 2, generator=generator) * 6.28
    angles = torch.cat([angles, angles], -1)
    x = torch.randn(batch, positions, heads, size, generator=generator).to(dtype)
    return {"x": x, "cos": angles.cos(), "sin": angles.sin()}


@fused_op(inputs=_inputs, differentiable=("x",), shrink=_shrink, example=_example, sizes=HEAD_SIZES)
def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    layout: Layout = "bshd",
    pairs: Literal["half", "interleaved", "interleaved_to_half"] = "half",
    table: Literal["full", "half"] = "full",
    compute: Literal["float32", "x"] = "float32",
    inverse: bool = False,
) -> torch.Tensor:
    """(y_i, y_j) = (x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j) for each pair (i, j) of the first R features.

    The other features pass through. The tables hold whatever scales the angles: YaRN's and llama3's frequencies,
    the axes of multimodal positions, mscale.

    pairs: "half": (i, i + R/2) (GPT-NeoX, Llama in transformers). "interleaved": (2i, 2i + 1) (GPT-J).
    "interleaved_to_half": read as interleaved, written as half (DeepSeek-V3 in transformers, multi-latent attention
    in Megatron-Core).
    table: "full": W = R, one column for each feature of y. "half": W = R/2, one for each pair.
    positions: rows of the tables to use. cu_seqlens: the first token of each sequence, and the end of the last;
    token t of a sequence uses row t; tokens of none, which are padding, use row 0. With neither, position s uses row s,
    and rows beyond the last position are not used.
    compute: "float32": tables and products in float32, one rounding at the end. "x": tables, products and sum are
    each rounded to the dtype of x, as transformers and Megatron-Core do.
    inverse: by -angle, from the layout of y to that of x: undoes the rotation, and is its gradient where the two
    columns of a pair are equal.

    Shapes: x bshd [B, S, H, D], sbhd [S, B, H, D], bhsd [B, H, S, D] or thd [T, H, D] -> y the same.
    cos, sin [S or more, W] or [B or 1, S or more, W], thd [T or more, W]; with positions or cu_seqlens [P, W].
    positions [S] or [B or 1, S], thd [T]; cu_seqlens [N + 1].
    Dtypes: x, cos, sin float16, bfloat16, float32 or float64; positions, cu_seqlens int32 or int64. y has the dtype
    of x; float64 x is computed in float64.
    Gradients: of x; tables that need one get it from the reference, so kernels refuse them.
    Raises: TypeError for other dtypes; ValueError for other shapes, odd R, R > D, an unknown option, cu_seqlens in
    another layout than thd, and positions together with cu_seqlens. A row beyond the table is an error of indexing.
    Source: Su et al. 2021, equation 34; transformers 5 modeling_llama.py, modeling_gpt_oss.py and
    modeling_deepseek_v3.py; Megatron-Core 0.16.1 models/common/embeddings/rope_utils.py.
    """
    check_rope(x, cos, sin, positions, cu_seqlens, layout=layout, pairs=pairs, table=table, compute=compute)
    wide = x.dtype if compute == "x" else torch.promote_types(x.dtype, torch.float32)
    rows = table_rows(x, positions, cu_seqlens, layout)
    cos, sin = (beside(t, rows, x, layout).to(wide) for t in (cos, sin))
    columns = pairs if table == "full" else "one"
    (cos_i, cos_j), (sin_i, sin_j) = _split(cos, columns), _split(sin, columns)
    if inverse:
        sin_i, sin_j = -sin_i, -sin_j
    width = cos.shape[-1] * (1 if table == "full" else 2)
    read: str = "interleaved" if pairs == "interleaved_to_half" else pairs
    write: str = "half" if pairs == "interleaved_to_half" else pairs
    if inverse:
        read, write = write, read
    a, b = _split(x[..., :width].to(wide), read)
    y = _joined(a * cos_i - b * sin_i, b * cos_j + a * sin_j, write).to(x.dtype)
    return y if width == x.shape[-1] else torch.cat((y, x[..., width:]), -1)


def _split(features: torch.Tensor, pairs: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The first and the second feature of every pair."""
    if pairs == "one":  # a table with one column for both
        return features, features
    if pairs == "interleaved":
        return features[..., 0::2], features[..., 1::2]
    half = features.shape[-1] // 2
    return features[..., :half], features[..., half:]


def _joined(a: torch.Tensor, b: torch.Tensor, pairs: str) -> torch.Tensor:
    return torch.cat((a, b), -1) if pairs == "half" else torch.stack((a, b), -1).flatten(-2)


def table_rows(
    x: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None, layout: str
) -> torch.Tensor | None:
    """Rows of the tables to use, None for the first ones. No value is read on the host."""
    if cu_seqlens is None:
        return positions
    tokens = torch.arange(x.shape[_POSITION[layout]], device=x.device, dtype=cu_seqlens.dtype)
    sequence = torch.searchsorted(cu_seqlens, tokens, right=True) - 1
    is_inside = (tokens >= cu_seqlens[0]) & (tokens < cu_seqlens[-1])
    return torch.where(is_inside, tokens - cu_seqlens[sequence], 0)


def beside(table: torch.Tensor, rows: torch.Tensor | None, x: torch.Tensor, layout: str) -> torch.Tensor:
    """The rows of a table that x needs, with the axes of x."""
    # embedding refuses a negative row, which indexing would count from the end.
    table = table[..., : x.shape[_POSITION[layout]], :] if rows is None else F.embedding(rows, table)
    if layout == "thd":
        return table.unsqueeze(1)
    batched = table if table.ndim == 3 else table.unsqueeze(0)
    if layout == "sbhd":
        return batched.transpose(0, 1).unsqueeze(2)
    return batched.unsqueeze(1 if layout == "bhsd" else 2)


def check_rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    **options: str,
) -> None:
    """Raise for arguments that rope does not take."""
    for name, value in options.items():
        if value not in _OPTIONS[name]:
            raise ValueError(f"rope: {name}={value!r} was asked; pass one of {', '.join(_OPTIONS[name])}.")
    for name, tensor, dtypes in (
        ("x", x, _FLOATS),
        ("cos", cos, _FLOATS),
        ("sin", sin, _FLOATS),
        ("positions", positions, _INTEGERS),
        ("cu_seqlens", cu_seqlens, _INTEGERS),
    ):
        if tensor is not None and tensor.dtype not in dtypes:
            raise TypeError(f"rope: {name} is {tensor.dtype}; pass one of {', '.join(map(str, dtypes))}.")
    layout = options["layout"]
    if x.ndim != len(layout):
        raise ValueError(f"rope: x has shape {tuple(x.shape)} and layout={layout!r}; pass {len(layout)} axes.")
    if cos.shape != sin.shape:
        raise ValueError(f"rope: cos has shape {tuple(cos.shape)} and sin {tuple(sin.shape)}; pass equal shapes.")
    width = cos.shape[-1] * (1 if options["table"] == "full" else 2) if cos.ndim else 0
    if width % 2 or width > x.shape[-1]:
        raise ValueError(
            f"rope: tables of shape {tuple(cos.shape)} with table={options['table']!r} rotate {width} features, and x "
            f"has {x.shape[-1]}; pass tables for an even number of features, at most those of x."
        )
    _check_rows(x, cos, positions, cu_seqlens, layout)


def _check_rows(
    x: torch.Tensor, cos: torch.Tensor, positions: torch.Tensor | None, cu_seqlens: torch.Tensor | None, layout: str
) -> None:
    """Raise where tables, positions or cu_seqlens do not have the axes of x."""
    length = x.shape[_POSITION[layout]]
    if cu_seqlens is not None and (layout != "thd" or positions is not None or cu_seqlens.ndim != 1):
        raise ValueError(
            f"rope: cu_seqlens of shape {tuple(cu_seqlens.shape)} was given with layout={layout!r} and positions "
            f"{'absent' if positions is None else 'given'}; pass one axis, layout='thd' and no positions."
        )
    if cu_seqlens is not None and not cu_seqlens.shape[0]:
        raise ValueError("rope: cu_seqlens is empty; pass the end of the last sequence at least: [0].")
    given, name = (cos.shape[:-1], "cos") if positions is None else (positions.shape, "positions")
    if (positions is not None or cu_seqlens is not None) and cos.ndim != 2:
        raise ValueError(f"rope: cos has shape {tuple(cos.shape)}; a table that is looked up must have two axes.")
    if cu_seqlens is not None:
        return
    batch = x.shape[_BATCH[layout]] if layout in _BATCH else None
    fits = len(given) == 1 or (len(given) == 2 and batch is not None and given[0] in (1, batch))
    if not fits or (given[-1] != length if positions is not None else given[-1] < length):
        raise ValueError(
            f"rope: {name} has shape {tuple(cos.shape if positions is None else positions.shape)} and x "
            f"{tuple(x.shape)} in layout {layout}; pass one axis of {length} positions, or a batch axis before it."
        )
