"""Eager: what the frameworks run without llm_adapt, op by op, as functions with the op's own parameters.

Where transformers is installed its own functions are called. The others are PyTorch formulations of what
Megatron-Core, DeepSpeed or torch do, written here. Each is refused by the same rules as a kernel (an argument that it
does not take is never dropped) and is proved like one before it is timed.
"""

from __future__ import annotations

import functools
import importlib
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_adapt.cli.bench.counterparts import eager, only

# -- norms and activations ----------------------------------------------------------------------------------------


@functools.cache
def _llama() -> Any:
    """transformers' Llama; under ops="off" nothing in it is replaced."""
    return importlib.import_module("transformers.models.llama.modeling_llama")


@eager("rms_norm", "transformers LlamaRMSNorm.forward", only(form="cast_first"))
def llama_rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Any:
    """The norm of Llama, Qwen, Mistral and Mixtral in transformers."""
    return _llama().LlamaRMSNorm.forward(SimpleNamespace(weight=weight, variance_epsilon=eps), x)


@eager("rms_norm", "PyTorch, after LlamaRMSNorm", only(form="cast_first"))
def cast_first_rms_norm(x: Tensor, weight: Tensor, eps: float, form: str) -> Tensor:
    """The same where transformers is not installed."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


@eager("rms_norm", "torch.nn.functional.rms_norm (Megatron-Core's WrappedTorchNorm)")
def torch_rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What Megatron-Core runs without Transformer Engine."""
    return F.rms_norm(x, x.shape[-1:], weight, eps)


@eager("add_rms_norm", "transformers LlamaDecoderLayer: the sum, then LlamaRMSNorm", only(form="cast_first"))
def llama_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, form: str) -> tuple[Any, Tensor]:
    """Two lines of the decoder layer."""
    h = residual + x
    return llama_rms_norm(h, weight, eps, form), h


@eager("add_rms_norm", "PyTorch: the sum, then torch.nn.functional.rms_norm (Megatron-Core)", only(form="standard"))
def torch_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The sum and the norm of a Megatron-Core layer."""
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


@eager("layer_norm", "torch.nn.functional.layer_norm (Megatron-Core, transformers)")
def torch_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """torch's own, which both frameworks call."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@eager("activation", "PyTorch: bias, then torch.nn.functional.gelu (Megatron-Core without fusion)")
def bias_gelu(x: Tensor, bias: Tensor | None, function: str) -> Tensor:
    """The MLP of GPT: the bias of the first product, then gelu."""
    x = x if bias is None else x + bias
    return F.gelu(x, approximate="tanh" if function == "gelu_tanh" else "none")


@eager("glu", "transformers LlamaMLP: act_fn(gate) * up")
def gate_times_up(x: Tensor, up: Tensor) -> Tensor:
    """The middle of LlamaMLP, with its SiLU."""
    return F.silu(x) * up


@eager("glu", "PyTorch: silu(x_1) * x_2 of a chunked x (Megatron-Core without fusion)")
def chunked_glu(x: Tensor, weights: Tensor | None) -> Tensor:
    """MLP and experts of Megatron-Core; with the probabilities of the router where there are some."""
    gate, up = torch.chunk(x, 2, dim=-1)
    y = F.silu(gate) * up
    return y if weights is None else (y * weights).to(x.dtype)


@eager("dropout_add", "PyTorch: residual + dropout(x + bias) (Megatron-Core without fusion)")
def bias_dropout_add(x: Tensor, residual: Tensor, bias: Tensor | None, p: float) -> Tensor:
    """bias_dropout_add of Megatron-Core."""
    return residual + F.dropout(x if bias is None else x + bias, p, training=True)


# -- attention ----------------------------------------------------------------------------------------------------


@eager("rope", "transformers apply_rotary_pos_emb", only(layout="bhsd", pairs="half", table="full", compute="x"))
def llama_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str, compute: str) -> Any:
    """transformers' function turns q and k in one call; here k has no heads."""
    return _llama().apply_rotary_pos_emb(x, x[:, :0], cos, sin)[0]


@eager("rope", "PyTorch, after _apply_rotary_pos_emb_bshd of Megatron-Core", only(pairs="half", compute="x"))
def rotate_half_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str, compute: str) -> Tensor:
    """x cos + rotate_half(x) sin, each product rounded."""
    cos, sin = (_beside_heads(table, layout) for table in (cos, sin))
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


@eager(
    "rope", "PyTorch, after apply_rotary_pos_emb_interleave of DeepSeek-V3 in transformers",
    only(pairs="interleaved_to_half", compute="x"),
)  # fmt: skip
def interleaved_rope(x: Tensor, cos: Tensor, sin: Tensor, layout: str, pairs: str, compute: str) -> Tensor:
    """Even and odd features are turned, and written one half after the other."""
    half = x.shape[-1] // 2
    cos, sin = (_beside_heads(table, layout)[..., :half] for table in (cos, sin))
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], -1)


