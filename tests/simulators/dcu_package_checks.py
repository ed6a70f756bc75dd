"""flash_attn, lightop and apex of a simulated DCU; run by test_dcu_device.py."""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from llm_adapt.simulators import SimulatorError
from tests.simulators.dcu_process import check


def halves(*shape: int, seed: int = 0) -> torch.Tensor:
    """Random bfloat16 on the device, wanting a gradient."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16().cuda().requires_grad_()


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool) -> torch.Tensor:
    """Attention of [B, S, H, D] by torch on the CPU in float64, causal aligned at the bottom right."""
    q, k, v = (x.detach().cpu().double().transpose(1, 2) for x in (q, k, v))
    mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2]) if causal else None
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True).transpose(1, 2)


@check
def versions() -> None:
    """flash_attn says 2.6.1 and its wheel 2.8.3+das; apex has metadata too."""
    flash = importlib.import_module("flash_attn")
    assert flash.__version__ == "2.6.1"
    assert importlib.metadata.version("flash_attn") == importlib.metadata.version("flash-attn")
    assert importlib.metadata.version("flash_attn").startswith("2.8.3+das")
    assert importlib.metadata.version("apex") == "1.7.0+das.opt2.dtk2604"
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("lightop")


@check
def flash_attention() -> None:
    """flash_attn_func computes attention and its gradients, grouped, causal, in both layouts."""
    from flash_attn import flash_attn_func

    q, k, v = halves(2, 5, 4, 16), halves(2, 7, 2, 16, seed=1), halves(2, 7, 2, 16, seed=2)
    for causal in (False, True):
        out = flash_attn_func(q, k, v, causal=causal)
        torch.testing.assert_close(out.detach().cpu().double(), plain(q, k, v, causal), rtol=2e-2, atol=1e-2)
        again = flash_attn_func(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal, bhsd=True)
        assert torch.equal(again.transpose(1, 2), out)
    out, lse, probabilities = flash_attn_func(q, k, v, return_attn_probs=True)
    assert (lse.shape, lse.dtype, lse.requires_grad, probabilities) == ((2, 4, 5), torch.float32, False, None)
    gradients = torch.autograd.grad(out.float().square().sum(), (q, k, v))
    assert all(bool(g.isfinite().all()) and float(g.abs().sum()) > 0 for g in gradients)
    assert flash_attn_func(*(halves(1, 3, 1, 512) for _ in range(3))).shape[-1] == 512


@check
def flash_attention_packed() -> None:
    """flash_attn_varlen_func is the dense one of each sequence; what lies behind the last is not written."""
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    q, k = halves(8, 2, 8), halves(8, 2, 8, seed=1)
    ends = torch.tensor([0, 2, 6], dtype=torch.int32, device="cuda")
    out = flash_attn_varlen_func(q, k, k, ends, ends, 4, 4, causal=True)
    for start, end in ((0, 2), (2, 6)):
        dense = flash_attn_func(q[None, start:end], k[None, start:end], k[None, start:end], causal=True)
        assert torch.equal(out[start:end], dense[0])
    assert bool(out[6:].isnan().all())
    (gradient,) = torch.autograd.grad(out[:6].float().sum(), q)
    assert gradient.isnan().any(-1).any(-1).tolist() == [False] * 6 + [True] * 2
    with pytest.raises(RuntimeError, match="longer than max_seqlen"):
        flash_attn_varlen_func(q, k, k, ends, ends, 3, 4)
    with pytest.raises(RuntimeError, match="int32"):
        flash_attn_varlen_func(q, k, k, ends.long(), ends, 4, 4)
    with pytest.raises(SimulatorError, match="block_table"):
        flash_attn_varlen_func(q, k, k, ends, ends, 4, 4, block_table=ends)


@check
def flash_attention_dropout() -> None:
    """Dropout of flash attention follows the device's generator."""
    from flash_attn import flash_attn_func

    q = halves(1, 8, 2, 8)
    torch.cuda.manual_seed(1)
    first = flash_attn_func(q, q, q, dropout_p=0.5)
    torch.cuda.manual_seed(1)
    assert torch.equal(first, flash_attn_func(q, q, q, dropout_p=0.5))
    assert not torch.equal(first, flash_attn_func(q, q, q, dropout_p=0.5))


