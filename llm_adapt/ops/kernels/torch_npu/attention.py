"""Attention of torch_npu: npu_fusion_attention and its second version.

out = softmax(mask(scale (q k^T + pse))) v, with these rules of its document:
- Without atten_mask everything is seen, whatever sparse_mode says; so causal calls and windows always bring the
  compressed mask, triu(ones(2048, 2048), 1), which is the same for all lengths.
- True in atten_mask hides a key. The scale is 1 unless given. Rows without keys are undefined unless inner_precise=2.
- Head sizes that are no multiple of 16 lost precision in other ports: they are padded here, the scale stays.
- The softmax statistics carry no gradient; that of the log-sum-exp stands in a Function of ours.
Left to others: softcap, seqused, dropout (its generator cannot be given a seed that holds in recompute), and
deterministic as an option (torch.use_deterministic_algorithms is honoured).

B batch, H query heads, G key heads, Sq and Sk lengths, D and Dv head sizes, T tokens of all sequences packed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
import torch_npu
from torch.nn import functional as F

from llm_adapt.ops.attention_parts.lse_gradient import with_gradient
from llm_adapt.ops.attention_parts.places import dense_places
from llm_adapt.ops.dispatch import Call
from llm_adapt.ops.kernels.torch_npu.library import chip_family, npu_kernel
from llm_adapt.ops.kernels.torch_npu.sequences import packing

__all__ = ["attention", "compressed_mask"]

UNLIMITED = 2**31 - 1  # default of pre_tockens and next_tockens
_NAMES = {"bshd": "BSND", "sbhd": "BSND", "bhsd": "BNSD", "thd": "TND"}
_HEADS = {"bshd": 2, "sbhd": 2, "bhsd": 1, "thd": 1}
_LENGTH = {"bshd": 1, "sbhd": 0, "bhsd": 2, "thd": 0}
_masks: dict[torch.device, torch.Tensor] = {}


def compressed_mask(device: torch.device) -> torch.Tensor:
    """The mask of sparse modes 2, 3 and 4, one for each device."""
    if device not in _masks:
        with torch.inference_mode(False):  # it is kept, and must be good for training too
            _masks[device] = torch.ones(2048, 2048, dtype=torch.bool, device=device).triu(1)
    return _masks[device]


def _refuses(call: Call) -> str | None:
    length = _LENGTH[call.layout]
    rows, columns = call.q.shape[length], call.k.shape[length]
    heads = call.q.shape[_HEADS[call.layout]]
    size, value_size = call.q.shape[-1], call.v.shape[-1]
    has_window = call.window_left >= 0 or call.window_right >= 0
    if heads > 256 or size > 512 or value_size > size:
        return "takes up to 256 heads, head sizes up to 512, and values no wider than keys"
    if call.layout == "thd" and (call.mask or call.alibi_slopes):
        return "takes no mask and no ALiBi with packed sequences"
    if call.causal == "top_left" and has_window and (rows != columns or call.layout == "thd"):
        return "anchors windows at the bottom right"
    if call.mask and call.mask.dtype not in (torch.bool, call.q.dtype):
        return "takes an additive mask of the dtype of q"
    if call.alibi_slopes and (rows != columns or call.mask):
        return "makes ALiBi for equal lengths, without a mask"
    if call.return_lse:
        if call.mask or call.alibi_slopes or call.sinks:
            return "gives the log-sum-exp without mask, ALiBi and sinks"
        if call.layout != "thd" and rows > columns and (call.causal == "bottom_right" or has_window):
            return "gives no log-sum-exp of rows that see no key"
    return None


@npu_kernel(
    "attention",
    "npu_fusion_attention",
    "npu_fusion_attention_v2",
    refuses=_refuses,
    no_gradient=frozenset({"mask"}),  # whether pse gets one, and of which shape, is not documented
)
def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    alibi_slopes: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    layout: Literal["bshd", "sbhd", "bhsd", "thd"] = "bshd",
    causal: Literal["none", "top_left", "bottom_right"] = "none",
    window_left: int = -1,
    window_right: int = -1,
    scale: float | None = None,
    seed: int | None = None,  # of the dropout, which it does not take
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """npu_fusion_attention, or v2 with an additive mask or ALiBi; through npu_fusion_attention_grad for the LSE."""
    value_size = v.shape[-1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if causal != "none":
        window_right = 0 if window_right < 0 else min(window_right, 0)
    options = _band(causal, window_left, window_right, q.device)
    packed = None
    if cu_seqlens_q is not None and cu_seqlens_k is not None:
        packed = packing(cu_seqlens_q, cu_seqlens_k, q.shape[0], window_right, causal == "top_left")
        if packed.rows == 0:
            return _nothing(q, k, v, sinks, return_lse)
        q, k, v = packed.pack(q, k, v)
        options |= {"actual_seq_qlen": packed.ends_q, "actual_seq_kvlen": packed.ends_k}
    if mask is not None:
        batch = q.shape[1 if layout == "sbhd" else 0]
        sizes = batch, q.shape[_HEADS[layout]], q.shape[_LENGTH[layout]], k.shape[_LENGTH[layout]]
        options = _masked(mask, causal, window_left, window_right, sizes)
    if alibi_slopes is not None:  # made by the kernel, in float32: -slope |i - j|
        options |= {"pse": alibi_slopes.float(), "pse_type": 2}
    q, k, v = (_padded(x.transpose(0, 1) if layout == "sbhd" else x) for x in (q, k, v))
    heads, name, lse = q.shape[_HEADS[layout]], _NAMES[layout], None  # sbhd is a view of bshd now
    options |= {"scale": scale, "sink": None if sinks is None else sinks.float()}
    function = _version(options)
    if return_lse and layout == "thd":
        options["softmax_layout"] = "TND"  # otherwise the statistics stand by sequence, though the shape says by token
    out, top, total, *_ = function(q, k, v, heads, name, **options)
    if return_lse:
        lse = _log_sum_exp(q, k, top, total, heads, name, options)
    out = out[..., :value_size]
    out = (out.transpose(0, 1) if layout == "sbhd" else out).contiguous()
    if packed is not None:
        out = packed.unpack(out, 0.0)
        lse = None if lse is None else packed.unpack(lse, -torch.inf).transpose(0, 1)
    return out if lse is None else (out, lse)


def _padded(x: torch.Tensor) -> torch.Tensor:
    missing = -x.shape[-1] % 16
    return F.pad(x, (0, missing)) if missing else x


def _band(causal: str, left: int, right: int, device: torch.device) -> dict[str, Any]:
    """The arguments for what each query may see; with causal, right is 0."""
    if left >= 0 or (causal == "none" and right >= 0):
        tokens = {
            "pre_tockens": left if left >= 0 else UNLIMITED,
            "next_tockens": right if right >= 0 else UNLIMITED,
        }
        return {"atten_mask": compressed_mask(device), "sparse_mode": 4, "inner_precise": 2} | tokens
    if causal == "none":
        return {}
    mode = 2 if causal == "top_left" else 3
    return {"atten_mask": compressed_mask(device), "sparse_mode": mode, "inner_precise": 2}


def _masked(mask: torch.Tensor, causal: str, left: int, right: int, sizes: tuple[int, ...]) -> dict[str, Any]:
    """The arguments for a mask of the caller's, of full size: together with what causal and window hide."""
    batch, heads, rows, columns = sizes
    mask = mask.reshape((1,) * (4 - mask.ndim) + tuple(mask.shape)).expand(-1, -1, rows, columns)
    options: dict[str, Any] = {"sparse_mode": 1, "inner_precise": 2}
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    if mask.dtype != torch.bool:
        options |= {"pse": mask.masked_fill(hidden, 0.0).expand(-1, heads, -1, -1).contiguous(), "pse_type": 0}
    seen = dense_places(rows, columns, causal == "top_left", mask.device).visible(causal != "none", left, right)
    hidden = hidden if seen is None else hidden | ~seen
    if hidden.shape[1] > 1:  # BNSS, B1SS or 11SS, not 1NSS
        hidden = hidden.expand(batch, -1, -1, -1)
    return options | {"atten_mask": hidden.contiguous()}


