"""The experts of transformers on our operators compute what their own implementations compute."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

import transformers.integrations.moe as interface
from model_steps import MOE, applied, distance, model_of, served, step

from llm_adapt.frameworks.transformers import experts
from llm_adapt.frameworks.transformers.gates import Gate, gate, recognise
from llm_adapt.ops.dispatch.receipt import receipt

GROUPED = "transformers.integrations.moe:grouped_mm_experts_forward"
OURS = {"grouped_gemm", "moe_permute", "moe_unpermute"}


@pytest.fixture
def as_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's grouped product counts as one of a kernel library, so that the experts are in place on the CPU."""
    monkeypatch.setattr(experts, "_TORCHS", ("chunked",))


def calls() -> dict[str, int]:
    """How often each op was called."""
    found: dict[str, int] = {}
    for row in receipt():
        found[row["op"]] = found.get(row["op"], 0) + row["calls"]
    return found


@pytest.mark.parametrize("name", MOE)
def test_a_model_computes_the_same_as_with_eager_experts(as_elsewhere: None, name: str) -> None:
    """Loss, logits and every gradient of five families, their router's too, agree with the loop over experts."""
    model = model_of(name)
    model.set_experts_implementation("eager")
    expected = step(model)
    model.set_experts_implementation("grouped_mm")
    with served(experts.rows) as report:
        found = step(model)
        assert set(calls()) >= OURS
        assert GROUPED in applied(report)
    assert distance(found, expected) < 3e-6


def module_of(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The experts of a family, with the same weights each time."""
    model = model_of(name, dtype)
    found = [m for n, m in model.named_modules() if n.endswith("mlp.experts")]
    found[0].config._experts_implementation = "grouped_mm"
    return found[0]


def routed(module: Any, tokens: int, topk: int, seed: int, spare: int = 0) -> tuple[torch.Tensor, ...]:
    """Hidden states, chosen experts and weights; the last `spare` experts have no token."""
    generator = torch.Generator().manual_seed(seed)
    dtype = module.down_proj.dtype
    hidden = torch.randn(tokens, module.config.hidden_size, generator=generator).to(dtype)
    scores = torch.rand(tokens, module.num_experts - spare, generator=generator)
    weights, index = scores.topk(topk, dim=-1)
    return hidden, index, weights.to(dtype)


def results(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output, and the gradients of hidden states, weights of the router and parameters."""
    hidden, weights = hidden.clone().requires_grad_(), weights.clone().requires_grad_()
    module.zero_grad(set_to_none=True)
    y = module(hidden, index, weights)
    if y.requires_grad:  # the loop over the experts of no token is no loop
        (y.float() * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.device)).sum().backward()
    leaves = {"hidden": hidden, "weights": weights, **dict(module.named_parameters())}
    # The loop gives an expert without tokens no gradient where it is alone, the product a gradient of zeros.
    return {"y": y.detach(), **{n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in leaves.items()}}


def eager(module: Any, *arguments: torch.Tensor) -> dict[str, torch.Tensor]:
    """The same from the loop over experts, in float32."""
    module.config._experts_implementation = "eager"
    try:
        return results(module, *arguments)
    finally:
        module.config._experts_implementation = "grouped_mm"


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_experts_agree_whatever_the_routing(as_elsewhere: None, name: str, dtype: torch.dtype) -> None:
    """No token, one token, experts without tokens, one to three experts a token; output and every gradient."""
    module, wide = module_of(name, dtype), module_of(name, dtype).float()
    cases = [routed(module, tokens, topk, seed, spare) for tokens, topk, seed, spare in CASES]
    expected = [eager(wide, *(t.float() if t.is_floating_point() else t for t in case)) for case in cases]
    with served(experts.rows):
        found = [results(module, *case) for case in cases]
        assert calls()["grouped_gemm"] == 2 * len(cases)
    for one, other in zip(found, expected, strict=True):
        assert distance(one, {n: t.to(dtype) for n, t in other.items()}) < (2e-6 if dtype == torch.float32 else 0.05)


