"""What torch_npu documents of npu_grouped_matmul, in float64. M rows, E experts, K and N columns."""

from __future__ import annotations

from typing import Any

import torch

from tests.contracts.recording import demand

NOT_WRITTEN = 12345.0  # rows beyond the groups, and products over no rows, hold anything


def npu_grouped_matmul(x: list[torch.Tensor], weight: list[torch.Tensor], group_list: Any, **a: Any) -> Any:
    """One product for each group: of rows [M, K] x [E, K, N] (type 0), or over rows [K, M] x [M, N] (type 2)."""
    given = {name for name, value in a.items() if value is not None and name not in ("bias",)}
    demand(given <= {"split_item", "group_type", "group_list_type", "act_type"}, f"{given} are not faked")
    demand(a["bias"] is None and a["act_type"] == 0 and len(x) == len(weight) == 1, "only one x and weight are faked")
    demand(
        isinstance(group_list, torch.Tensor) and group_list.dtype == torch.int64, "group_list is int64 on the device"
    )
    demand(a["group_list_type"] in (0, 1) and a["split_item"] in (2, 3), "group_list_type 0 or 1, split_item 2 or 3")
    left, right = x[0], weight[0]
    demand(left.dtype == right.dtype and max(left.shape[-1], right.shape[-1]) < 65536, "one dtype, inner axis < 65536")
    ends = group_list.cumsum(0).tolist() if a["group_list_type"] == 1 else group_list.tolist()
    ranges = list(zip([0, *ends[:-1]], ends, strict=True))
    if a["group_type"] == 0:
        demand(left.ndim == 2 and right.ndim == 3 and right.shape[0] == len(ranges), "x [M, K], weight [E, K, N]")
        y = torch.full((left.shape[0], right.shape[2]), NOT_WRITTEN, dtype=torch.float64)
        for index, (first, end) in enumerate(ranges):
            y[first:end] = left[first:end].double() @ right[index].double()
        return [y.to(left.dtype)]
    demand(a["group_type"] == 2, f"group_type={a['group_type']} is not faked")
    demand(left.ndim == right.ndim == 2 and left.shape[1] == right.shape[0], "x [K, M], weight [M, N]")
    parts = [left[:, i:j].double() @ right[i:j].double() if j > i else None for i, j in ranges]
    nothing = torch.full((left.shape[0], right.shape[1]), NOT_WRITTEN, dtype=torch.float64)
    return [torch.stack([nothing if part is None else part for part in parts]).to(left.dtype)]


FUNCTIONS = {name: function for name, function in list(globals().items()) if name.startswith("npu_")}
