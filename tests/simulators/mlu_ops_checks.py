"""torch_mlu_ops on a simulated MLU; run by test_mlu_device.py."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch_mlu_ops as tmo
from torch.nn import functional as F

from tests.simulators.mlu_process import check


def numbers(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random numbers on the device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("mlu", dtype)


@check
def norms() -> None:
    """fused_rms_norm and fused_layer_norm are PyTorch's norms of x + residual, and hand back the sum."""
    x, residual, gamma, beta = numbers(4, 8), numbers(4, 8, seed=1), numbers(8, seed=2), numbers(8, seed=3)
    y, h = tmo.fused_rms_norm(x, residual, gamma, None, None, 1e-6, True)
    torch.testing.assert_close(h, x + residual)
    torch.testing.assert_close(y, F.rms_norm(h, (8,), gamma, 1e-6))
    y = tmo.fused_layer_norm(x, None, gamma, beta, None, 1e-5, False)
    torch.testing.assert_close(y, F.layer_norm(x, (8,), gamma, beta, 1e-5))


@check
def activations() -> None:
    """active multiplies silu of the first half by the second."""
    x = numbers(4, 8, dtype=torch.bfloat16)
    gate, linear = x.float().chunk(2, -1)
    torch.testing.assert_close(tmo.active(x, "silu", True), (F.silu(gate) * linear).bfloat16())
    torch.testing.assert_close(tmo.active(x, "silu", False), F.silu(x.float()).bfloat16())
    for mode in ("gelu", "swish", "relu"):
        with pytest.raises(NotImplementedError, match=mode):
            tmo.active(x, mode, True)


@check
def flash_attention() -> None:
    """flash_attention is scaled_dot_product_attention over batches and packed sequences, with fewer KV heads."""
    q, k, v = numbers(2, 6, 4, 8), numbers(2, 6, 2, 8, seed=1), numbers(2, 6, 2, 8, seed=2)
    wide = [x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v)]
    expected = F.scaled_dot_product_attention(q.transpose(1, 2), *wide, is_causal=True, scale=0.3).transpose(1, 2)
    y, lse = tmo.flash_attention(q, k, v, None, None, None, None, None, 6, 6, 0.3, True, return_lse=True)
    torch.testing.assert_close(y, expected)
    assert lse.shape == (2, 4, 6)
    starts = torch.tensor([0, 6, 12], dtype=torch.int32, device="mlu")
    out = torch.empty(12, 4, 8, device="mlu")
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    assert tmo.flash_attention(*packed, out, starts, starts, None, None, 6, 6, 0.3, True) is out
    torch.testing.assert_close(out, expected.flatten(0, 1))
    with pytest.raises(NotImplementedError, match="window_size_left"):
        tmo.flash_attention(q, k, v, None, None, None, None, None, 6, 6, 0.3, True, 3)
    with pytest.raises(NotImplementedError, match="which corner"):
        tmo.flash_attention(q[:, :3].contiguous(), k, v, None, None, None, None, None, 3, 6, 0.3, True)
    with pytest.raises(RuntimeError, match="int32"):
        tmo.flash_attention(*packed, None, starts.long(), starts, None, None, 6, 6, 0.3, True)
    with pytest.raises(RuntimeError, match="max_seq_len_kv=5; a sequence has 6"):
        tmo.flash_attention(*packed, None, starts, starts, None, None, 6, 5, 0.3, True)


@check
def matrices() -> None:
    """matmul and group_gemm multiply by the transposed weight, of each expert in turn."""
    a, b, c = numbers(4, 8), numbers(3, 8, seed=1), numbers(4, 3, seed=2)
    torch.testing.assert_close(tmo.matmul(a, b, None, c, "none", 2.0, 0.5), 2 * a @ b.t() + 0.5 * c)
    experts, rows = numbers(2, 3, 8), torch.tensor([1, 3], dtype=torch.int32, device="mlu")
    y = tmo.group_gemm(a, experts, rows, None, None, None, None, 3)
    torch.testing.assert_close(y, torch.cat([a[:1] @ experts[0].t(), a[1:] @ experts[1].t()]))
    with pytest.raises(RuntimeError, match="m_list in int32"):
        tmo.group_gemm(a, experts, rows.long(), None, None, None, None, 3)
    with pytest.raises(RuntimeError, match="max_m=2; an expert has 3"):
        tmo.group_gemm(a, experts, rows, None, None, None, None, 2)


@check
def routing() -> None:
    """moe_softmax_topk gives the largest probabilities and their experts."""
    weights, experts = tmo.moe_softmax_topk(numbers(4, 8), 2, True)
    torch.testing.assert_close(weights.sum(-1).cpu(), torch.ones(4))
    assert (experts.dtype, experts.shape) == (torch.int32, (4, 2))
    with pytest.raises(NotImplementedError, match="num_expert_group"):
        tmo.moe_softmax_topk(numbers(4, 8), 2, True, num_expert_group=2)


@check
def nothing_has_a_backward() -> None:
    """Every result is cut off from autograd: torch_mlu_ops is for inference."""
    x, gamma = numbers(4, 8).requires_grad_(), numbers(8).requires_grad_()
    assert not tmo.fused_rms_norm(x, None, gamma, None, None, 1e-6, False).requires_grad
    assert not tmo.active(x, "silu", True).requires_grad


@check
def limits_raise() -> None:
    """Arguments without a public meaning, other devices, dtypes and layouts raise, and so do unknown names."""
    x, gamma = numbers(4, 8), numbers(8)
    given: dict[str, Any] = {"quant_scale": gamma, "out": x, "dynamic_quant": True, "mx_quant": True}
    for name, value in (given | {"store_output_after_norm": True}).items():
        with pytest.raises(NotImplementedError, match=name):
            tmo.fused_rms_norm(x, None, gamma, None, None, 1e-6, False, **{name: value})
    with pytest.raises(NotImplementedError, match="gamma_add_coef"):
        tmo.fused_layer_norm(x, None, gamma, None, None, 1e-6, False, gamma_add_coef=1.0)
    with pytest.raises(TypeError, match="unexpected keyword"):
        tmo.fused_rms_norm(x, None, gamma, None, None, 1e-6, False, variant="gemma")
    for bad in (x.cpu(), x.double(), x.t()):
        with pytest.raises(RuntimeError, match="fused_rms_norm takes"):
            tmo.fused_rms_norm(bad, None, None, None, None, 1e-6, False)
    with pytest.raises(NotImplementedError, match="apply_rotary exists"):
        tmo.apply_rotary(x)
    with pytest.raises(AttributeError, match="not recorded"):
        tmo.rotary  # noqa: B018
