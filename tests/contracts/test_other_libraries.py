"""Our kernels of flash_attn, apex, liger and others against fakes of them. Nothing here ran on a vendor's hardware."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from llm_adapt.ops.attention_parts.flash import Flash
from llm_adapt.ops.dispatch.proof import prove
from llm_adapt.ops.dispatch.registry import Kernel, all_ops
from tests.contracts import (
    fake_apex,
    fake_flash_attn,
    fake_liger,
    fake_lightop,
    fake_torch_mlu_ops,
    fake_transformer_engine,
)
from tests.contracts.kernels import cases_of, served, why_not
from tests.contracts.recording import FakeVendor, contracts, fake_vendor
from tests.ops.cases import Case


def functions(module: Any, *names: str) -> dict[str, Any]:
    """Functions of a fake by name; all of its own unless named."""
    return {name: getattr(module, name) for name in names or module.__all__}


FLASH = functions(fake_flash_attn, "flash_attn_func", "flash_attn_varlen_func")
TE = functions(fake_transformer_engine)
LIBRARIES: dict[str, tuple[str, dict[str, dict[str, Any]], str]] = {
    "flash-attn 2": ("flash_attn", {"flash_attn": functions(fake_flash_attn)}, "cuda"),
    "flash-attn 3": ("flash_attn_3", {"flash_attn_interface": FLASH}, "cuda"),
    "flash_attn for DCU": ("flash_attn", {"flash_attn": FLASH}, "dcu"),
    "apex": ("apex", fake_apex.MODULES, "cuda"),
    "liger": ("liger", {"liger_kernel.transformers.functional": fake_liger.FUNCTIONS}, "cuda"),
    "lightop": ("lightop", {"lightop": functions(fake_lightop)}, "dcu"),
    "transformer_engine": ("transformer_engine", {"transformer_engine.pytorch.cross_entropy": TE}, "cuda"),
    "torch_mlu": ("torch_mlu", {"torch_mlu": {}, "torch_mlu_ops": functions(fake_torch_mlu_ops)}, "mlu"),
}


def fake(title: str) -> AbstractContextManager[FakeVendor]:
    """One of the fakes, to be entered."""
    library, modules, vendor = LIBRARIES[title]
    return fake_vendor(library, modules, contracts(vendor))


def titles_and_ops() -> list[tuple[str, str]]:
    """Every op that a library has a kernel of."""
    found = []
    for title, (library, _, _) in LIBRARIES.items():
        with fake(title):
            found += [(title, name) for name, op in all_ops().items() if library in op.kernels]
    return found


KERNELS = titles_and_ops()


@pytest.fixture(scope="module")
def loaded(request: Any) -> Iterator[str]:
    """The name of the library of a title, with its kernels loaded against the fake."""
    with fake(request.param):
        yield LIBRARIES[request.param][0]


ROWS = [pytest.param(title, case, id=f"{title}-{case}") for title, name in KERNELS for case in cases_of([name])]


@pytest.mark.parametrize(("loaded", "case"), ROWS, indirect=["loaded"])
def test_a_kernel_refuses_or_is_right(loaded: str, case: Any) -> None:
    """A kernel gives the reference's results and gradients, or a reason why it does not serve."""
    if not served(case.op.kernels[loaded], case):
        assert why_not(case.op.kernels[loaded], case) != ""


@pytest.mark.parametrize(
    ("loaded", "name"), [k for k in KERNELS if k != ("flash_attn for DCU", "decode_attention")], indirect=["loaded"]
)
def test_a_kernel_serves_something(loaded: str, name: str) -> None:
    """No kernel refuses all of its op's inputs, but for DCU's flash_attn, which has no function for a cache."""
    kernel = all_ops()[name].kernels[loaded]
    assert any(why_not(kernel, case) == "" for case in cases_of([name]))


