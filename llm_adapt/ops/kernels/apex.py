"""Kernels of NVIDIA apex and of its builds for other devices (apex-das for Hygon DCU). x [..., H], weight, bias [H].

Source: apex/normalization/fused_layer_norm.py, apex/transformer/functional/fused_rope.py and
apex/optimizers/fused_adam.py of NVIDIA/apex at 014f30f; csrc/megatron/fused_weight_gradient_dense_cuda.cu. What a
build lacks is asked for at the first use and refused then. Not run: tests/contracts calls it against fakes.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Literal

import apex  # noqa: F401 - the reason why this file cannot be used, where it is missing
import torch

from llm_adapt.ops.adamw import check_step
from llm_adapt.ops.dispatch import Call, kernel

__all__ = ["adamw", "layer_norm", "rms_norm", "rope", "wgrad_accumulate"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_HALVES = (torch.float16, torch.bfloat16)


def _lacks(extension: str, module: str, *names: str) -> str | None:
    """Why a call cannot be made: apex builds the extensions that were asked for, and builds differ in their functions.

    Asked again for each kind of call; a module that is there is imported once.
    """
    if importlib.util.find_spec(extension) is None:
        return f"this build of apex has no {extension}"
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        return f"this build of apex has no {module}: {error}"
    absent = [name for name in names if not hasattr(found, name)]
    return f"this build of apex has no {', '.join(absent)} in {module}" if absent else None


def _norm_refuses(call: Call) -> str | None:
    name = f"fused_{call.op}" if call.weight is None else f"fused_{call.op}_affine"
    lacking = _lacks("fused_layer_norm_cuda", "apex.normalization.fused_layer_norm", name)
    if lacking:
        return lacking
    dtypes = {tensor.dtype for tensor in call.tensors.values()}
    if len(dtypes) > 1 or call.x.dtype not in _FLOATS or 0 in call.x.shape:
        return "takes tensors of one dtype of 16 or 32 bits, and no empty tensors"
    if call.options.get("form") == "one_plus" and call.x.dtype != torch.float32:
        return "would round 1 + weight"
    if call.op == "layer_norm" and (call.weight is None) != (call.bias is None):
        return "takes weight and bias, or neither"
    return None


@kernel("rms_norm", "fused_rms_norm_affine and fused_rms_norm of apex at 014f30f", refuses=_norm_refuses)
def rms_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    form: Literal["standard", "cast_first", "one_plus", "one_plus_rounded"] = "standard",
) -> torch.Tensor:
    """fused_rms_norm_affine, rounded once."""
    from apex.normalization import fused_layer_norm as norms

    y: torch.Tensor
    if weight is None:
        y = norms.fused_rms_norm(x, x.shape[-1:], eps)
    else:
        y = norms.fused_rms_norm_affine(x, weight + 1 if form.startswith("one_plus") else weight, x.shape[-1:], eps)
    return y


@kernel("layer_norm", "fused_layer_norm_affine and fused_layer_norm of apex at 014f30f", refuses=_norm_refuses)
def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    form: Literal["standard", "one_plus", "one_plus_rounded"] = "standard",
) -> torch.Tensor:
    """fused_layer_norm_affine."""
    from apex.normalization import fused_layer_norm as norms

    y: torch.Tensor
    if weight is None:
        y = norms.fused_layer_norm(x, x.shape[-1:], eps)
    else:
        gamma = weight + 1 if form.startswith("one_plus") else weight
        y = norms.fused_layer_norm_affine(x, gamma, bias, x.shape[-1:], eps)
    return y


def _rope_refuses(call: Call) -> str | None:
    name = "fused_apply_rotary_pos_emb_cached"
    lacking = _lacks("fused_rotary_positional_embedding", "apex.transformer.functional", name)
    if lacking:
        return lacking
    if call.x.dtype not in _FLOATS or call.layout == "thd" or call.pairs != "half" or 0 in call.x.shape:
        return "takes half pairs of dense sequences, in 16 or 32 bits"
    if call.cos.ndim > 2:
        return "takes one table for all sequences"
    return None


@kernel("rope", "fused_apply_rotary_pos_emb_cached of apex at 014f30f", refuses=_rope_refuses)
def rope(
    x: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    pairs: Literal["half", "interleaved", "interleaved_to_half"] = "half",
    table: Literal["full", "half"] = "full",
    compute: Literal["float32", "x"] = "float32",
    inverse: bool = False,
) -> torch.Tensor:
    """fused_apply_rotary_pos_emb_cached, which casts the tables to the dtype of x: so x is cast to wider tables."""
    from apex.transformer.functional import fused_apply_rotary_pos_emb_cached

    order = {"bshd": (1, 0, 2, 3), "sbhd": (0, 1, 2, 3), "bhsd": (2, 0, 1, 3)}[layout]
    back = {"bshd": (1, 0, 2, 3), "sbhd": (0, 1, 2, 3), "bhsd": (1, 2, 0, 3)}[layout]
    turned = x.permute(order)
    if compute == "float32":
        turned = turned.to(torch.promote_types(x.dtype, torch.promote_types(cos.dtype, sin.dtype)))
    if table == "half":
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
    cos, sin = (t[: turned.shape[0], None, None] for t in (cos, -sin if inverse else sin))
    y: torch.Tensor = fused_apply_rotary_pos_emb_cached(turned, cos, sin)
    return y.permute(back).to(x.dtype)


def _adamw_refuses(call: Call) -> str | None:
    lacking = _lacks("amp_C", "amp_C", "multi_tensor_adam")
    lacking = lacking or _lacks("amp_C", "apex.multi_tensor_apply", "multi_tensor_applier")
    if lacking:
        return lacking
    kinds: dict[str, set[torch.dtype]] = {}
    for name, tensor in call.tensors.items():
        kinds.setdefault(name.partition("[")[0], set()).add(tensor.dtype)
    one = kinds["params"] | kinds["grads"]
    if len(one) > 1 or not one <= set(_FLOATS) or kinds["exp_avgs"] | kinds["exp_avg_sqs"] != {torch.float32}:
        return "takes parameters and gradients of one dtype, and moments of float32"
    return None


@kernel("adamw", "amp_C.multi_tensor_adam of apex at 014f30f", refuses=_adamw_refuses)
def adamw(
    params: list[torch.Tensor],
    grads: list[torch.Tensor],
    exp_avgs: list[torch.Tensor],
    exp_avg_sqs: list[torch.Tensor],
    lr: float = 1e-3,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    step: int = 1,
    decoupled: bool = True,
    bias_correction: bool = True,
) -> None:
    """multi_tensor_adam as FusedAdam calls it: mode 1 decays the parameter, mode 0 adds to the gradient."""
    import amp_C
    from apex.multi_tensor_apply import multi_tensor_applier

    chosen = [index for index, param in enumerate(params) if param.numel()]
    lists = [[tensors[index] for index in chosen] for tensors in (grads, params, exp_avgs, exp_avg_sqs)]
    overflow = torch.zeros(1, dtype=torch.int32, device=params[0].device)
    check_step(step)
    numbers: tuple[Any, ...] = (lr, beta1, beta2, eps, step, int(decoupled), int(bias_correction), weight_decay)
    with torch.no_grad():
        multi_tensor_applier(amp_C.multi_tensor_adam, overflow, lists, *numbers)


def _wgrad_refuses(call: Call) -> str | None:
    extension = "fused_weight_gradient_mlp_cuda"
    lacking = _lacks(extension, extension, _accumulates_in(call.main_grad.dtype))
    if lacking:
        return lacking
    if call.x.dtype not in _FLOATS or call.main_grad.dtype not in (torch.float32, call.x.dtype):
        return "takes x of 16 or 32 bits, and main_grad of float32 or the same"
    if 0 in call.x.shape or 0 in call.dy.shape or not call.main_grad.is_contiguous:
        return "takes no empty tensors, and a contiguous main_grad"
    return None


def _accumulates_in(dtype: torch.dtype) -> str:
    """Name of the function for a main_grad of that dtype."""
    return "wgrad_gemm_accum_fp32" if dtype == torch.float32 else "wgrad_gemm_accum_fp16"


@kernel("wgrad_accumulate", "fused_weight_gradient_mlp_cuda of apex", refuses=_wgrad_refuses)
def wgrad_accumulate(x: torch.Tensor, dy: torch.Tensor, main_grad: torch.Tensor) -> None:
    """wgrad_gemm_accum_fp32, or _fp16 for a main_grad of 16 bits."""
    import fused_weight_gradient_mlp_cuda as fused

    function = getattr(fused, _accumulates_in(main_grad.dtype))
    with torch.no_grad():
        function(x.reshape(-1, x.shape[-1]).contiguous(), dy.reshape(-1, dy.shape[-1]).contiguous(), main_grad)
