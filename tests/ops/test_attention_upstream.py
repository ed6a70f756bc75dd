"""attention against the functions that it stands for: torch, transformers with its own masks, Megatron-Core."""

from __future__ import annotations

import importlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from llm_adapt.ops.attention import attention
from tests.ops.attention_loop import drawn, gradients

transformers = pytest.importorskip("transformers")
B, H, G, S, D = 2, 4, 2, 11, 8


def three(rows: int, columns: int, groups: int = G, value: int = D) -> list[torch.Tensor]:
    """q, k and v as [B, H, S, D] in float64, leaves."""
    sizes = [(B, H, rows, D), (B, groups, columns, D), (B, groups, columns, value)]
    return [drawn(index, *size).requires_grad_() for index, size in enumerate(sizes)]


class OnHost(TorchFunctionMode):
    """Tensors that Megatron makes on "cuda" are made on the CPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)


def agree(ours: torch.Tensor, theirs: torch.Tensor, *leaves: torch.Tensor) -> None:
    """Outputs and gradients are the same."""
    # transformers forms its softmax in float32 also for float64: hence not 1e-12.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradients(ours, *leaves), gradients(theirs, *leaves), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("lengths", [(11, 11), (5, 9), (9, 5), (1, 9)])
def test_it_is_torchs_attention(groups: int, lengths: tuple[int, int]) -> None:
    """F.scaled_dot_product_attention: top-left causal, both kinds of mask, scale, grouped heads, another value size."""
    q, k, v = three(*lengths, groups=groups, value=6)
    for is_causal in (False, True):
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=is_causal, enable_gqa=True, scale=0.4)
        ours = attention(q, k, v, layout="bhsd", causal="top_left" if is_causal else "none", scale=0.4)
        agree(ours, theirs, q, k, v)
    keep = drawn(7, B, 1, *lengths) > 0
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=keep, enable_gqa=True)
    agree(attention(q, k, v, mask=keep, layout="bhsd"), theirs, q, k, v)
    added = drawn(8, H, *lengths).requires_grad_()
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=added, enable_gqa=True)
    agree(attention(q, k, v, mask=added, layout="bhsd"), theirs, q, k, v, added)


@pytest.mark.parametrize("lengths", [(11, 11), (5, 9), (9, 5)])
def test_bottom_right_is_torchs_lower_right(lengths: tuple[int, int]) -> None:
    """causal="bottom_right" is torch.nn.attention.bias.causal_lower_right, where every query sees a key."""
    bias = importlib.import_module("torch.nn.attention.bias")
    q, k, v = three(*lengths, groups=H)
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.causal_lower_right(*lengths)._materialize())
    ours = attention(q, k, v, layout="bhsd", causal="bottom_right")
    seen = max(lengths[0] - lengths[1], 0)
    agree(ours[:, :, seen:], theirs[:, :, seen:], q, k, v)


CONFIG = {
    "hidden_size": H * D,
    "num_attention_heads": H,
    "num_key_value_heads": G,
    "head_dim": D,
    "num_hidden_layers": 2,
    "intermediate_size": 16,
    "vocab_size": 16,
    "sliding_window": 4,
    "attn_implementation": "eager",
}


def masked(model: str, is_sliding: bool, is_padded: bool) -> torch.Tensor:
    """The mask that transformers makes for this model's eager attention, added to scores [B, 1, S, S]."""
    masks = importlib.import_module("transformers.masking_utils")
    kind = transformers.CONFIG_MAPPING[model]
    config = kind(**{name: value for name, value in CONFIG.items()})
    config._attn_implementation = "eager"
    padding = torch.ones(B, S, dtype=torch.long)
    if is_padded:
        padding[0, -3:] = 0
    make = masks.create_sliding_window_causal_mask if is_sliding else masks.create_causal_mask
    embeds = torch.zeros(B, S, H * D, dtype=torch.float64)
    found: torch.Tensor = make(config, embeds, padding if is_padded else None, None)
    return found


def eager(model: str) -> Any:
    """The attention function of a model of transformers."""
    return importlib.import_module(f"transformers.models.{model}.modeling_{model}").eager_attention_forward


MODELS = ["llama", "qwen2", "qwen3", "mistral", "mixtral", "gemma2", "gemma3", "gpt_oss", "deepseek_v3"]
SLIDING = {"mistral", "mixtral", "gemma2", "gemma3", "gpt_oss"}