CASES = [(0, 2, 0, 0), (1, 2, 1, 0), (1, 1, 2, 3), (12, 3, 3, 1), (33, 2, 4, 0)]


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_an_expert_chosen_twice_counts_twice(in_place: Any, data: st.DataObject) -> None:
    """Any indices at all, also one expert several times for one token: both of its weights count."""
    module = in_place
    tokens, topk = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 3))
    chosen = data.draw(st.lists(st.integers(0, module.num_experts - 1), min_size=tokens * topk, max_size=tokens * topk))
    hidden, _, weights = routed(module, tokens, topk, 0)
    index = torch.tensor(chosen).view(tokens, topk)
    expected = eager(module, hidden, index, weights)
    assert distance(results(module, hidden, index, weights), expected) < 3e-6


@pytest.fixture
def in_place(as_elsewhere: None) -> Any:
    """Experts of Mixtral, with the rows in place for the whole test."""
    module = module_of("mixtral")
    with served(experts.rows):
        yield module


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_experts_of_other_ranks_have_no_rows(as_elsewhere: None, name: str) -> None:
    """Under expert parallelism an index of E or more adds nothing, to the output and to every gradient."""
    module = module_of(name)
    hidden, index, weights = routed(module, 9, 2, 5)
    index[::2, 0] = module.num_experts
    index[3] = module.num_experts + 2
    weights = weights.masked_fill(index >= module.num_experts, 0.0)
    module._is_expert_parallel = True
    expected = results(module, hidden, index, weights)
    with served(experts.rows):
        found = results(module, hidden, index, weights)
        assert calls()["grouped_gemm"] == 2
    assert distance(found, expected) < 3e-6
    assert bool((found["weights"][index >= module.num_experts] == 0).all())
    assert bool((found["y"][3] == 0).all())


def test_options_of_other_families_are_honoured(as_elsewhere: None) -> None:
    """Experts without a gate, with a norm after each expert, and transposed: as the original computes them."""
    for name in ("nemotron_h", "muse_spark", "aria"):
        importlib.import_module(f"transformers.models.{name}.modeling_{name}")
    module = module_of("mixtral")
    plain = routed(module, 9, 2, 6)
    module.up_proj = torch.nn.Parameter(module.gate_up_proj.detach()[:, :24].clone())
    module.post_expert_norm = torch.nn.RMSNorm(32)
    module.has_gate, module.has_post_expert_norm = False, True
    expected = [results(module, *plain)]
    module.is_transposed = True
    for parameter in (module.up_proj, module.down_proj):
        parameter.data = parameter.data.transpose(1, 2).contiguous()
    expected += [results(module, *plain)]
    with served(experts.rows):
        found = [results(module, *plain)]
        assert set(calls()) == OURS
        for parameter in (module.up_proj, module.down_proj):
            parameter.data = parameter.data.transpose(1, 2).contiguous()
        module.is_transposed = False
        found += [results(module, *plain)]
    for one, other in zip(found, reversed(expected), strict=True):
        assert distance(one, other) < 3e-6


def test_hidden_states_wider_than_the_weights_are_cast_as_before(as_elsewhere: None) -> None:
    """float32 hidden states for bfloat16 weights give a float32 result, as from the original."""
    module = module_of("mixtral", torch.bfloat16)
    hidden, index, weights = routed(module, 9, 2, 7)
    expected = module(hidden.float(), index, weights)
    with served(experts.rows):
        found = module(hidden.float(), index, weights)
    assert found.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_what_no_kernel_serves_goes_to_the_original(as_elsewhere: None) -> None:
    """Compiled code in float32 runs the original, told in the report, and the graph has no break."""
    module = module_of("mixtral")
    arguments = routed(module, 9, 2, 8)
    expected = module(*arguments)
    with served(experts.rows) as report:
        found = torch.compile(module, fullgraph=True, backend="eager")(*arguments)
        lines = [
            (line.choice, line.reason) for line in report.lines if line.subject == "transformers: grouped_mm experts"
        ]
    torch.testing.assert_close(found, expected)
    assert lines == [("its own code", "compiled code has no kernel of grouped_gemm for torch.float32 on cpu")]


