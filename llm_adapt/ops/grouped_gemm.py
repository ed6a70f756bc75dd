"""Grouped matrix product. M = rows, sorted by expert, E = experts, K and N = columns before and after."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from llm_adapt.ops.dispatch import fused_op

__all__ = ["grouped_gemm"]


def _inputs(generator: torch.Generator, dtype: torch.dtype) -> Iterator[dict[str, Any]]:
    def draw(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator).to(dtype)

    counts = torch.tensor
    yield {"x": draw(24, 16), "weight": draw(4, 16, 8), "tokens_per_expert": counts([5, 0, 16, 3])}
    transposed = {"weight": draw(3, 8, 16), "transposed": True}
    yield {"x": draw(24, 16), **transposed, "tokens_per_expert": counts([0, 17, 7]), "bias": draw(3, 8)}
    # Rows that belong to no expert.
    yield {"x": draw(20, 16), **transposed, "tokens_per_expert": counts([9, 4, 0]), "bias": draw(3, 8)}
    yield {"x": draw(11, 7), "weight": draw(2, 7, 5), "tokens_per_expert": counts([6, 4])}
    yield {"x": draw(8, 16), "weight": draw(2, 16, 8), "tokens_per_expert": counts([0, 0])}
    yield {"x": draw(0, 16), "weight": draw(2, 16, 8), "tokens_per_expert": counts([0, 0])}


def _example(generator: torch.Generator, dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    counts = torch.full((8,), shape[0] // 8)
    counts[0] += shape[0] % 8
    x, weight = (torch.randn(sizes, generator=generator).to(dtype) for sizes in (shape, (8, shape[1], shape[1])))
    return {"x": x, "weight": weight, "tokens_per_expert": counts, "transposed": True}


def _shrink(arguments: dict[str, Any]) -> dict[str, Any]:
    """At most 32 rows an expert of at most 8 experts, and 256 columns; four rows of no expert where there were some."""
    counts = arguments["tokens_per_expert"][:8].clamp(max=32)
    has_rest = int(arguments["tokens_per_expert"].sum()) < arguments["x"].shape[0]
    rows = min(int(counts.sum()) + 4 * has_rest, arguments["x"].shape[0])
    inner = 2 if arguments["transposed"] else 1
    weight = arguments["weight"][:8].narrow(inner, 0, min(256, arguments["weight"].shape[inner]))
    weight = weight.narrow(3 - inner, 0, min(256, weight.shape[3 - inner]))
    bias = arguments["bias"]
    return arguments | {
        "x": arguments["x"][:rows, :256].contiguous(),
        "weight": weight.contiguous(),
        "tokens_per_expert": counts,
        "bias": None if bias is None else bias[:8, :256].contiguous(),
    }


@fused_op(
    inputs=_inputs,
    differentiable=("x", "weight", "bias"),
    autocast=("x", "weight", "bias"),
    shrink=_shrink,
    example=_example,
    sizes={"8 experts": (8192, 1024)},
)
def grouped_gemm(
    x: torch.Tensor,
    weight: torch.Tensor,
    tokens_per_expert: torch.Tensor,
    bias: torch.Tensor | None = None,
    transposed: bool = False,
) -> torch.Tensor:
    """y[m] = x[m] @ weight[e] + bias[e], e = expert of row m: the first tokens_per_expert[0] rows are expert 0's ...

    Rows beyond the sum of tokens_per_expert are 0, whatever x holds there, and an expert without rows gets a gradient
    of 0. transposed: weight is [E, N, K], as torch.nn.Linear keeps it, and y[m] = x[m] @ weight[e]^T.

    The counts stay on their device. So the reference multiplies all rows by each expert and keeps the expert's own
    rows, E times the work of a kernel: slices would need the counts on the host, and a weight for each row needs
    M * K * N elements.

    Shapes: x [M, K], weight [E, K, N], tokens_per_expert [E] of integers, bias [E, N] -> y [M, N].
    Dtypes: products and sums in float32 (float64 for float64 x), rounded once to the dtype of x; so the gradients.
    Raises: ValueError for shapes that do not fit; TypeError for counts that are not integers.
    Source: MegaBlocks (Gale et al. 2022); grouped_gemm.ops.gmm(a, b, batch_sizes, trans_b);
        torch.nn.functional.grouped_mm of torch 2.13, which leaves the rows beyond the sum unset.
    """
    _check(x, weight, tokens_per_expert, bias, transposed)
    wide = torch.promote_types(x.dtype, torch.float32)
    expert = row_experts(tokens_per_expert, x.shape[0]).unsqueeze(1)
    experts = weight.shape[0]
    # nan in a row of no expert would reach the gradient of every weight.
    rows = torch.where(expert < experts, x, 0).to(wide)
    y = torch.zeros(x.shape[0], weight.shape[1 if transposed else 2], dtype=wide, device=x.device)
    for index in range(experts):
        matrix = weight[index].to(wide)
        product = rows @ (matrix.t() if transposed else matrix)
        if bias is not None:
            product = product + bias[index].to(wide)
        y = torch.where(expert == index, product, y)
    return y.to(x.dtype)


def row_experts(tokens_per_expert: torch.Tensor, rows: int) -> torch.Tensor:
    """The expert [M] of each row; E for rows beyond the sum."""
    ends = tokens_per_expert.detach().to(torch.int64).cumsum(0)
    return torch.searchsorted(ends, torch.arange(rows, device=ends.device), right=True)


def _check(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, bias: torch.Tensor | None, transposed: bool
) -> None:
    """Refuse shapes that do not fit."""
    sizes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, tokens_per_expert {tuple(counts.shape)}"
    if x.ndim != 2 or weight.ndim != 3 or counts.ndim != 1:
        raise ValueError(
            f"grouped_gemm: x [M, K], weight [E, K, N] and tokens_per_expert [E] were expected; found {sizes}."
        )
    experts, inner, outer = weight.shape
    if transposed:
        inner, outer = outer, inner
    if x.shape[1] != inner or counts.shape[0] != experts:
        raise ValueError(f"grouped_gemm: {sizes} with transposed={transposed} do not fit one another.")
    if bias is not None and bias.shape != (experts, outer):
        raise ValueError(f"grouped_gemm: bias must be of shape {(experts, outer)}; found {tuple(bias.shape)}.")
    if counts.dtype.is_floating_point or counts.dtype == torch.bool:
        raise TypeError(f"grouped_gemm: tokens_per_expert must be integers; found {counts.dtype}.")
