"""Megatron's masked softmax by the operator scaled_masked_softmax.

x [B, H, Q, K] = attention scores, mask broadcast to x, True = masked out.

DotProductAttention is served whole (attention.py) and no longer comes here; attention classes of other packages do.
Masked keys have weight 0. Megatron's unfused code writes -10000 in the place of their scores, which is 0 too unless all
of a row is masked: that row is uniform there, and 0 here as in its CUDA kernel.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam, telling
from llm_adapt.patching import Row

__all__ = ["backward", "causal_forward", "masked_forward", "plain_forward", "rows", "served"]

Function = Callable[..., Any]

_SOFTMAX = "megatron.core.fusions.fused_softmax"


def rows(context: Context) -> list[Row]:
    """The module, and the classes that need CUDA extensions, where those are not built; none with ops="off"."""
    extensions = ("scaled_upper_triang_masked_softmax_cuda", "scaled_masked_softmax_cuda", "scaled_softmax_cuda")
    if not context.serves_operators or all(importlib.util.find_spec(name) is not None for name in extensions):
        return []
    target = f"{_SOFTMAX}:FusedScaleMaskSoftmax.forward"
    found: list[Row] = [
        seam(
            target,
            telling(context, target, served),
            "operator scaled_masked_softmax, given masks and windows together; another mask_func stays",
            bodies={"0.12 to 0.14": "3d7957ec67ff", "0.15 to 0.19": "1faaa423c526"},
        )
    ]
    no_extension = "operator scaled_masked_softmax; the CUDA extension is not built"
    for name, (forward, num_options, bodies) in _CLASSES.items():
        for method, new, body in zip(("forward", "backward"), (forward, backward(num_options)), bodies, strict=True):
            found.append(seam(f"{_SOFTMAX}:{name}.{method}", new, no_extension, bodies={"0.12 to 0.19": body}))
    return found


def served(original: Function, told: Callable[[], None]) -> Function:
    """`FusedScaleMaskSoftmax.forward`.

    As there, a mask that is given takes the place of the causal one. A window takes the place of neither, as it does
    there: all hide.
    """
    from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax

    @functools.wraps(original)
    def forward(
        self: Any,
        input: torch.Tensor,
        mask: torch.Tensor | None,
        softmax_offset: torch.Tensor | None = None,
    ) -> torch.Tensor:
        queries, keys = input.shape[-2:]
        window = getattr(self, "window_size", None)
        is_causal = mask is None and self.attn_mask_type.name == "causal" and queries > 1
        is_ambiguous = is_causal and window is None and queries != keys
        hides = is_causal or mask is not None or window is not None
        if input.ndim != 4 or is_ambiguous or (hides and not _is_filled(self.mask_func, mask)):
            told()
            offset = () if softmax_offset is None else (softmax_offset,)
            return original(self, input, mask, *offset)  # type: ignore[no-any-return]
        p = scaled_masked_softmax(
            input,
            mask,
            softmax_offset,
            1.0 if self.scale is None else float(self.scale),
            is_causal,
            None if window is None else (int(window[0]), int(window[1])),
        )
        if self.input_in_float16 and self.softmax_in_fp32:
            p = p.to(torch.float16 if self.input_in_fp16 else torch.bfloat16)
        return p

    return forward


def _is_filled(mask_func: Any, mask: torch.Tensor | None) -> bool:
    """Whether the mask is boolean, and mask_func Megatron's of that name, which fills scores with -10000."""
    if getattr(mask_func, "__name__", "") != "attention_mask_func" or mask_func.__module__[:9] != "megatron.":
        return False
    return mask is None or mask.dtype == torch.bool


def causal_forward(original: Function) -> Function:
    """`ScaledUpperTriangMaskedSoftmax.forward`: p = softmax(scale x) over the keys up to the query; x [B H, Q, Q]."""
    from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax

    @functools.wraps(original)
    def forward(ctx: Any, inputs: torch.Tensor, scale: float) -> torch.Tensor:
        return _kept(ctx, scaled_masked_softmax(inputs, scale=float(scale), causal=True), scale)

    return forward


def masked_forward(original: Function) -> Function:
    """`ScaledMaskedSoftmax.forward`; a mask of bytes says True by any number but 0, as to the CUDA extension."""
    from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax

    @functools.wraps(original)
    def forward(ctx: Any, inputs: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
        return _kept(ctx, scaled_masked_softmax(inputs, mask.bool(), scale=float(scale)), scale)

    return forward


def plain_forward(original: Function) -> Function:
    """`ScaledSoftmax.forward`: p = softmax(scale x)."""
    from llm_adapt.ops.scaled_masked_softmax import scaled_masked_softmax

    @functools.wraps(original)
    def forward(ctx: Any, inputs: torch.Tensor, scale: float) -> torch.Tensor:
        return _kept(ctx, scaled_masked_softmax(inputs, scale=float(scale)), scale)

    return forward


def backward(num_options: int) -> Callable[[Function], Function]:
    """Their `backward`: dx = scale p (dp - sum(p dp)), in float32; the options of forward get no gradient."""

    def wrap(original: Function) -> Function:
        @functools.wraps(original)
        def backward(ctx: Any, output_grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
            (saved,) = ctx.saved_tensors
            p = saved.to(torch.promote_types(saved.dtype, torch.float32))
            weighted = p * output_grads
            dx = ctx.scale * (weighted - p * weighted.sum(-1, keepdim=True))
            return dx.to(saved.dtype), *(None,) * num_options

        return backward

    return wrap


def _kept(ctx: Any, p: torch.Tensor, scale: float) -> torch.Tensor:
    ctx.save_for_backward(p)
    ctx.scale = float(scale)
    return p


# Class -> its new forward, how many of its arguments are options, and the bodies of forward and backward.
_CLASSES: dict[str, tuple[Callable[[Function], Function], int, tuple[str, str]]] = {
    "ScaledUpperTriangMaskedSoftmax": (causal_forward, 1, ("8db4217ad6c6", "be08c218682e")),
    "ScaledMaskedSoftmax": (masked_forward, 2, ("ed5d4e471871", "38119249e499")),
    "ScaledSoftmax": (plain_forward, 1, ("6986d99a6ab8", "3fa130df00b3")),
}
