"""Kernels of Liger-Kernel, in Triton. x [..., H], or gate and linear part [..., D]; logits [..., V].

Source: the functions of liger_kernel.transformers.functional 0.6. Some of them write into what they are given: the
gradients of swiglu and geglu into the saved inputs, that of the cross entropy into the logits, and that of the norms
into the incoming gradient unless in_place=False. An op never changes its inputs, so such functions are given copies
here. liger_rope is left out: it turns query and key in their own memory, both at once.

Liger-Kernel 0.6.4 passed the proofs of float32 and float16 in Triton 3.5.1's interpreter on a CPU; not run on a GPU.
"""

from __future__ import annotations

from typing import Literal

import torch
from liger_kernel.transformers import functional as liger

from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["add_rms_norm", "cross_entropy", "glu", "layer_norm", "rms_norm"]

_WIDEST = 65536  # columns that one program holds
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _rows(call: Call, widest: int = _WIDEST) -> str | None:
    """What every kernel here refuses."""
    first = next(iter(call.tensors.values()))
    if any(tensor.dtype.is_floating_point and tensor.dtype not in _FLOATS for tensor in call.tensors.values()):
        return "takes float32, float16 and bfloat16"
    if 0 in first.shape:
        return "takes no empty tensors"
    if first.shape[-1] > widest:
        return f"takes at most {widest} columns"
    return None


def _norm(call: Call) -> str | None:
    if call.weight is None or any(tensor.dtype != call.x.dtype for tensor in call.tensors.values()):
        return "takes a weight, and tensors of one dtype"
    if call.options.get("form") == "one_plus_rounded":
        return "adds 1 to the weight in float32"
    if "bias" in call.options and call.bias is None:
        return "takes a bias"
    return _rows(call)


def _mode(form: str) -> dict[str, float | str | bool]:
    """ "llama" rounds before it multiplies by the weight; "gemma" rounds once."""
    return {
        "offset": 1.0 if form == "one_plus" else 0.0,
        "casting_mode": "llama" if form == "cast_first" else "gemma",
        "in_place": False,
    }


@kernel("rms_norm", "liger_rms_norm of Liger-Kernel 0.6", refuses=_norm)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Literal["standard", "cast_first", "one_plus", "one_plus_rounded"] = "standard",
) -> torch.Tensor:
    """liger_rms_norm."""
    y: torch.Tensor = liger.liger_rms_norm(x, weight, eps, **_mode(form))
    return y


@kernel("add_rms_norm", "liger_fused_add_rms_norm of Liger-Kernel 0.6", refuses=_norm)
def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Literal["standard", "cast_first", "one_plus", "one_plus_rounded"] = "standard",
) -> tuple[torch.Tensor, torch.Tensor]:
    """liger_fused_add_rms_norm, which returns the sum too."""
    y, h = liger.liger_fused_add_rms_norm(x, residual, weight, eps, **_mode(form))
    return y, h


@kernel("layer_norm", "liger_layer_norm of Liger-Kernel 0.6", refuses=_norm)
def layer_norm(
    x: torch.Tensor, weight: torch.Tensor | None = None, bias: torch.Tensor | None = None, eps: float = 1e-5
) -> torch.Tensor:
    """liger_layer_norm."""
    y: torch.Tensor = liger.liger_layer_norm(x, weight, bias, eps)
    return y


def _glu_refuses(call: Call) -> str | None:
    if call.activation not in ("silu", "gelu_tanh") or call.layout == "interleaved":
        return "takes silu and gelu_tanh of halves"
    return _rows(call)


@kernel("glu", "liger_swiglu and liger_geglu of Liger-Kernel 0.6", refuses=_glu_refuses)
def glu(
    x: torch.Tensor,
    up: torch.Tensor | None = None,
    activation: Literal["gelu", "gelu_tanh", "quick_gelu", "relu", "relu_squared", "sigmoid", "silu"] = "silu",
    layout: Literal["halves", "halves_swapped", "interleaved"] = "halves",
) -> torch.Tensor:
    """liger_swiglu or liger_geglu (tanh) of copies: backward writes the gradients where they stand."""
    first, second = (x, up) if up is not None else x.chunk(2, -1)
    gate, linear = (second, first) if layout == "halves_swapped" else (first, second)
    gate, linear = (part.clone(memory_format=torch.contiguous_format) for part in (gate, linear))
    y: torch.Tensor = (liger.liger_swiglu if activation == "silu" else liger.liger_geglu)(gate, linear)
    return y


def _loss_refuses(call: Call) -> str | None:
    return _rows(call, widest=2**31)  # the loss walks over blocks of the vocabulary


@kernel("cross_entropy", "liger_cross_entropy of Liger-Kernel 0.6", refuses=_loss_refuses)
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    logit_softcap: float | None = None,
    reduction: Literal["none", "mean", "sum"] = "mean",
) -> tuple[torch.Tensor, torch.Tensor]:
    """liger_cross_entropy of a float32 copy: the loss has the dtype of the logits, and they become their gradient."""
    copy = logits.to(torch.float32, copy=True)
    found = liger.liger_cross_entropy(
        copy.reshape(-1, logits.shape[-1]),
        target.long().reshape(-1),
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        lse_square_scale=z_loss,
        softcap=logit_softcap,
        reduction=reduction,
        return_z_loss=z_loss != 0.0,
    )
    if z_loss == 0.0:
        loss, z = found, torch.zeros_like(found)
    else:  # a tuple, since 0.6.3 an object
        loss, z = (found.loss, found.z_loss) if hasattr(found, "z_loss") else found
    sizes = target.shape if reduction == "none" else ()
    return loss.reshape(sizes), z.detach().reshape(sizes)
