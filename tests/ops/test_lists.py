"""Ops over lists of tensors: optimizers and norms of many gradients."""

from __future__ import annotations

import pytest
import torch

from llm_adapt.ops.adamw import adamw
from llm_adapt.ops.dispatch.dispatcher import dispatchers
from llm_adapt.ops.dispatch.in_force import using
from llm_adapt.ops.dispatch.policy import Policy
from llm_adapt.ops.multi_tensor_l2norm import multi_tensor_l2norm

POLICY = Policy(order=("torch_native",))


def test_an_empty_list() -> None:
    """A rank without parameters calls with nothing, and gets the norm of nothing."""
    with using(POLICY):
        assert float(multi_tensor_l2norm([])) == 0.0


def test_lists_of_other_sizes_are_asked_anew() -> None:
    """Every member counts, with its shape: what was right for one list may write past the end of another."""
    with using(POLICY):
        dispatcher = dispatchers["multi_tensor_l2norm"]
        dispatcher.start_over()
        for sizes in ((3, 4), (3, 4), (3, 5), (3,)):
            multi_tensor_l2norm([torch.ones(size) for size in sizes])
        multi_tensor_l2norm([torch.ones(3), torch.ones(4).double()])
        multi_tensor_l2norm([torch.ones(3), torch.ones(8)[::2]])
        assert len(dispatcher.table) == 5


def test_sizes_that_do_not_fit_are_refused_after_a_good_call() -> None:
    """The optimizer's fused kernel trusts its lists; the dispatch does not."""
    with using(POLICY):
        lists = [[torch.ones(40)] for _ in range(4)]
        adamw(*lists, step=1)
        for place in (1, 2, 3):
            wrong = [[torch.ones(37)] if index == place else [torch.ones(40)] for index in range(4)]
            with pytest.raises(ValueError, match=r"has shape \(37,\)"):
                adamw(*wrong, step=2)


@pytest.mark.parametrize("step", [0, -1])
def test_numbers_are_refused_after_a_good_call(step: int) -> None:
    """A step below 1 divides by 0, whoever computes it."""
    with using(POLICY):
        adamw(*([torch.ones(40)] for _ in range(4)), step=1)
        with pytest.raises(ValueError, match=f"step={step} was asked"):
            adamw(*([torch.ones(40)] for _ in range(4)), step=step)


@pytest.mark.parametrize(
    ("value", "found"),
    [(torch.ones(2), "found Tensor"), ([torch.ones(2), None], "found list of NoneType, Tensor"), (3, "found int")],
)
def test_what_is_no_list_of_tensors(value: object, found: str) -> None:
    """The error names the argument and what it is."""
    with using(POLICY), pytest.raises(TypeError, match=f"tensors must be a list of tensors; {found}"):
        multi_tensor_l2norm(value)  # type: ignore[arg-type]
