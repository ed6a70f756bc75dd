"""The recording itself: what it refuses, what it leaves behind, and what gradients it drops."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch import registry
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, find_op
from tests.contracts.extract_npu import from_text
from tests.contracts.fake_npu import fake_npu
from tests.contracts.kernels import cases_of
from tests.contracts.recording import Contract, ContractError, FakeVendor, bind, contracts

NPU = contracts("npu")
X = torch.ones(2, 4)


@pytest.fixture(scope="module")
def npu() -> Iterator[FakeVendor]:
    """The fake of torch_npu."""
    with fake_npu() as vendor:
        yield vendor


def vendor() -> Any:
    """The module that our kernels import."""
    return sys.modules["torch_npu"]


def test_arguments_are_bound_by_the_schema() -> None:
    """Positional arguments, keywords and defaults come out by name."""
    found = bind(NPU["npu_rms_norm"], (X, X[0]), {"epsilon": 1e-5})
    assert list(found) == ["input", "gamma", "epsilon"]
    assert found["epsilon"] == 1e-5
    assert bind(NPU["npu_rms_norm"], (X, X[0]), {})["epsilon"] == 1e-6


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "message"),
    [
        ("npu_rms_norm", (X, X[0]), {"eps": 1e-6}, "keyword 'eps' is not in npu::npu_rms_norm"),
        ("npu_rms_norm", (X,), {}, "gamma is missing"),
        ("npu_rms_norm", (X, X[0], 1e-6, 1), {}, "4 positional arguments"),
        ("npu_rms_norm", (X, X[0]), {"gamma": X[0]}, "gamma was given twice"),
        ("npu_rms_norm", (X, None), {}, "gamma=None is not a Tensor"),
        ("npu_rms_norm", (X, X[0], "1e-6"), {}, "epsilon='1e-6' is not a float"),
        ("npu_gelu", (X, "none"), {}, "2 positional arguments"),
        ("npu_swiglu", (X,), {"dim": True}, "dim=True is not a int"),
        ("npu_fusion_attention", (X, X, X, 1, "BSH"), {"pre_tokens": 1}, "keyword 'pre_tokens'"),
        ("npu_fusion_attention_v2", (X, X, X, 1, "BSH"), {"pre_tockens": 1}, "keyword 'pre_tockens'"),
        ("npu_fusion_attention", (X, X, X, 1, "BSH"), {"actual_seq_qlen": X}, "actual_seq_qlen="),
    ],
)
def test_a_wrong_call_names_the_schema(name: str, args: Any, kwargs: Any, message: str) -> None:
    """An unknown keyword, a wrong type, a missing or a surplus argument is an error with the schema in it."""
    with pytest.raises(ContractError, match=message):
        bind(NPU[name], args, kwargs)


def test_nothing_stays_behind() -> None:
    """After the block neither the vendor's module nor our kernels of it are there, whatever happened inside."""
    modules, libraries = set(sys.modules), dict(registry._LIBRARIES)
    kernels = {name: list(op.kernels) for name, op in registry.all_ops().items()}
    with pytest.raises(RuntimeError, match="inside"), fake_npu():
        assert "torch_npu" in sys.modules
        assert "torch_npu" in find_op("rms_norm").kernels
        raise RuntimeError("inside")
    assert {name for name in set(sys.modules) - modules if "torch_npu" in name} == set()
    assert libraries == registry._LIBRARIES
    assert {name: list(op.kernels) for name, op in registry.all_ops().items()} == kernels


def test_calls_are_recorded(npu: FakeVendor) -> None:
    """The arguments of a call can be looked at afterwards, defaults filled in."""
    vendor().npu_swiglu(X)
    assert npu.last("npu_swiglu")["dim"] == -1


def test_an_operator_without_backward_raises_in_backward(npu: FakeVendor) -> None:
    """npu_add_rms_norm works forward, and backward raises as torch_npu's does."""
    x = X.clone().requires_grad_()
    y, _, _ = vendor().npu_add_rms_norm(x, X, X[0])
    with pytest.raises(RuntimeError, match="derivative for npu_add_rms_norm is not implemented"):
        y.sum().backward()


def test_an_operator_without_derivative_drops_gradients(npu: FakeVendor) -> None:
    """npu_grouped_matmul gives a result that asks for a gradient and hands none to its inputs."""
    x = torch.ones(2, 4, requires_grad=True)
    y = vendor().npu_grouped_matmul(
        [x], [torch.ones(1, 4, 3)], group_list=torch.tensor([2]), split_item=2, group_type=0
    )[0]
    assert y.requires_grad
    assert torch.autograd.grad(y.sum(), x, allow_unused=True) == (None,)


def test_a_kernel_that_is_not_wrapped_fails_its_proof(npu: FakeVendor) -> None:
    """A kernel that calls an operator without backward as if it had one is found out by the proof."""

    def naive_sum(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> Any:
        y, _, h = vendor().npu_add_rms_norm(x, residual, weight, epsilon=eps)
        return y, h

    def naive_product(x: torch.Tensor, weight: torch.Tensor, tokens_per_expert: torch.Tensor) -> Any:
        counts = {"group_list": tokens_per_expert, "split_item": 2, "group_type": 0, "group_list_type": 1}
        return vendor().npu_grouped_matmul([x], [weight], **counts)[0]

    for name, function, message in (
        ("add_rms_norm", naive_sum, "derivative for npu_add_rms_norm is not implemented"),
        ("grouped_gemm", naive_product, "gradient of x is missing"),
    ):
        case = cases_of([name])[0]
        verdict = prove(case.op, Kernel(name, "naive", function, "none"), case.arguments)
        assert not verdict.holds
        assert message in verdict.reason


def test_contracts_are_extracted_from_text() -> None:
    """npu.json is what the extraction makes of the schemas and the dispatch keys in it."""
    kinds = {"derivative": "PrivateUse1,AutogradPrivateUse1", "raises": "AutogradPrivateUse1", "drops": "PrivateUse1"}
    schemas = "\n".join(contract.text for contract in NPU.values())
    dispatch = "\n".join(f"npu::{name} {kinds[contract.autograd]}" for name, contract in NPU.items())
    found = from_text(schemas, dispatch)
    assert {
        name: Contract(name, item["schema"], item["autograd"], NPU[name].source) for name, item in found.items()
    } == NPU


def test_every_fake_has_a_contract_and_every_contract_a_source() -> None:
    """No function is faked that is not in a contract, and each contract says where it is from."""
    from tests.contracts.fake_npu import FUNCTIONS

    assert set(FUNCTIONS) <= set(NPU)
    for text in (json.loads(path.read_text()) for path in sorted(_folder().glob("*.json"))):
        assert text["source"] or all(item["source"] for item in text["operators"].values())


def _folder() -> Any:
    from pathlib import Path

    return Path(__file__).parent
