"""transformers' "sdpa" attention, the default of most models, reaches the `attention` op.

B batch, H query heads, G key heads, Sq and Sk lengths, D and Dv head sizes.

What is replaced is the function behind the name, so that the registry, and whoever imports the function itself, get
the same. It computes what the original computes, and also what the original leaves out although models pass it:
softcap (there an error), sinks (s_aux) and a sliding window without a mask (there ignored). "eager" stays as it is:
it returns the attention weights. "flash_attention_2" and its kin are in flash_loader.py.

Which diagonal: with is_causal and more than one query, and without a mask, query i sees the keys 0 to i, also where
there are more keys (those of a static cache that are not filled yet). One query sees all keys.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.transformers import VERSIONS, flash_loader, masks
from llm_adapt.frameworks.transformers.seeds import drawn_seed
from llm_adapt.patching import Patch, PlanItem
from llm_adapt.report import Report

__all__ = ["rows", "sdpa"]

_TARGET = "transformers.integrations.sdpa_attention:sdpa_attention_forward"
_BODIES = {"5.23": "bebf347b8e9e", "5.24": "41a5c0d57c7e"}
_PLAIN = (torch.Tensor, torch.nn.Parameter)
_CAST = (torch.float32, torch.float16, torch.bfloat16)  # what autocast casts


def rows(context: Context) -> list[PlanItem]:
    """The function behind "sdpa", the loader of flash-attention, and the masks that go with its names."""
    return [
        Patch(
            _TARGET,
            sdpa(context.report),
            "attn_implementation='sdpa' is the attention operator",
            kind="wrap",
            optional=True,
            versions=VERSIONS,
            fingerprints=_BODIES,
        ),
        *flash_loader.rows(context),
        *masks.rows(context),
    ]


def sdpa(report: Report) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`sdpa_attention_forward` through the op; what that does not take goes to the original, and to the report."""

    def told(why: str) -> None:
        report.once("sdpa attention", "left to transformers", why)

    told._dynamo_marked_constant = True  # type: ignore[attr-defined]  # compiled code: told once, while it is traced

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        from llm_adapt.ops.attention import attention

        is_npu = bool(getattr(original, "__globals__", {}).get("_is_torch_npu_available"))

        @functools.wraps(original)
        def sdpa_attention_forward(
            module: torch.nn.Module,
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            attention_mask: torch.Tensor | None,
            dropout: float = 0.0,
            scaling: float | None = None,
            is_causal: bool | None = None,
            position_bias: torch.Tensor | None = None,
            **kwargs: Any,
        ) -> Any:
            why, places = _why_not(query, key, kwargs), {}
            if not why:
                places = _places(module, query, key, attention_mask, is_causal, kwargs.get("sliding_window"))
            if dropout and not why:
                why = _why_not_drop(attention_mask, position_bias, kwargs, "window_left" in places, is_npu)
            if why:
                told(why)
                biased = {"position_bias": position_bias, **kwargs}
                return original(module, query, key, value, attention_mask, dropout, scaling, is_causal, **biased)
            if places["causal"] != "none" and key.shape[2] > query.shape[2]:  # no query sees those behind
                key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
                position_bias = None if position_bias is None else position_bias[..., : query.shape[2]]
            out = attention(
                query.transpose(1, 2),
                key.transpose(1, 2),
                value.transpose(1, 2),
                mask=_mask(query, attention_mask, position_bias),
                sinks=kwargs.get("s_aux"),
                scale=scaling,
                softcap=kwargs.get("softcap") or 0.0,
                dropout_p=dropout,
                seed=drawn_seed() if dropout else None,
                **places,
            )
            return out, None

        return sdpa_attention_forward

    return wrap


def _why_not(query: torch.Tensor, key: torch.Tensor, kwargs: dict[str, Any]) -> str:
    """Why a call is for the original; "" when it is not."""
    if kwargs.get("output_attentions"):
        return "it warns that there are no weights to return"
    if kwargs.get("cache") is not None:  # up to 5.23: the paged cache of continuous batching
        return "the call comes with a cache to update"
    if query.ndim != 4 or query.shape[0] != key.shape[0]:
        return "queries and keys are not [B, H, S, D] of one batch"
    if torch.compiler.is_compiling():
        return ""
    if torch.jit.is_tracing():  # type: ignore[attr-defined]
        return "torch.jit.trace records no dispatch"
    if type(query) not in _PLAIN:
        return f"the tensors are of type {type(query).__name__}"
    return ""


def _why_not_drop(
    attention_mask: torch.Tensor | None,
    position_bias: torch.Tensor | None,
    kwargs: dict[str, Any],
    has_window: bool,
    is_npu: bool,
) -> str:
    """Why a call with dropout is for the original, whose kernels drop by themselves; the op would be slower there.

    Not where the original leaves something out, or on an NPU, where it makes every mask a boolean one.
    """
    is_more = has_window or kwargs.get("softcap") is not None or kwargs.get("s_aux") is not None
    is_added = position_bias is not None or (attention_mask is not None and attention_mask.dtype != torch.bool)
    return "" if is_more or (is_npu and is_added) else "its kernels have a dropout of their own"


def _places(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    attention_mask: torch.Tensor | None,
    is_causal: bool | None,
    window: int | None,
) -> dict[str, Any]:
    """The options that say which keys a query sees. A mask says all of it: the window stands in it already."""
    rows, columns = query.shape[2], key.shape[2]
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # In this order: torch.compile with dynamic shapes needs the comparison first.
    is_causal = rows > 1 and attention_mask is None and is_causal
    options: dict[str, Any] = {"causal": "top_left" if is_causal else "none"}
    seen = rows if is_causal and columns > rows else columns
    if window is not None and attention_mask is None and seen > window:
        options |= {"window_left": window - 1, "window_right": -1 if is_causal else window - 1}
    return options


def _mask(
    query: torch.Tensor, attention_mask: torch.Tensor | None, position_bias: torch.Tensor | None
) -> torch.Tensor | None:
    """Mask and bias as one, boolean or added; in the dtype that autocast gives it inside the original."""
    mask = attention_mask
    if position_bias is not None and mask is not None and mask.dtype == torch.bool:
        mask = torch.where(mask, position_bias, torch.finfo(query.dtype).min)
    elif position_bias is not None:
        mask = position_bias if mask is None else position_bias + mask
    device = query.device.type
    if mask is not None and mask.dtype in _CAST and torch.is_autocast_enabled(device):
        mask = mask.to(torch.get_autocast_dtype(device))
    return mask