def arguments(op: str, number: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """One of an op's own calls, its floating tensors asking for a gradient."""
    case = next(case for case in cases_of([op]) if case.number == number and case.dtype == dtype)
    return {
        name: value.clone().requires_grad_() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
        for name, value in case.arguments.items()
    }


def call(op: str, library: str, given: dict[str, Any]) -> Any:
    """The kernel with the arguments that it takes."""
    kernel = all_ops()[op].kernels[library]
    return kernel.function(**{name: value for name, value in given.items() if name in kernel.honours})


@pytest.mark.parametrize(
    ("loaded", "op", "number"),
    [
        ("liger", "glu", 12),
        ("liger", "glu", 13),
        ("liger", "cross_entropy", 0),
        ("transformer_engine", "cross_entropy", 0),
    ],
    indirect=["loaded"],
)
def test_inputs_stay_as_they_are(loaded: str, op: str, number: int) -> None:
    """Functions that write into what they are given are given copies: inputs are the same after backward."""
    given = arguments(op, number)
    before = {name: value.detach().clone() for name, value in given.items() if isinstance(value, torch.Tensor)}
    found = call(op, loaded, given)
    (found[0] if isinstance(found, tuple) else found).sum().backward()
    for name, value in before.items():
        assert torch.equal(given[name].detach(), value), name


@pytest.mark.parametrize("loaded", ["flash-attn 2"], indirect=True)
def test_padding_behind_the_last_sequence_is_zero(loaded: str) -> None:
    """Tokens in no sequence have output 0 and gradient 0, though flash-attn leaves both unset."""
    q, k, v = (torch.randn(9, 2, 16, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    ends = torch.tensor([0, 3, 7], dtype=torch.int32)
    given = all_ops()["attention"].bind(q, k, v, cu_seqlens_q=ends, cu_seqlens_k=ends, layout="thd")
    out = call("attention", loaded, given)
    out.sum().backward()
    assert out[7:].count_nonzero() == 0
    for tensor in (q, k, v):
        assert tensor.grad is not None
        assert tensor.grad[7:].count_nonzero() == 0
        assert tensor.grad[:7].abs().max() < 1000


@pytest.mark.parametrize("title", ["flash-attn 2", "flash-attn 3"])
def test_deterministic_is_passed_on(title: str) -> None:
    """Asked as an option or of torch, flash-attn is told to be deterministic."""
    library = LIBRARIES[title][0]
    q = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    with fake(title) as vendor:
        for option, of_torch in ((False, False), (True, False), (False, True)):
            torch.use_deterministic_algorithms(of_torch)
            try:
                call("attention", library, all_ops()["attention"].bind(q, q, q, deterministic=option))
            finally:
                torch.use_deterministic_algorithms(False)
            assert vendor.last("flash_attn_func")["deterministic"] is (option or of_torch)


def test_what_a_build_lacks_is_refused() -> None:
    """A build without softcap refuses a softcap: what it takes is read from its signature, not from a version."""

    def old(
        q: Any, k: Any, v: Any, softmax_scale: Any = None, causal: bool = False, window_size: Any = (-1, -1)
    ) -> Any:
        """An older build."""

    flash = Flash(old, old)
    q = torch.randn(1, 4, 2, 16, dtype=torch.bfloat16)
    op = all_ops()["attention"]
    for options, reason in (
        ({"softcap": 3.0}, "this build has no softcap"),
        ({"deterministic": True}, "this build has no deterministic backward"),
        ({"return_lse": True}, "this build gives no log-sum-exp"),
        ({"alibi_slopes": torch.ones(2)}, "this build has no alibi_slopes"),
        ({"dropout_p": 0.1}, "this build has no dropout_p"),
        ({}, None),
    ):
        assert flash.refuses(Case(op, 0, q.dtype, op.bind(q, q, q, **options)).call) == reason


@pytest.mark.parametrize(
    ("op", "module", "name"),
    [
        ("rms_norm", "apex.normalization.fused_layer_norm", "fused_rms_norm_affine"),
        ("layer_norm", "apex.normalization.fused_layer_norm", "fused_layer_norm_affine"),
        ("rope", "apex.transformer.functional", "fused_apply_rotary_pos_emb_cached"),
        ("adamw", "amp_C", "multi_tensor_adam"),
        ("adamw", "apex.multi_tensor_apply", "multi_tensor_applier"),
        ("wgrad_accumulate", "fused_weight_gradient_mlp_cuda", "wgrad_gemm_accum_fp32"),
    ],
)
def test_a_build_of_apex_without_a_function_refuses(op: str, module: str, name: str) -> None:
    """apex for a DCU has no fused_rms_norm: a function, a module or an extension that is not there is named."""
    library, modules, vendor = LIBRARIES["apex"]
    without = {m: {f: c for f, c in functions.items() if (m, f) != (module, name)} for m, functions in modules.items()}
    with fake_vendor(library, modules, contracts(vendor)):
        case = next(one for one in cases_of([op]) if not why_not(one.op.kernels[library], one))
    with fake_vendor(library, without, contracts(vendor)):
        assert why_not(case.op.kernels[library], case) == f"this build of apex has no {name} in {module}"
    without.pop(module)
    with fake_vendor(library, without, contracts(vendor)):
        assert why_not(case.op.kernels[library], case).startswith(f"this build of apex has no {module}")


def test_lightop_without_a_function_of_ours_fails_its_proof() -> None:
    """lightop knows nothing of autograd: its forward alone would leave the parameters without gradient."""
    with fake("lightop"):

        def naive(x: torch.Tensor, weight: torch.Tensor | None = None, eps: float = 1e-6) -> torch.Tensor:
            return sys.modules["lightop"].rmsnorm_forward(x, weight, torch.empty_like(x), eps, training=True)[0]

        op = all_ops()["rms_norm"]
        verdict = prove(op, Kernel("rms_norm", "naive", naive, "none"), op.bind(torch.randn(2, 8), torch.randn(8)))
    assert not verdict.holds
    assert "gradient of x is missing" in verdict.reason
