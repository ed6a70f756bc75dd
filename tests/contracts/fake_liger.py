"""What Liger-Kernel's functions compute, in float64, and where they write into what they are given."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from tests.contracts.recording import demand

__all__ = ["FUNCTIONS"]

OVERWRITTEN = 12345.0


class _Overwritten(torch.autograd.Function):
    """x; backward leaves its gradient, here a mark, in the memory of x."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        demand(x.is_contiguous(), "takes contiguous tensors here: of others Liger makes copies itself")
        ctx.memory = x.detach()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        ctx.memory.fill_(OVERWRITTEN)
        return g


def _norm(x: Any, w: Any, eps: float, offset: float, casting_mode: str, in_place: bool) -> torch.Tensor:
    demand(not in_place, "with in_place the incoming gradient becomes that of x")
    demand(casting_mode in ("llama", "gemma"), f"casting_mode={casting_mode!r} is not faked")
    demand(x.dtype == w.dtype and w.shape == x.shape[-1:], "weight has the dtype and last axis of x")
    y = x.double() * (x.double().square().mean(-1, keepdim=True) + eps).rsqrt()
    y = y.to(x.dtype).double() if casting_mode == "llama" else y
    return (y * (w.double() + offset)).to(x.dtype)


def liger_rms_norm(X: Any, W: Any, eps: float, **a: Any) -> torch.Tensor:
    """RMSNorm with weight + offset; "llama" rounds before the weight."""
    return _norm(X, W, eps, **a)


def liger_fused_add_rms_norm(X: Any, R: Any, W: Any, eps: float, **a: Any) -> Any:
    """The same of X + R, and the sum."""
    h = X + R
    return _norm(h, W, eps, **a), h


def liger_layer_norm(X: Any, W: Any, B: Any, eps: float) -> torch.Tensor:
    """LayerNorm with weight and bias."""
    return F.layer_norm(X.double(), X.shape[-1:], W.double(), B.double(), eps).to(X.dtype)


def liger_swiglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """silu(a) b; backward overwrites a and b."""
    return (F.silu(_Overwritten.apply(a).double()) * _Overwritten.apply(b).double()).to(a.dtype)


def liger_geglu(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """gelu(a) b by tanh; backward overwrites a and b."""
    gate = F.gelu(_Overwritten.apply(a).double(), approximate="tanh")
    return (gate * _Overwritten.apply(b).double()).to(a.dtype)


class _Output(NamedTuple):
    loss: torch.Tensor
    z_loss: torch.Tensor


def liger_cross_entropy(input: torch.Tensor, target: torch.Tensor, **a: Any) -> Any:
    """Cross entropy in the dtype of the logits, whose memory then holds their gradient."""
    unused = ("size_average", "reduce", "return_token_accuracy", "weight")
    demand(not any(a[name] for name in unused), f"{unused} are not faked")
    demand(input.ndim == 2 and target.dtype == torch.int64, "logits [N, V] and int64 targets")
    c = input.double()
    c = c if a["softcap"] is None else a["softcap"] * torch.tanh(c / a["softcap"])
    rows = F.cross_entropy(
        c, target, ignore_index=a["ignore_index"], reduction="none", label_smoothing=a["label_smoothing"]
    )
    counted = target != a["ignore_index"]
    z = torch.where(counted, a["lse_square_scale"] * c.logsumexp(-1).square(), 0.0)
    found = [rows + z, z]
    if a["reduction"] != "none":
        found = [row.sum() / (counted.sum() if a["reduction"] == "mean" else 1) for row in found]
    with torch.no_grad():
        input.detach().fill_(OVERWRITTEN)
    loss, z = (value.to(input.dtype) for value in found)
    return _Output(loss, z) if a["return_z_loss"] else loss


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("liger_")}
