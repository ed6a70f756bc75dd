"""What torch_npu documents of npu_fused_infer_attention_score for one query, in float64."""

from __future__ import annotations

from typing import Any

import torch

from tests.contracts.recording import demand

HALVES = (torch.float16, torch.bfloat16)
KNOWN = {"actual_seq_lengths_kv", "block_table", "block_size", "num_heads", "num_key_value_heads", "scale"} | {
    "input_layout",
    "softmax_lse_flag",
    "pre_tokens",
    "next_tokens",
}


def npu_fused_infer_attention_score(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **a: Any) -> Any:
    """softmax(scale q k^T) v over the first actual_seq_lengths_kv keys, from a whole cache or from pages."""
    given = {name for name, item in a.items() if isinstance(item, torch.Tensor) or item}
    demand(given <= KNOWN, f"{given - KNOWN} are not faked")
    demand(a["input_layout"] == "BSH" and query.shape[1] == 1, "only layout BSH with one query is faked")
    demand({query.dtype, key.dtype, value.dtype} <= set(HALVES), "takes float16 and bfloat16")
    demand(all(t.is_contiguous() for t in (query, key, value)), "takes contiguous tensors")
    heads, groups, lengths = a["num_heads"], a["num_key_value_heads"] or a["num_heads"], a["actual_seq_lengths_kv"]
    size = query.shape[-1] // heads
    demand(size % 16 == 0 and size <= 512 and heads // groups <= 64, "head size: up to 512, in steps of 16")
    demand(lengths is not None and len(lengths) == query.shape[0], "actual_seq_lengths_kv: one length of each sequence")
    table = a["block_table"]
    if table is not None:
        demand(a["block_size"] == key.shape[1] and a["block_size"] % 16 == 0, "block_size is that of the cache")
        demand(table.dtype == torch.int32 and bool((table >= 0).all()), "block_table is int32 and names pages")
    outs, sums = [], []
    for index, length in enumerate(lengths):
        k, v = (t[table[index].long()].flatten(0, 1) if table is not None else t[index] for t in (key, value))
        k, v = (t[:length].double().unflatten(-1, (groups, size)).transpose(0, 1) for t in (k, v))
        k, v = (t.repeat_interleave(heads // groups, 0) for t in (k, v))
        q = query[index].double().unflatten(-1, (heads, size)).transpose(0, 1)
        scores = a["scale"] * q @ k.transpose(-1, -2)
        outs.append((scores.softmax(-1) @ v).transpose(0, 1).flatten(1))
        sums.append(scores.logsumexp(-1, keepdim=True))
    lse = torch.stack(sums).float() if a["softmax_lse_flag"] else torch.zeros(1)
    return torch.stack(outs).to(query.dtype), lse


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("npu_")}
