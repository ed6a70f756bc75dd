"""Matrix products of torch_mlu_ops. Legend: a [M, K], b [N, K] or [E, N, K], one expert's rows after another."""

from __future__ import annotations

import torch

from .arguments import check_tensors, refuse_given

__all__ = ["group_gemm", "matmul"]


@torch.no_grad()
def matmul(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    c: torch.Tensor | None,
    act_mode: str,
    alpha: float,
    beta: float,
) -> torch.Tensor:
    """alpha a b^T + beta c + bias."""
    refuse_given("matmul", act_mode=(act_mode, "none"))
    check_tensors("matmul", 2, a, b, bias, c)
    y = alpha * (a.float() @ b.float().t())
    y = y if c is None else y + beta * c.float()
    return (y if bias is None else y + bias.float()).to(a.dtype)


@torch.no_grad()
def group_gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    m_list: torch.Tensor,
    expand_idx: torch.Tensor | None,
    c: torch.Tensor | None,
    alpha: torch.Tensor | None,
    beta: torch.Tensor | None,
    max_m: int,
) -> torch.Tensor:
    """Rows of a, m_list[e] of them for each expert e in turn, times b[e]^T. m_list is int32."""
    refuse_given("group_gemm", expand_idx=(expand_idx, None), c=(c, None), alpha=(alpha, None), beta=(beta, None))
    check_tensors("group_gemm", 2, a, b)
    if m_list.dtype != torch.int32:
        raise RuntimeError(f"torch_mlu_ops.group_gemm takes m_list in int32; {m_list.dtype} was given.")
    if m_list.numel() > 0 and int(m_list.max()) > max_m:
        raise RuntimeError(f"torch_mlu_ops.group_gemm was asked with max_m={max_m}; an expert has {int(m_list.max())}.")
    parts = a.float().split(m_list.tolist())
    return torch.cat([part @ weight.t() for part, weight in zip(parts, b.float(), strict=True)]).to(a.dtype)
