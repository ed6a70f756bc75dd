"""The OpenMP kernels beside transformers' own code: the same roundings in the same places."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from llm_adapt.ops.dispatch.registry import find_op, load_library
from tests.ops.norm_checks import upstream_norm

if load_library("openmp"):
    pytest.skip(load_library("openmp"), allow_module_level=True)
pytest.importorskip("transformers")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """The numbers that tests draw are the same in each run."""
    torch.manual_seed(0)


def computed(name: str, **arguments: Any) -> Any:
    """What our kernel of an op returns, asked directly."""
    return find_op(name).kernels["openmp"].function(**arguments)


def share_of_equals(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Of elements that are the same bits; their dtype must be one."""
    assert found.dtype == expected.dtype
    return float((found == expected).float().mean())


@dtypes
def test_rope_has_the_bits_of_transformers(dtype: torch.dtype) -> None:
    """compute="x" rounds products and sums as apply_rotary_pos_emb does, whose own output it equals."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    q, k = (torch.randn(2, 40, heads, 64).to(dtype).transpose(1, 2) for heads in (4, 2))
    angles = torch.rand(2, 40, 32) * 6.28
    cos, sin = (torch.cat((part, part), -1).to(dtype) for part in (angles.cos(), angles.sin()))
    for x, expected in zip((q, k), apply_rotary_pos_emb(q, k, cos, sin), strict=True):
        found = computed("rope", x=x, cos=cos, sin=sin, layout="bhsd", compute="x")
        assert torch.equal(found, expected)
        assert found.stride() == x.stride()


@dtypes
def test_rms_norm_rounds_as_llama_does(dtype: torch.dtype) -> None:
    """cast_first gives LlamaRMSNorm's 16-bit numbers, but for the few that a last bit of the root decides."""
    x, weight = torch.randn(50, 700).to(dtype), torch.randn(700).to(dtype)
    expected = upstream_norm("llama", "LlamaRMSNorm", weight, 1e-6)(x).detach()
    found = computed("rms_norm", x=x, weight=weight, form="cast_first", result_dtype="promoted")
    if dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    else:
        assert share_of_equals(found, expected) > 0.995


@pytest.mark.parametrize("form", ["standard", "cast_first", "one_plus", "one_plus_rounded"])
@pytest.mark.parametrize("dtypes", [(0, 1), (1, 0), (1, 1), (2, 1), (1, 2)], ids=str)
def test_forms_round_where_the_reference_rounds(form: str, dtypes: tuple[int, int]) -> None:
    """Each form, computed in the dtypes of the call, has the reference's numbers for weights that rounding changes."""
    x = torch.randn(50, 700).to(DTYPES[dtypes[0]])
    weight = (torch.rand(700) * 2.0**-6).to(DTYPES[dtypes[1]])
    arguments = {"x": x, "weight": weight, "form": form, "result_dtype": "promoted"}
    found, expected = computed("rms_norm", **arguments), find_op("rms_norm").reference(**arguments)
    if found.dtype == torch.float32 and form != "cast_first":
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
    else:
        assert share_of_equals(found, expected) > (0.98 if found.dtype != torch.float32 else 0.2)
        torch.testing.assert_close(found, expected)


@dtypes
def test_the_loss_is_that_of_a_causal_model(dtype: torch.dtype) -> None:
    """The float32 loss that ForCausalLMLoss takes of upcast logits, and the gradient it sends back, rounded once."""
    from transformers.loss.loss_utils import fixed_cross_entropy

    logits = (3 * torch.randn(64, 3000)).to(dtype)
    target = torch.randint(3000, (64,))
    target[::5] = -100
    losses, gradients = [], []
    for compute in (lambda x: fixed_cross_entropy(x.float(), target), lambda x: computed_loss(x, target)):
        leaf = logits.clone().requires_grad_()
        loss = compute(leaf)
        loss.backward()
        losses.append(loss.detach())
        gradients.append(leaf.grad)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=4 * torch.finfo(dtype).eps, atol=1e-7)


def computed_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean loss of our kernel."""
    loss: torch.Tensor = computed("cross_entropy", logits=logits, target=target)[0]
    return loss


@dtypes
def test_swiglu_is_within_a_rounding_of_transformers(dtype: torch.dtype) -> None:
    """act_fn(gate) * up rounds twice in 16 bits, ours once: they differ by that, and by nothing in the mean."""
    from transformers.activations import ACT2FN

    gate, up = (torch.randn(64, 3000).to(dtype) for _ in range(2))
    found, exact = computed("glu", x=gate, up=up), ACT2FN["silu"](gate.double()) * up.double()
    upstream = ACT2FN["silu"](gate) * up
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(found, upstream, rtol=2 * eps, atol=1e-6)
    if dtype != torch.float32:
        assert float((found - exact).abs().mean()) <= float((upstream - exact).abs().mean())