@pytest.mark.parametrize("is_padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("model", MODELS)
def test_it_is_the_eager_attention_of_transformers(model: str, is_padded: bool) -> None:
    """With the model's own mask added, and with the options that say the same: causal, window, softcap, sinks, MLA."""
    value = 6 if model == "deepseek_v3" else D  # MLA: values are narrower than queries and keys
    q, k, v = three(S, S, value=value)
    leaves, own, ours = [q, k, v], {}, {}
    module = SimpleNamespace(num_key_value_groups=H // G, training=False, head_dim=D)
    if model == "gpt_oss":
        module.sinks = drawn(5, H).requires_grad_()
        leaves, ours = [*leaves, module.sinks], {"sinks": module.sinks}
    if model == "gemma2":
        own = ours = {"softcap": 1.5}
    for is_sliding in (False, True) if model in SLIDING else (False,):
        mask = masked("gemma3_text" if model == "gemma3" else model, is_sliding, is_padded)
        theirs, _ = eager(model)(module, q, k, v, mask, scaling=0.3, **own)
        theirs = theirs.transpose(1, 2)
        agree(attention(q, k, v, mask=mask, layout="bhsd", scale=0.3, **ours), theirs, *leaves)
        # transformers' sliding_window counts the query itself.
        said = {"causal": "bottom_right", "window_left": CONFIG["sliding_window"] - 1 if is_sliding else -1}
        used = torch.tensor([S - 3 if is_padded else S, S], dtype=torch.int32)
        found = attention(q, k, v, layout="bhsd", scale=0.3, seqused_q=used, seqused_k=used, **said, **ours)
        for n in range(B):  # behind the padding transformers computes something, which no loss sees
            agree(found[n, :, : used[n]], theirs[n, :, : used[n]], *leaves)


@pytest.mark.parametrize("model", ["llama", "gemma2", "gpt_oss"])
def test_it_is_as_near_to_the_truth_as_transformers_in_bfloat16(model: str) -> None:
    """In bfloat16 the error to float64 is at most that of transformers, which rounds the weights too."""
    q, k, v = (x.detach().bfloat16() for x in three(S, S))
    module = SimpleNamespace(num_key_value_groups=H // G, training=False, head_dim=D)
    own: dict[str, Any] = {"softcap": 1.5} if model == "gemma2" else {}
    ours = dict(own)
    if model == "gpt_oss":
        module.sinks = drawn(5, H).bfloat16()
        ours = {"sinks": module.sinks}
    mask = masked(model, False, False).bfloat16()
    theirs = eager(model)(module, q, k, v, mask, scaling=0.3, **own)[0].transpose(1, 2)
    options = {"layout": "bhsd", "causal": "bottom_right", "scale": 0.3}
    exact = attention(q.double(), k.double(), v.double(), **options, **ours)
    found = attention(q, k, v, **options, **ours)
    assert (found.double() - exact).abs().max() <= (theirs.double() - exact).abs().max()


@pytest.mark.parametrize("window", [None, (3, 0), (2, 1)])
@pytest.mark.parametrize("softmax", ["vanilla", "off-by-one"])
def test_it_is_the_core_attention_of_megatron(
    window: tuple[int, int] | None, softmax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """megatron.core DotProductAttention in layout sbhd: causal, window, padding mask, softmax with an extra logit."""
    pytest.importorskip("megatron.core")
    module = importlib.import_module("megatron.core.transformer.dot_product_attention")
    enums = importlib.import_module("megatron.core.transformer.enums")
    config = importlib.import_module("megatron.core.transformer.transformer_config").TransformerConfig(
        num_layers=1, hidden_size=H * D, num_attention_heads=H, num_query_groups=G, attention_dropout=0.0,
        window_size=window, softmax_type="vanilla", masked_softmax_fusion=False,
    )  # fmt: skip
    groups = SimpleNamespace(tp=SimpleNamespace(size=lambda: 1))
    buffer = SimpleNamespace(get_tensor=lambda shape, dtype, name: torch.empty(shape, dtype=dtype))
    monkeypatch.setattr(module.parallel_state, "get_global_memory_buffer", lambda: buffer)  # its own is on a GPU
    core = module.DotProductAttention(config, 1, enums.AttnMaskType.causal, "self", pg_collection=groups)
    core.config.sequence_parallel = True  # no tracker of random states is asked for
    if softmax == "off-by-one":
        core.softmax_offset = torch.zeros(H, dtype=torch.float64)
    q, k, v = (x.detach().permute(2, 0, 1, 3).contiguous().requires_grad_() for x in three(S, S))
    sinks = torch.zeros(H) if softmax == "off-by-one" else None
    left, right = window or (-1, -1)
    causal = "none" if window else "bottom_right"  # Megatron's window is its mask; causal where right is 0
    ours = attention(q, k, v, sinks=sinks, layout="sbhd", causal=causal, window_left=left, window_right=right)
    with OnHost():
        theirs = core(q, k, v, None)
    agree(ours.flatten(2), theirs, q, k, v)
    if window is None:
        hidden = torch.zeros(B, 1, S, S, dtype=torch.bool)  # True = masked out there
        hidden[0, ..., -3:] = True
        theirs = core(q, k, v, hidden)
        agree(attention(q, k, v, mask=~hidden, sinks=sinks, layout="sbhd").flatten(2), theirs, q, k, v)
