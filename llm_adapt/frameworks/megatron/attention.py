"""Megatron's local core attention by the operator attention.

Letters: S queries, K keys, B batch, H query heads, G key heads, D head size, E that of the values, T tokens of all
sequences packed. query [S, B, H, D], key [K, B, G, D], value [K, B, G, E] -> [S, B, H E]; packed [T, H, D] -> [T, H E].

Which keys a query sees, by the mask type of the call, or of the module where the call names none:
- a mask tensor (True = masked out) decides alone, as in Megatron, but with padding_causal it is the padding's mask and
  the keys behind the query are hidden as well. So a causal model is served by causal kernels where it is given no mask;
  Megatron's training scripts give one unless they are called with --no-create-attention-mask-in-dataloader.
- causal and padding_causal without one: the keys up to the query, for as many queries as keys, or one query, which sees
  all; causal_bottom_right for any number of each. Others see every key.
- the window of the config hides in addition, and -1 in it means no limit. (Megatron's own code lets the window take the
  place of the mask, and with -1 hides everything.)
- a query whose keys are all hidden gives 0. (Megatron's own code writes -10000 for a hidden score, which makes it the
  mean of all values.)
- packed sequences (qkv_format="thd"): what stands in cu_seqlens, padding between the sequences left out; the diagonal
  begins at the first key of a sequence, as in TransformerEngine, at the last with causal_bottom_right.

Left to Megatron, which refuses them: an attention bias, packed formats other than "thd", context parallelism.

Subclasses that call super().forward and modules that exist already are served too, since the method of the class is
replaced. The classes of TransformerEngine's spec are others, and not touched.
"""

from __future__ import annotations

import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.frameworks.context import Context
from llm_adapt.frameworks.megatron.seams import seam, telling
from llm_adapt.patching import Row

__all__ = ["rows", "served", "sized"]

Function = Callable[..., Any]

_ATTENTION = "megatron.core.transformer.dot_product_attention:DotProductAttention"
_BODIES = {"0.12 to 0.14": "07d091735efd", "0.15": "4520f4b5c3fe", "0.16 to 0.19": "eaa9f11eeb78"}


def rows(context: Context) -> list[Row]:
    """The method that computes, and the constructor that multi-latent attention calls; none with ops="off"."""
    if not context.serves_operators:
        return []
    computes = (
        "operator attention: packed sequences and grouped heads without copies, the mask type of the call, a window "
        "and a mask together; a mask tensor decides alone, and without one causal kernels serve"
    )
    sizes = "multi-latent attention names its head sizes, which only TransformerEngine's class has arguments for"
    found: list[Row] = [
        seam(f"{_ATTENTION}.forward", telling(context, _ATTENTION, served), computes, bodies=_BODIES),
        seam(f"{_ATTENTION}.__init__", sized, sizes),
    ]
    if importlib.util.find_spec("transformer_engine") is None:
        # Read as "is TransformerEngine there?", and true wherever Megatron's own wrapper of it can be imported.
        asked = "TransformerEngine is not installed; True makes multi-latent attention look for its classes"
        found.append(seam("megatron.core.transformer.multi_latent_attention:HAVE_TE", False, asked, "replace"))
    return found