def _version(options: dict[str, Any]) -> Callable[..., Any]:
    """The second version where there is a bias, which the first would multiply by the scale. Renames its options.

    Also for sinks on Ascend950, where the first does not pass them on (op-plugin 517f2e7d).
    """
    sinks = options["sink"]
    drops_sinks = sinks is not None and sinks.device.type == "npu" and chip_family() == "A5"
    if "pse" not in options and not drops_sinks:
        return torch_npu.npu_fusion_attention  # type: ignore[no-any-return]
    for name in ("pre_tockens", "next_tockens"):
        if name in options:
            options[name.replace("tockens", "tokens")] = options.pop(name)
    return torch_npu.npu_fusion_attention_v2  # type: ignore[no-any-return]


def _log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, top: torch.Tensor, total: torch.Tensor, heads: int, name: str, options: Any
) -> torch.Tensor:
    """maximum + log(sum), of which torch_npu has eight copies and no gradient."""

    def output(q: torch.Tensor, k: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = torch_npu.npu_fusion_attention(q, k, values, heads, name, **options)[0]
        return found

    def beside(g: torch.Tensor) -> torch.Tensor:
        return (g.transpose(1, 2) if name == "BSND" else g).unsqueeze(-1)

    return with_gradient(top[..., 0] + torch.log(total[..., 0]), q, k, options["scale"], output, beside)


def _nothing(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sinks: torch.Tensor | None, return_lse: bool
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Packed sequences in which no query sees a key: zeros that belong to the graph."""
    nothing = sum(x.sum() * 0 for x in (q, k, v, sinks) if x is not None)
    out = q.new_zeros(*q.shape[:-1], v.shape[-1]) + nothing
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
    return (out, lse) if return_lse else out