def _beside_heads(table: Tensor, layout: str) -> Tensor:
    table = table if table.ndim == 2 else table[0]
    return table[:, None, None] if layout == "sbhd" else table[None, None] if layout == "bhsd" else table[None, :, None]


@functools.lru_cache(maxsize=4)
def _causal_mask(queries: int, keys: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The additive mask, made once for all layers as frameworks do."""
    mask = torch.full((queries, keys), torch.finfo(dtype).min, dtype=dtype, device=device)
    return mask.triu(keys - queries + 1)[None, None]


@eager("attention", "transformers eager_attention_forward", only(layout="bhsd", causal="bottom_right"))
def llama_attention(q: Tensor, k: Tensor, v: Tensor, layout: str, causal: str) -> Any:
    """attn_implementation="eager": all scores are kept. Its result is [B, S, H, D]; ours follows the layout."""
    module = SimpleNamespace(num_key_value_groups=q.shape[1] // k.shape[1], training=False)
    mask = _causal_mask(q.shape[2], k.shape[2], q.dtype, q.device)
    out = _llama().eager_attention_forward(module, q, k, v, mask, q.shape[-1] ** -0.5)[0]
    return out.transpose(1, 2)


@eager("attention", "PyTorch, after DotProductAttention of Megatron-Core (unfused)", only(causal="bottom_right"))
def scores_softmax_values(q: Tensor, k: Tensor, v: Tensor, layout: str, causal: str) -> Tensor:
    """Scores, a mask, softmax in float32, values: all scores are kept."""
    order = [layout.index(letter) for letter in "bhsd"]
    q4, k4, v4 = (tensor.permute(order) for tensor in (q, k, v))
    k4, v4 = (tensor.repeat_interleave(q4.shape[1] // tensor.shape[1], dim=1) for tensor in (k4, v4))
    scores = torch.matmul(q4, k4.transpose(2, 3)) * q4.shape[-1] ** -0.5
    scores = scores + _causal_mask(q4.shape[2], k4.shape[2], q4.dtype, q4.device)
    out = torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q4.dtype), v4)
    return out.permute([order.index(axis) for axis in range(4)])


@eager("decode_attention", "PyTorch, after eager_attention_forward of transformers on a static cache")
def decode_with_mask(q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor) -> Tensor:
    """One new token against the whole cache, what lies behind its end masked."""
    heads = q.shape[2] // k_cache.shape[2]
    k, v = (cache.transpose(1, 2).repeat_interleave(heads, dim=1) for cache in (k_cache, v_cache))
    scores = torch.matmul(q.transpose(1, 2), k.transpose(2, 3)) * q.shape[-1] ** -0.5
    behind = torch.arange(k.shape[2], device=q.device) >= cache_seqlens[:, None]
    scores = scores.masked_fill(behind[:, None, None], torch.finfo(q.dtype).min)
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v).transpose(1, 2)


@functools.lru_cache(maxsize=4)
def _masked_out(queries: int, device: torch.device) -> Tensor:
    return torch.ones(queries, queries, dtype=torch.bool, device=device).triu(1)


@eager("scaled_masked_softmax", "PyTorch, after FusedScaleMaskSoftmax.forward_torch_softmax of Megatron-Core")
def torch_softmax(x: Tensor, scale: float, causal: bool) -> Tensor:
    """In float32: the scale, -10000 in masked places, softmax, back to the dtype."""
    scores = x.float() * scale
    if causal:
        scores = scores.masked_fill(_masked_out(x.shape[-1], x.device), -10000.0)
    return torch.softmax(scores, dim=-1).to(x.dtype)


# -- losses -------------------------------------------------------------------------------------------------------


def _nothing(loss: Tensor) -> Tensor:
    """The second result of our losses: the z-loss, which is 0 where none is asked."""
    return torch.zeros((), device=loss.device)


@eager("cross_entropy", "transformers fixed_cross_entropy(logits.float(), ...), as ForCausalLMLoss")
def causal_lm_loss(logits: Tensor, target: Tensor) -> tuple[Any, Tensor]:
    """The loss of every causal model in transformers: logits are widened to float32 first."""
    loss = importlib.import_module("transformers.loss.loss_utils").fixed_cross_entropy(logits.float(), target)
    return loss, _nothing(loss)


@eager("cross_entropy", "torch.nn.functional.cross_entropy(logits.float(), ...)")
def torch_cross_entropy(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same where transformers is not installed."""
    loss = F.cross_entropy(logits.float(), target)
    return loss, _nothing(loss)


@eager("fused_linear_cross_entropy", "PyTorch: lm_head, then cross_entropy(logits.float(), ...) (transformers)")
def head_then_loss(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """All logits at once, and again in float32."""
    return torch_cross_entropy(F.linear(hidden, weight), target)


@eager("softmax_partials", "PyTorch, after VocabParallelCrossEntropy of Megatron-Core, less its communication")
def shard_partials(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """max, exp, sum and the target's logit of one shard."""
    wide = logits.float()
    most = wide.amax(-1, keepdim=True).detach()
    is_elsewhere = (target < 0) | (target >= logits.shape[-1])
    picked = wide.gather(-1, target.masked_fill(is_elsewhere, 0)[..., None])[..., 0].masked_fill(is_elsewhere, 0.0)
    return (wide - most).exp().sum(-1).log() + most[..., 0], picked


@eager("router_aux_loss", "PyTorch, after switch_load_balancing_loss_func of Megatron-Core")
def switch_loss(probs: Tensor, tokens_per_expert: Tensor, topk: int, coeff: float, num_tokens: int) -> Tensor:
    """Switch Transformer's loss over one micro-batch."""
    factor = probs.shape[1] * coeff / (topk * num_tokens * num_tokens)
    return (probs.sum(dim=0, dtype=torch.float32) * tokens_per_expert).sum() * factor


@eager("router_z_loss", "PyTorch, after z_loss_func of Megatron-Core")
def mean_square_logsumexp(logits: Tensor, coeff: float) -> Tensor:
    """ST-MoE's loss."""
    return torch.logsumexp(logits.float(), dim=-1).square().mean() * coeff


# -- mixtures of experts ------------------------------------------------------------------------------------------


@eager("topk_router", "PyTorch, after MixtralTopKRouter of transformers", only(score_function="softmax"))
def mixtral_router(logits: Tensor, topk: int, renormalize: bool, probs_dtype: Any, form: str) -> tuple[Tensor, Tensor]:
    """softmax in float32, the largest, divided by their sum."""
    chosen, experts = torch.topk(F.softmax(logits.float(), dim=-1), topk, dim=-1)
    return chosen / chosen.sum(dim=-1, keepdim=True), experts


@eager("topk_router", "PyTorch, after DeepseekV3TopkRouter of transformers", only(score_function="sigmoid"))
def deepseek_router(
    logits: Tensor, expert_bias: Tensor, topk: int, score_function: str, renormalize: bool, scaling_factor: float,
    num_groups: int, group_topk: int, scores_per_group: int, probs_dtype: Any, form: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """sigmoid in float32, the best groups, then the best experts of these."""
    scores = logits.float().sigmoid()
    biased = scores + expert_bias
    groups = biased.view(-1, num_groups, logits.shape[1] // num_groups)
    best = groups.topk(scores_per_group, dim=-1)[0].sum(dim=-1).topk(group_topk, dim=-1)[1]
    is_open = torch.zeros_like(groups[..., 0]).scatter_(1, best, 1).bool()
    open_scores = groups.masked_fill(~is_open[..., None], float("-inf")).flatten(1)
    experts = open_scores.topk(topk, dim=-1)[1]
    chosen = scores.gather(1, experts)
    return chosen / (chosen.sum(dim=-1, keepdim=True) + 1e-20) * scaling_factor, experts


@eager("moe_permute", "PyTorch, after permute of Megatron-Core (unfused)")
def permute(tokens: Tensor, routing_map: Tensor, num_out_tokens: int, topk: int | None) -> tuple[Tensor, None, Tensor]:
    """Indices by masked_select, rows by index_select."""
    by_expert = routing_map.bool().T.contiguous()
    numbers = torch.arange(tokens.shape[0], device=tokens.device)[None].expand(routing_map.shape[1], -1)
    rows = numbers.masked_select(by_expert)
    return tokens.index_select(0, rows), None, rows


@eager("moe_unpermute", "PyTorch, after unpermute of Megatron-Core (unfused)")
def unpermute(
    permuted: Tensor, sorted_indices: Tensor, num_tokens: int, probs: Tensor, routing_map: Tensor, topk: int | None
) -> Tensor:
    """Rows times their probability, summed by scatter_add_ in the wider dtype."""
    weighted = permuted * probs.T.contiguous().masked_select(routing_map.T.contiguous())[:, None]
    sums = torch.zeros(num_tokens, permuted.shape[1], dtype=weighted.dtype, device=permuted.device)
    return sums.scatter_add_(0, sorted_indices[:, None].expand(-1, permuted.shape[1]), weighted).to(permuted.dtype)


@eager("grouped_gemm", "transformers _grouped_linear (experts_implementation=grouped_mm, its default)")
def experts_grouped_mm(x: Tensor, weight: Tensor, tokens_per_expert: Tensor, transposed: bool) -> Any:
    """torch's grouped product where it can be used, transformers' loop elsewhere."""
    ends = torch.cumsum(tokens_per_expert, dim=0, dtype=torch.int32)
    return importlib.import_module("transformers.integrations.moe")._grouped_linear(x, weight, ends)


@eager("grouped_gemm", "PyTorch: a loop over the experts (Megatron-Core's SequentialMLP)")
def experts_loop(x: Tensor, weight: Tensor, tokens_per_expert: Tensor, transposed: bool) -> Tensor:
    """One product for each expert; the counts go to the host."""
    parts = x.split(tokens_per_expert.tolist())
    return torch.cat([F.linear(part, expert) for part, expert in zip(parts, weight.unbind(), strict=True)])
