"""Ops over lists of tensors: optimizers and norms of many gradients."""

from __future__ import annotations

import pytest
import torch

from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.multi_tensor_l2norm import multi_tensor_l2norm

POLICY = Policy(order=("torch_native",))


def test_an_empty_list() -> None:
    """A rank without parameters calls with nothing, and gets the norm of nothing."""
    with using(POLICY):
        assert float(multi_tensor_l2norm([])) == 0.0


def test_lists_of_one_kind_share_a_binding() -> None:
    """The number of tensors, their dtypes, devices, types and contiguity make the kind; sizes do not."""
    with using(POLICY):
        dispatcher = dispatchers["multi_tensor_l2norm"]
        dispatcher.start_over()
        for sizes in ((3, 4), (5, 6)):
            multi_tensor_l2norm([torch.ones(size) for size in sizes])
        assert len(dispatcher.table) == 1
        multi_tensor_l2norm([torch.ones(3)])
        multi_tensor_l2norm([torch.ones(3), torch.ones(4).double()])
        multi_tensor_l2norm([torch.ones(3), torch.ones(4, 4).t()[1:]])
        assert len(dispatcher.table) == 4


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.ones(2), "found Tensor"), ([torch.ones(2), None], "found list of NoneType, Tensor"), (3, "found int")],
)
def test_what_is_no_list_of_tensors(value: object, found: str) -> None:
    """The error names the argument and what it is."""
    with using(POLICY), pytest.raises(TypeError, match=f"tensors must be a list of tensors; {found}"):
        multi_tensor_l2norm(value)  # type: ignore[arg-type]
