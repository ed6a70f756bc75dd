"""What torch_npu documents of npu_grouped_matmul and of the permutation by a routing map, in float64.

M rows, E experts, K and N columns; of the permutation: T tokens, H columns, K experts of each token.
"""

from __future__ import annotations

from typing import Any

import torch

from tests.contracts.recording import demand

NOT_WRITTEN = 12345.0  # rows beyond the groups, and products over no rows, hold anything


def _is_transposed(tensor: torch.Tensor) -> bool:
    return tensor.stride(-2) == 1 and tensor.stride(-1) == tensor.shape[-2]


def npu_grouped_matmul(x: list[torch.Tensor], weight: list[torch.Tensor], group_list: Any, **a: Any) -> Any:
    """One product for each group: of rows [M, K] x [E, K, N] (type 0), or over rows [K, M] x [M, N] (type 2)."""
    given = {name for name, value in a.items() if value is not None and name not in ("bias",)}
    demand(given <= {"split_item", "group_type", "group_list_type", "act_type"}, f"{given} are not faked")
    demand(a["bias"] is None and a["act_type"] == 0 and len(x) == len(weight) == 1, "only one x and weight are faked")
    demand(
        isinstance(group_list, torch.Tensor) and group_list.dtype == torch.int64, "group_list is int64 on the device"
    )
    demand(a["group_list_type"] in (0, 1) and a["split_item"] in (2, 3), "group_list_type 0 or 1, split_item 2 or 3")
    demand(a["group_list_type"] == 0 or len(group_list) > 1, "counts may not be of length 1")
    left, right = x[0], weight[0]
    demand(left.dtype == right.dtype and max(left.shape[-1], right.shape[-1]) < 65536, "one dtype, inner axis < 65536")
    ends = group_list.cumsum(0).tolist() if a["group_list_type"] == 1 else group_list.tolist()
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    if a["group_type"] == 0:
        demand(left.ndim == 2 and right.ndim == 3 and right.shape[0] == len(ranges), "x [M, K], weight [E, K, N]")
        demand(left.is_contiguous() or not _is_transposed(left), "with group_type 0 x is no transposed view")
        y = torch.full((left.shape[0], right.shape[2]), NOT_WRITTEN, dtype=torch.float64)
        for index, (first, end) in enumerate(ranges):
            y[first:end] = left[first:end].double() @ right[index].double()
        return [y.to(left.dtype)]
    demand(a["group_type"] == 2, f"group_type={a['group_type']} is not faked")
    demand(left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0], "x [K, M], weight [M, N]")
    demand(left.numel() == 0 or _is_transposed(left), "with group_type 2 x is a transposed view")
    demand(right.is_contiguous() or not _is_transposed(right), "with group_type 2 weight is no transposed view")
    parts = [left[:, i:j].double() @ right[i:j].double() if j > i else None for i, j in ranges]
    nothing = torch.full((left.shape[0], right.shape[1]), NOT_WRITTEN, dtype=torch.float64)
    return [torch.stack([nothing if part is None else part for part in parts]).to(left.dtype)]


def _check_routing(name: str, rows: torch.Tensor, routing_map: Any, probs: Any, topk: int) -> None:
    floats = (torch.float32, torch.float16, torch.bfloat16)
    demand(rows.ndim == 2 and rows.dtype in floats, f"{name} takes rows [., H] of float32, float16 and bfloat16")
    if routing_map is not None:
        demand(routing_map.dtype in (torch.bool, torch.int8), f"{name}: a map is bool or int8")
        demand(routing_map.ndim == 2, f"{name}: a map is [T, E]")
        demand(bool((routing_map.sum(1) == topk).all()), f"{name}: each token has exactly {topk} experts")
    if probs is not None:
        mixed = rows.dtype == torch.bfloat16 and probs.dtype == torch.float32
        demand(probs.dtype == rows.dtype or mixed, f"{name}: probs {probs.dtype} do not go with {rows.dtype}")
        demand(routing_map is not None and probs.shape == routing_map.shape, f"{name}: probs are like the routing map")