@check
def flash_attention_limits() -> None:
    """Head sizes, dtypes, heads, sinks and unknown arguments are refused."""
    from flash_attn import flash_attn_func, flash_attn_qkvpacked_func, flash_attn_with_mask_func

    q = halves(1, 3, 2, 8)
    sinks = torch.zeros(2, dtype=torch.bfloat16, device="cuda")
    assert flash_attn_func(q, q, q, s_aux=sinks).shape == q.shape
    wide, many = halves(1, 1, 1, 520), halves(1, 1, 65, 8)
    refusals: list[tuple[str, Any]] = [
        ("at most 512", lambda: flash_attn_func(wide, wide, wide)),
        ("fp16 and bf16", lambda: flash_attn_func(q.float(), q.float(), q.float())),
        ("must divide", lambda: flash_attn_func(q[:, :, :1], q, q)),
        ("CUDA device", lambda: flash_attn_func(q.cpu(), q.cpu(), q.cpu())),
        ("dtype of q", lambda: flash_attn_func(q, q, q, s_aux=sinks.float())),
        ("up to 64 heads", lambda: flash_attn_func(many, many, many, s_aux=sinks.repeat(33)[:65])),
        ("wants a gradient", lambda: flash_attn_func(q, q, q, s_aux=sinks.clone().requires_grad_())),
        ("return_attn_probs with dropout", lambda: flash_attn_func(q, q, q, 0.5, return_attn_probs=True)),
        ("dtype fp32", lambda: flash_attn_func(q, q, q, alibi_slopes=sinks)),
        ("flash_attn_qkvpacked_func was called", lambda: flash_attn_qkvpacked_func(q)),
        ("flash_attn_with_mask_func was called", lambda: flash_attn_with_mask_func(q)),
    ]
    for message, act in refusals:
        with pytest.raises(RuntimeError, match=message):
            act()
    with pytest.raises(TypeError, match="learnable"):
        flash_attn_func(q, q, q, learnable=1)
    with pytest.raises(ImportError, match="flash_attn_with_kvcache"):
        from flash_attn import flash_attn_with_kvcache  # noqa: F401
    with pytest.raises(AttributeError, match="_flash_attn_forward"):
        _ = importlib.import_module("flash_attn.flash_attn_interface")._flash_attn_forward
    with pytest.raises(AttributeError, match="varlen_fwd"):
        _ = importlib.import_module("flash_attn_2_cuda").varlen_fwd


@check
def lightop_norm() -> None:
    """lightop's RMSNorm writes its buffer, and its backward gives the gradients of the formula."""
    lightop = importlib.import_module("lightop")
    x, weight = torch.randn(2, 3, 8, device="cuda"), torch.rand(8, device="cuda")
    buffer = torch.empty_like(x)
    y, rsigma = lightop.rmsnorm_forward(x, weight, buffer, 1e-6, training=True)
    assert y is buffer
    leaf, gamma = x.cpu().double().requires_grad_(), weight.cpu().double().requires_grad_()
    expected = F.rms_norm(leaf, (8,), gamma, 1e-6)
    torch.testing.assert_close(y.cpu().double(), expected, rtol=1e-5, atol=1e-6)
    gradient = torch.randn(2, 3, 8)
    wanted = torch.autograd.grad(expected, (leaf, gamma), gradient.double())
    for found, theirs in zip(lightop.rmsnorm_backward(gradient.cuda(), x, rsigma, weight), wanted, strict=True):
        torch.testing.assert_close(found.cpu().double(), theirs, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="one dtype"):
        lightop.rmsnorm_forward(x, weight.half(), buffer, 1e-6)
    with pytest.raises(RuntimeError, match="contiguous"):
        lightop.rmsnorm_forward(x.transpose(0, 1), weight, buffer, 1e-6)
    with pytest.raises(AttributeError, match="layernorm_forward"):
        _ = lightop.layernorm_forward


