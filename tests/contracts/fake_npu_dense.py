"""What torch_npu documents of its norms, rotary embedding, activations, softmax and loss, in float64.

Limits: op-plugin documents of torch_npu 2.13 (Atlas A2 and A3). T = rows, H = hidden size, D = head size.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.nn import functional as F

from tests.contracts.recording import demand

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (torch.float32, *HALVES)


def _floats(name: str, *tensors: torch.Tensor) -> None:
    demand(all(t.dtype in FLOATS for t in tensors), f"{name} takes float32, float16 and bfloat16")


def _in_backward(y: torch.Tensor, holds: bool, message: str) -> None:
    """Raise as demand does, when the gradient of a result arrives."""
    if y.requires_grad:
        y.register_hook(lambda gradient: demand(holds, message))


def _norm_types(name: str, x: torch.Tensor, gamma: torch.Tensor) -> None:
    _floats(name, x, gamma)
    demand(gamma.dtype in (x.dtype, torch.float32), f"{name}: gamma {gamma.dtype} does not go with x {x.dtype}")
    demand(gamma.shape == x.shape[x.ndim - gamma.ndim :], f"{name}: gamma has not the trailing axes of x")


def npu_rms_norm(input: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> Any:
    """y = x rstd gamma, and rstd in float32; y alone has a gradient."""
    _norm_types("npu_rms_norm", input, gamma)
    demand(2 <= input.ndim <= 8, "npu_rms_norm takes 2 to 8 axes")
    x, axes = input.double(), tuple(range(-gamma.ndim, 0))
    rstd = (x.square().mean(axes, keepdim=True) + epsilon).rsqrt()
    return (x * rstd * gamma.double()).to(input.dtype), rstd.detach().float()


def npu_rms_norm_backward(dy: torch.Tensor, input: torch.Tensor, gamma: torch.Tensor, rstd: torch.Tensor) -> Any:
    """dx in the dtype of x, dgamma in float32, from the rstd that is given."""
    _norm_types("npu_rms_norm_backward", input, gamma)
    demand(dy.dtype == input.dtype and dy.shape == input.shape, "dy has not the dtype and shape of x")
    demand(rstd.dtype == torch.float32 and rstd.shape == (*input.shape[:-1], 1), "rstd is not [..., 1] in float32")
    x_hat, g = input.double() * rstd.double(), dy.double() * gamma.double()
    dx = rstd.double() * (g - x_hat * (g * x_hat).mean(-1, keepdim=True))
    return dx.to(input.dtype), (dy.double() * x_hat).flatten(0, -2).sum(0).float()


def npu_add_rms_norm(x1: torch.Tensor, x2: torch.Tensor, gamma: torch.Tensor, epsilon: float) -> Any:
    """x = x1 + x2 in their dtype, y = rms_norm(x) gamma; returns y, rstd, x."""
    demand(x1.dtype == x2.dtype == gamma.dtype and x1.shape == x2.shape, "npu_add_rms_norm takes one dtype and shape")
    _norm_types("npu_add_rms_norm", x1, gamma)
    demand(1 <= x1.ndim <= 8 and x1.numel() > 0, "npu_add_rms_norm takes 1 to 8 axes and no empty tensor")
    wide = x1.double() + x2.double()
    rstd = (wide.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return (wide * rstd * gamma.double()).to(x1.dtype), rstd.float(), wide.to(x1.dtype)


# Layout of x of four axes: axes of batch and heads; axes of size 1 of the tables that half takes, and that interleave.
_LAYOUTS = {
    "BNSD": (0, 1, ({0, 1}, {1}, set()), ({0, 1},)),
    "BSND": (0, 2, ({0, 2}, {2}, set()), ({0, 2},)),
    "SBND": (1, 2, ({1, 2}, {2}, set()), ({1, 2},)),
}


def _batch_and_heads(x: torch.Tensor, table: torch.Tensor, mode: str) -> list[tuple[int, int]]:
    """B and N of every documented layout that the shapes fit."""
    if x.ndim == 3:
        demand(table.shape[0] == x.shape[0], "x of three axes is TND, with tables T1D or TND")
        demand(mode == "half" or table.shape[1] == 1, "interleave takes tables T1D")
        return [(1, x.shape[1])]
    found = []
    for batch, heads, half, interleave in _LAYOUTS.values():
        for ones in half if mode == "half" else interleave:
            if all(table.shape[axis] == (1 if axis in ones else x.shape[axis]) for axis in range(3)):
                found.append((x.shape[batch], x.shape[heads]))
    demand(found != [], f"tables {list(table.shape)} fit no documented layout")
    return found


def _turned(x: torch.Tensor, mode: str) -> torch.Tensor:
    if mode == "half":
        first, second = x.chunk(2, -1)
        return torch.cat([-second, first], -1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], -1).flatten(-2)


def npu_rotary_mul(
    input: torch.Tensor, r1: torch.Tensor, r2: torch.Tensor, rotary_mode: str, rotate: torch.Tensor | None
) -> torch.Tensor:
    """x cos + turned(x) sin; the tables are silently cast to the dtype of x."""
    _floats("npu_rotary_mul", input, r1, r2)
    size = input.shape[-1]
    demand(rotary_mode in ("half", "interleave") and rotate is None, "rotary_mode is 'half' or 'interleave'")
    demand(size % 2 == 0 and size < 896, f"npu_rotary_mul takes an even head size below 896, not {size}")
    demand(r1.shape == r2.shape and r1.ndim == input.ndim and r1.shape[-1] == size, "cos and sin must have full D")
    demand(all(a in (1, b) for a, b in zip(r1.shape, input.shape, strict=True)), "cos and sin do not broadcast to x")
    sizes = _batch_and_heads(input, r1, rotary_mode)
    sizes = [(b, n) for b, n in sizes if b < 1000 and n < 1000 and (rotary_mode == "half" or b * n < 1000)]
    demand(sizes != [], "B and N must be below 1000, and B N too where pairs are interleaved")
    cos, sin = r1.to(input.dtype).double(), r2.to(input.dtype).double()
    x = input.double()
    y = (x * cos + _turned(x, rotary_mode) * sin).to(input.dtype)
    if r1.requires_grad or r2.requires_grad:
        fits = any(b * n <= 1024 for b, n in sizes)
        _in_backward(y, fits, "B N must be at most 1024 where cos and sin need a gradient")
    return y


def npu_swiglu(input: torch.Tensor, dim: int) -> torch.Tensor:
    """silu(first half) second half."""
    _floats("npu_swiglu", input)
    demand(input.shape[dim] % 2 == 0 and input.is_contiguous(), "npu_swiglu takes a contiguous tensor, even along dim")
    gate, linear = input.double().chunk(2, dim)
    return (F.silu(gate) * linear).to(input.dtype)


def npu_geglu(input: torch.Tensor, dim: int, approximate: int, activate_left: bool) -> Any:
    """gelu of one half times the other, and the gelu; approximate: 0 = erf, 1 = tanh."""
    _floats("npu_geglu", input)
    demand(approximate in (0, 1) and input.shape[dim] % 2 == 0, "npu_geglu: approximate is 0 or 1, dim even")
    first, second = input.double().chunk(2, dim)
    gate, linear = (first, second) if activate_left else (second, first)
    gelu = F.gelu(gate, approximate=("none", "tanh")[approximate])
    return (gelu * linear).to(input.dtype), gelu.to(input.dtype).detach()


def npu_gelu(input: torch.Tensor, approximate: str) -> torch.Tensor:
    """gelu by erf ("none") or tanh."""
    _floats("npu_gelu", input)
    demand(approximate in ("none", "tanh"), f"npu_gelu: approximate={approximate!r}")
    return F.gelu(input.double(), approximate=approximate).to(input.dtype)


def npu_fast_gelu(input: torch.Tensor) -> torch.Tensor:
    """x sigmoid(1.702 x)."""
    _floats("npu_fast_gelu", input)
    return (input.double() * torch.sigmoid(1.702 * input.double())).to(input.dtype)


class _Softmax(torch.autograd.Function):
    """softmax(x scale where not masked): backward multiplies by scale, as npu_scaled_masked_softmax_backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        y = (x.double() * scale).masked_fill(mask, -math.inf).softmax(-1)
        ctx.save_for_backward(y, mask)
        ctx.scale, ctx.dtype = scale, x.dtype
        return y.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> Any:
        y, mask = ctx.saved_tensors
        g = dy.double()
        dx = ctx.scale * y * (g - (g * y).sum(-1, keepdim=True))
        return dx.masked_fill(mask, 0.0).to(ctx.dtype), None, None