class _Permutation(torch.autograd.Function):
    """Rows and their probs from one operator: where either input needs a gradient, both results ask for one.

    Backward reads the shape of the rows' gradient, also where a loss reached the probs alone and there is none.
    """

    @staticmethod
    def forward(ctx: Any, tokens: torch.Tensor, probs: Any, chosen: torch.Tensor, token: torch.Tensor) -> Any:
        ctx.save_for_backward(tokens, probs, chosen, token)
        ctx.set_materialize_grads(False)
        return tokens.index_select(0, token), None if probs is None else probs.t()[chosen]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        tokens, probs, chosen, token = ctx.saved_tensors
        if gradients[0] is None:
            raise IndexError("Dimension specified as 1 but tensor has no dimensions")
        summed = torch.zeros_like(tokens, dtype=torch.float64).index_add(0, token, gradients[0].double())
        of_probs = None
        if gradients[1] is not None:
            of_probs = torch.zeros_like(chosen, dtype=probs.dtype).masked_scatter(chosen, gradients[1]).t()
        return summed.to(tokens.dtype), of_probs, None, None


def npu_moe_token_permute_with_routing_map(tokens: torch.Tensor, routing_map: torch.Tensor, **a: Any) -> Any:
    """Rows by expert, then by token; their probs; and the row [T K] of each pair counted by token, int32."""
    name, count, probs = "npu_moe_token_permute_with_routing_map", a["num_out_tokens"], a["probs"]
    demand(not a["drop_and_pad"], "drop_and_pad is not faked: its order is not documented")
    demand(count is not None and count % len(tokens) == 0, f"{name}: num_out_tokens={count} is not T K")
    topk = count // len(tokens)
    demand(topk < 512 and max(count, routing_map.shape[1]) < 16777215, f"{name}: K < 512, T K < 16777215")
    _check_routing(name, tokens, routing_map, probs, topk)
    chosen = routing_map.bool().t()
    token = chosen.nonzero()[:, 1]
    permuted, weights = _Permutation.apply(tokens, probs, chosen, token)
    return permuted, weights, token.argsort(stable=True).to(torch.int32)


class _GradientIn(torch.autograd.Function):
    """x, whose gradient is written in another dtype."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        ctx.dtype = dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0].to(ctx.dtype).to(gradients[0].dtype), None


def npu_moe_token_unpermute_with_routing_map(
    permuted_tokens: torch.Tensor, sorted_indices: torch.Tensor, restore_shape: list[int], **a: Any
) -> Any:
    """y[t] = sum over the pairs i of token t of permuted[sorted_indices[i]], each times its prob of the map."""
    name, probs, tokens = "npu_moe_token_unpermute_with_routing_map", a["probs"], restore_shape[0]
    demand(not a["drop_and_pad"], "drop_and_pad is not faked: its order is not documented")
    demand(sorted_indices.dtype == torch.int32, f"{name}: sorted_indices are int32")
    rows = len(permuted_tokens)
    demand(sorted_indices.shape == (rows,) and rows % tokens == 0, f"{name}: sorted_indices [T K]")
    demand(restore_shape[1] == permuted_tokens.shape[1] and rows // tokens <= 512, f"{name}: [T, H], K <= 512")
    demand(bool((sorted_indices.sort().values == torch.arange(rows)).all()), f"{name}: sorted_indices are the rows")
    _check_routing(name, permuted_tokens, a["routing_map"], probs, rows // tokens)
    picked = permuted_tokens.double()[sorted_indices.long()]
    if probs is not None:
        probs = _GradientIn.apply(probs, permuted_tokens.dtype)
        picked = picked * probs.double().masked_select(a["routing_map"].bool())[:, None]
    return picked.reshape(tokens, -1, picked.shape[1]).sum(1).to(permuted_tokens.dtype)


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("npu_")}