@check
def apex_adam() -> None:
    """FusedAdam steps as torch's AdamW, and refuses what it has not."""
    from apex.optimizers import FusedAdam

    start = torch.randn(5, 3)
    mine, theirs = (start.clone().cuda().requires_grad_() for _ in range(2))
    fused = FusedAdam([mine], lr=0.1, weight_decay=0.1)
    usual = torch.optim.AdamW([theirs], lr=0.1, weight_decay=0.1)
    for step in range(5):
        mine.grad = torch.full_like(mine, 0.3 + step)
        theirs.grad = mine.grad.clone()
        fused.step()
        usual.step()
    torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError, match="AMSGrad"):
        FusedAdam([mine], amsgrad=True)
    with pytest.raises(SimulatorError, match="capturable"):
        FusedAdam([mine], capturable=True)


@check
def apex_lists() -> None:
    """amp_C scales lists and takes their norm, and sets its flag on numbers that are not finite."""
    amp_c = importlib.import_module("amp_C")
    applier = importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier
    flag = torch.zeros(1, dtype=torch.int32, device="cuda")
    tensors = [torch.full((2,), 3.0, device="cuda"), torch.full((1,), 4.0, device="cuda")]
    norm, each = applier(amp_c.multi_tensor_l2norm, flag, [tensors], True)
    torch.testing.assert_close((norm.item(), each.tolist()), (34**0.5, [18**0.5, 4.0]))
    targets = [torch.empty_like(tensor) for tensor in tensors]
    applier(amp_c.multi_tensor_scale, flag, [tensors, targets], 0.5)
    assert (targets[0].tolist(), flag.item()) == ([1.5, 1.5], 0)
    applier(amp_c.multi_tensor_scale, flag, [[torch.full((1,), torch.inf, device="cuda")], targets[1:]], 1.0)
    assert flag.item() == 1
    with pytest.raises(RuntimeError, match="2 lists"):
        applier(amp_c.multi_tensor_scale, flag, [tensors], 1.0)
    with pytest.raises(AttributeError, match="multi_tensor_lamb"):
        _ = amp_c.multi_tensor_lamb


@check
def apex_layers() -> None:
    """LayerNorm and the accumulation of weight gradients compute their formulas; other parts are not there."""
    from apex.normalization import FusedLayerNorm

    x = torch.randn(3, 8, device="cuda", requires_grad=True)
    norm = FusedLayerNorm(8).cuda()
    torch.testing.assert_close(norm(x), F.layer_norm(x, (8,)))
    norm(x).square().sum().backward()
    expected = norm.weight.grad
    assert expected is not None
    function = importlib.import_module("apex.normalization.fused_layer_norm").FusedLayerNormAffineFunction
    norm.weight.grad = None
    function.apply(x, norm.weight, norm.bias, (8,), 1e-5, False).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, expected)
    fused = importlib.import_module("fused_weight_gradient_mlp_cuda")
    rows, gradients = torch.randn(4, 3, device="cuda").half(), torch.randn(4, 2, device="cuda").half()
    total = torch.ones(2, 3, device="cuda")
    fused.wgrad_gemm_accum_fp32(rows, gradients, total)
    torch.testing.assert_close(total, 1 + gradients.float().t() @ rows.float())
    with pytest.raises(RuntimeError, match="main_grad"):
        fused.wgrad_gemm_accum_fp16(rows, gradients, total)
    with pytest.raises(AttributeError, match="fused_rms_norm"):
        _ = importlib.import_module("apex.normalization.fused_layer_norm").fused_rms_norm
    with pytest.raises(ModuleNotFoundError, match=r"apex\.mlp"):
        importlib.import_module("apex.mlp")