def npu_scaled_masked_softmax(x: torch.Tensor, mask: torch.Tensor, scale: float, fixed_triu_mask: bool) -> torch.Tensor:
    """softmax(x scale), True = masked; with fixed_triu_mask the mask is the upper triangle, whatever is given."""
    _floats("npu_scaled_masked_softmax", x)
    demand(x.ndim == 4, "npu_scaled_masked_softmax takes four axes")
    demand(all(32 <= n <= 4096 and n % 32 == 0 for n in x.shape[-2:]), "the last two axes: 32 to 4096, in steps of 32")
    demand(mask.dtype == torch.bool and mask.ndim == 4, "the mask is bool of four axes")
    demand(all(a in (1, b) for a, b in zip(mask.shape, x.shape, strict=True)), "the mask does not broadcast to x")
    if fixed_triu_mask:
        mask = torch.ones(x.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
    demand(not bool(mask.expand_as(x).all(-1).any()), "a row is masked as a whole, for which nothing is documented")
    return _Softmax.apply(x, mask, scale)


def npu_cross_entropy_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None,
    reduction: str,
    ignore_index: int,
    label_smoothing: float,
    lse_square_scale_for_zloss: float,
    return_zloss: bool,
) -> Any:
    """(loss, log_prob, zloss, lse_for_zloss); the loss has shape [1] unless reduction is "none"."""
    _floats("npu_cross_entropy_loss", input)
    demand(input.ndim == 2 and target.shape == input.shape[:1], "logits are [N, C] and targets [N]")
    demand(target.dtype == torch.int64 and input.shape[0] <= 200_000, "targets are int64, at most 200000")
    demand(lse_square_scale_for_zloss == 0.0 and not return_zloss, "zloss is not supported")
    demand(ignore_index < input.shape[1], f"ignore_index={ignore_index} is not below C")
    logits = input.double()
    chosen = None if weight is None else weight.double()
    loss = F.cross_entropy(
        logits, target, chosen, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
    plain = reduction != "mean" or (weight is None and ignore_index == -100)
    _in_backward(loss, plain, "the gradient of 'mean' takes only the default weight and ignore_index")
    _in_backward(loss, label_smoothing == 0.0, "there is no gradient of label smoothing")
    log_prob = logits.log_softmax(-1).detach().to(input.dtype)
    empty = input.new_empty(0)
    return (loss if reduction == "none" else loss.reshape(1)).to(input.dtype), log_prob, empty, empty


def npu_dynamic_quant(
    input: torch.Tensor,
    smooth_scales: torch.Tensor | None,
    group_index: torch.Tensor | None,
    dst_type: Any,
    quant_mode: str,
    dst_type_max: float,
) -> Any:
    """int8 by token: scale = amax / 127, y = round(x / scale), both in float32 as documented."""
    demand(input.dtype in HALVES, "npu_dynamic_quant takes float16 and bfloat16")
    demand(group_index is None and dst_type in (None, torch.int8), "only int8 without groups is faked")
    demand(quant_mode == "pertoken", f"npu_dynamic_quant: quant_mode={quant_mode!r} is not faked")
    if smooth_scales is not None:
        demand(
            smooth_scales.dtype == input.dtype and smooth_scales.shape == input.shape[-1:], "smooth_scales: as x [H]"
        )
    x = input.float() if smooth_scales is None else input.float() * smooth_scales.float()
    scale = x.abs().amax(-1, keepdim=True) / 127
    y = torch.where(scale > 0, x / scale, 0.0).round().clamp(-128, 127)
    return y.to(torch.int8), scale.squeeze(-1)


def npu_quant_matmul(x1: torch.Tensor, x2: torch.Tensor, scale: torch.Tensor, **a: Any) -> torch.Tensor:
    """(x1 @ x2) scale pertoken_scale in output_dtype, which is int8 unless given."""
    given = {name for name, value in a.items() if value is not None}
    demand(given <= {"pertoken_scale", "output_dtype"}, f"npu_quant_matmul: {given} are not faked")
    demand(x1.dtype == x2.dtype == torch.int8 and x1.ndim == x2.ndim == 2, "x1 and x2 are int8 matrices")
    demand(max(*x1.shape[1:], *x2.shape) <= 65535, "the last axes are at most 65535")
    demand(a["output_dtype"] in HALVES, "output_dtype is int8 unless float16 or bfloat16 is given")
    demand(scale.dtype == torch.float32 and scale.shape == x2.shape[1:], "scale is float32 [N]")
    rows = a["pertoken_scale"]
    demand(rows is not None and rows.dtype == torch.float32 and rows.shape == x1.shape[:1], "pertoken_scale is [M]")
    return (x1.double() @ x2.double() * scale.double() * rows.double()[:, None]).to(a["output_dtype"])


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("npu_")}