def test_compiled_code_in_bfloat16_has_no_break(as_elsewhere: None) -> None:
    """torch.compile traces the operators of the experts as one graph."""
    module = module_of("gpt_oss", torch.bfloat16)
    arguments = routed(module, 9, 2, 9)
    with served(experts.rows):
        expected = module(*arguments)
        found = torch.compile(module, fullgraph=True, backend="eager")(*arguments)
    torch.testing.assert_close(found, expected, rtol=0.02, atol=0.02)


def test_on_the_cpu_transformers_keeps_its_own_code_and_says_so() -> None:
    """Where torch has the only grouped product, "grouped_mm" is the original; the gates are glu all the same."""
    before = interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"]
    with served(experts.rows) as report:
        assert interface.ALL_EXPERTS_FUNCTIONS["grouped_mm"] is before
        assert GROUPED not in applied(report)
        assert [line.choice for line in report.lines if "grouped_mm experts" in line.subject] == ["their own code"]
        assert "transformers.integrations.moe:_default_apply_gate" in applied(report)


def test_unpatching_restores_the_interface(as_elsewhere: None) -> None:
    """The table of implementations and the gates of classes are the very ones."""
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    def state() -> list[int]:
        table = interface.ExpertsInterface._global_mapping
        return [*map(id, table.values()), id(GptOssExperts._apply_gate), id(MixtralExperts._apply_gate)]

    before = state()
    with served(experts.rows):
        changed = [one != other for one, other in zip(state(), before, strict=True)]
    assert changed == [key == "grouped_mm" for key in interface.ExpertsInterface._global_mapping] + [True, True]
    assert state() == before


@pytest.mark.simulator("npu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_npu_serves_experts_by_its_own_kernels(dtype: torch.dtype) -> None:
    """On an NPU rows are permuted, multiplied, gated and added up by torch_npu; results agree with the loop."""
    module = module_of("mixtral", dtype).to("npu")
    arguments = [tensor.to("npu") for tensor in routed(module, 9, 2, 10)]
    expected = eager(module, *arguments)
    with served(experts.rows, order=("torch_npu",), device="npu") as report:
        found = results(module, *arguments)
        assert GROUPED in applied(report)
        assert {(row["op"], row["library"]) for row in receipt()} == {(op, "torch_npu") for op in {*OURS, "glu"}}
    assert distance(found, expected) < (1e-5 if dtype == torch.float32 else 0.05)


GATES = {
    "gpt_oss": "GptOssExperts", "minimax_m3_vl": "MiniMaxM3VLExperts", "deepseek_v4": "DeepseekV4Experts",
    "openai_privacy_filter": "OpenAIPrivacyFilterExperts", "glm5_next": "Glm5NextTextExperts",
    "step3p7": "Step3p7Experts", "inkling2": "Inkling2Experts",
}  # fmt: skip
NO_GATES = ("step3p7", "inkling2")


@pytest.mark.parametrize("name", GATES)
def test_gates_are_recognised_by_their_numbers(name: str) -> None:
    """Those with limit and alpha give what glu gives, in value and gradient; a clamp after the activation is none."""
    cls = getattr(importlib.import_module(f"transformers.models.{name}.modeling_{name}"), GATES[name])
    form = recognise(cls)
    assert (form is None) == (name in NO_GATES)
    if form is None:
        return
    module = torch.nn.Module()
    module.act_fn = torch.nn.SiLU()
    for attribute, value in ((form.alpha, 1.702), (form.limit, 0.9)):
        if attribute:
            setattr(module, attribute, value)
    x = (2 * torch.randn(7, 12, generator=torch.Generator().manual_seed(3))).requires_grad_()
    pair = []
    for function in (cls._apply_gate, gate(cls, form)):
        y = function(module, x)
        pair.append([y, *torch.autograd.grad(y.square().sum(), x)])
    for one, other in zip(*pair, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gate_with_another_activation_is_its_own() -> None:
    """A gate whose act_fn is none of glu's activations runs as it is written."""
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4Experts as Experts

    module = torch.nn.Module()
    module.act_fn, module.limit = torch.nn.Mish(), 0.9
    x = torch.randn(7, 12)
    form = recognise(Experts)
    assert form == Gate("halves", act="act_fn", limit="limit")
    assert torch.equal(gate(Experts, form)(module, x), Experts._apply_gate(module, x))