def sized(original: Function) -> Function:
    """`DotProductAttention.__init__` with k_channels and v_channels, the head sizes of keys and values."""
    if "k_channels" in inspect.signature(original).parameters:
        return original

    @functools.wraps(original)
    def __init__(
        self: Any, config: Any, *args: Any, k_channels: int | None = None, v_channels: int | None = None, **kwargs: Any
    ) -> None:
        has_scale = len(args) > 4 or kwargs.get("softmax_scale") is not None
        if k_channels is not None and not has_scale:
            kwargs["softmax_scale"] = k_channels**-0.5
        original(self, config, *args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition

    return __init__


def served(original: Function, told: Callable[[], None]) -> Function:
    """`DotProductAttention.forward`.

    Dropout is a function of a seed, which is drawn from the state that Megatron's tracker has for this rank (the state
    in force, with sequence parallelism): recompute puts that state back, so it drops the same.
    """
    from llm_adapt.ops.attention import attention

    names = original.__globals__  # looked up at each call: the tracker is patched as well

    @functools.wraps(original)
    def forward(
        self: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        dropout_p = self.attention_dropout.p if self.attention_dropout.training else 0.0
        is_dense = packed_seq_params is None and query.ndim == 4
        is_served = is_dense or _is_packed(packed_seq_params, query)
        if not is_served or attention_bias is not None or not _has_plain_mask(attention_mask, query, dropout_p):
            told()
            rest = (attention_mask, attn_mask_type, attention_bias, packed_seq_params)
            return original(self, query, key, value, *rest)  # type: ignore[no-any-return]
        kind = (self.attn_mask_type if attn_mask_type is None else attn_mask_type).name
        window = getattr(self.scale_mask_softmax, "window_size", None)
        if is_dense:
            where: dict[str, Any] = {"layout": "sbhd"}
            where["causal"] = _causal(kind, query.shape[0], key.shape[0], attention_mask, window)
        else:
            where = _sequences(packed_seq_params, kind)
        sinks = getattr(self, "softmax_offset", None)
        out = attention(
            query,
            key,
            value,
            mask=None if attention_mask is None else ~attention_mask,
            sinks=None if sinks is None else sinks.to(query.device),
            window_left=-1 if window is None else int(window[0]),
            window_right=-1 if window is None else int(window[1]),
            scale=self.softmax_scale * (self.scale_mask_softmax.scale or 1.0),
            dropout_p=dropout_p,
            seed=_seed(self.config, names, query.device) if dropout_p else None,
            deterministic=bool(getattr(self.config, "deterministic_mode", False)),
            **where,
        )
        return out.flatten(-2)  # type: ignore[union-attr]

    return forward


def _is_packed(packed: Any, query: torch.Tensor) -> bool:
    """Whether the sequences are packed in the one form that is served."""
    if packed is None or packed.qkv_format != "thd" or query.ndim != 3:
        return False
    return packed.cu_seqlens_q is not None and getattr(packed, "local_cp_size", None) in (None, 1)


def _has_plain_mask(mask: torch.Tensor | None, query: torch.Tensor, dropout_p: float) -> bool:
    """Whether the mask is boolean, and no CUDA graph would keep the seed of one call for all of its replays."""
    if dropout_p and query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False
    return mask is None or mask.dtype == torch.bool


def _causal(kind: str, queries: int, keys: int, mask: torch.Tensor | None, window: Any) -> str:
    """The operator's causal option for sequences that are not packed."""
    if kind == "causal_bottom_right":
        return "bottom_right"
    if kind != "padding_causal" and (kind != "causal" or mask is not None):
        return "none"
    if queries not in (1, keys) and window is None:
        raise ValueError(
            f"DotProductAttention was asked for {kind} attention of {queries} queries and {keys} keys, which does not "
            "say at which key the first query stands; pass AttnMaskType.causal_bottom_right, or a mask."
        )
    return "bottom_right"


def _sequences(packed: Any, kind: str) -> dict[str, Any]:
    """The operator's arguments for packed sequences; with padding between them, what is used of each."""
    ends_q = packed.cu_seqlens_q
    ends_k = ends_q if packed.cu_seqlens_kv is None else packed.cu_seqlens_kv
    padded_q, padded_k = packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded
    causal = {"causal": "top_left", "padding_causal": "top_left", "causal_bottom_right": "bottom_right"}
    found: dict[str, Any] = {"layout": "thd", "causal": causal.get(kind, "none")}
    found |= {"cu_seqlens_q": ends_q if padded_q is None else padded_q}
    found |= {"cu_seqlens_k": ends_k if padded_k is None else padded_k}
    if padded_q is not None:
        found["seqused_q"] = ends_q.diff()
    if padded_k is not None:
        found["seqused_k"] = ends_k.diff()
    for name, size in (("max_seqlen_q", packed.max_seqlen_q), ("max_seqlen_k", packed.max_seqlen_kv)):
        found[name] = size if isinstance(size, int) else 0  # a tensor would make the host wait for it
    return found


def _seed(config: Any, names: dict[str, Any], device: torch.device) -> int:
    """A seed from the state that Megatron's own dropout would draw from at this place."""
    if config.sequence_parallel:  # the whole block runs under the tracker's state
        return _drawn(device)
    with names["tensor_parallel"].get_cuda_rng_tracker().fork():
        return _drawn(device)


def _drawn(device: torch.device) -> int:
    """62 random bits, another set at each call."""
    if device.type != "cuda":
        high, low = torch.randint(2**31, (2,), device=device).tolist()
        return int(high) << 31 | int(low)
    # The generator's place is known on the host: reading a drawn number would make the host wait for the device.
    index = torch.cuda.current_device() if device.index is None else device.index
    generator = torch.cuda.default_generators[index]
    place = generator.get_offset()
    generator.set_offset(place + 4)
    return (generator.initial_seed() ^ place * 0x9E3779B97F4A7C15) & (2**62 - 1)
