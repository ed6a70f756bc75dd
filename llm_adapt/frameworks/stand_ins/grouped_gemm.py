"""grouped_gemm: a matrix product with one weight for each group of rows.

M rows, sorted by group, E groups, K and N columns before and after; batch_sizes [E] rows of each group.
"""

from __future__ import annotations

from types import ModuleType

import torch

from llm_adapt.ops.grouped_gemm import grouped_gemm

__all__ = ["gmm", "modules"]


def gmm(
    a: torch.Tensor, b: torch.Tensor, batch_sizes: torch.Tensor, trans_b: bool = False, trans_a: bool = False
) -> torch.Tensor:
    """y[m] = a[m] @ b[e], e = group of row m; trans_b: @ b[e]^T; trans_a: y[e] = a_e^T @ b_e, of the rows of group e.

    Shapes: a [M, K], b [E, K, N], with trans_b [E, N, K] -> y [M, N]; trans_a: a [M, K], b [M, N] -> y [E, K, N].
    Dtypes: that of a, also float32, which the package refuses.
    batch_sizes: integers on any device. trans_a reads them on the host. Groups without rows give gradients of 0.
    Raises: ValueError for both transpositions, and for shapes that do not fit.
    Source: grouped_gemm.ops.gmm(a, b, batch_sizes, trans_b) and its backend's trans_a (contract);
        Megatron-Core 0.16 core/transformer/moe/experts.py, GroupedMLP.
    """
    if not trans_a:
        return grouped_gemm(a, b, batch_sizes.to(a.device), transposed=trans_b)
    sizes = batch_sizes.tolist()
    if trans_b or a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[0] == sum(sizes):
        raise ValueError(
            f"gmm: trans_a takes a [M, K] and b [M, N] with the M rows of batch_sizes, and no trans_b; found "
            f"{tuple(a.shape)}, {tuple(b.shape)}, {sum(sizes)} rows, trans_b={trans_b}."
        )
    products = [rows.t() @ columns for rows, columns in zip(a.split(sizes), b.split(sizes), strict=True)]
    return torch.stack(products) if products else a.new_zeros(0, a.shape[1], b.shape[1])


def modules() -> dict[str, ModuleType]:
    """The package, with its `ops`."""
    package, ops = ModuleType("grouped_gemm", __doc__), ModuleType("grouped_gemm.ops", __doc__)
    package.__path__ = []
    ops.gmm = gmm  # type: ignore[attr-defined]
    package.ops = ops  # type: ignore[attr-defined]
    return {"grouped_gemm": package, "grouped_gemm.ops": ops}
