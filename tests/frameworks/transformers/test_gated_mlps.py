"""Gated MLPs of transformers are recognised by their numbers, and compute the same through glu."""

from __future__ import annotations

import importlib
import types
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

pytest.importorskip("transformers", reason="run: pip install transformers==5.24.0")

from model_steps import applied, distance, model_of, served, step

from llm_adapt.frameworks.transformers import mlps
from llm_adapt.frameworks.transformers.activations import name_of
from llm_adapt.ops.dispatch.receipt import receipt


def module_with(source: str, name: str = "transformers.models.toy.modeling_toy") -> Any:
    """A module of that text, as a model file would be."""
    module = types.ModuleType(name)
    text = "import torch\nfrom torch import nn\nfrom torch.nn import functional as F\n" + source
    exec(compile(text, "toy", "exec"), module.__dict__)
    return module


def only_class(body: str, name: str = "ToyMLP", inside: str = "") -> Any:
    """A class whose forward has that body."""
    lines = "".join(f"        {line}\n" for line in body.splitlines())
    return module_with(f"class {name}(nn.Module):\n{inside}    def forward(self, x):\n{lines}").__dict__[name]


RECOGNISED = {
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))": "down_proj(act_fn(gate_proj(x))"
    " * up_proj(x))",
    "return self.c(self.b(x) * self.act(self.a(x)))": "c(act(a(x)) * b(x))",
    "return self.w2(F.silu(self.w1(x)) * self.w3(x))": "w2(silu(w1(x)) * w3(x))",
    "return self.w2(F.gelu(self.w1(x), approximate='tanh') * self.w3(x))": "w2(gelu_tanh(w1(x)) * w3(x))",
    "a, b = self.both(x).chunk(2, dim=-1)\nreturn self.down(self.act(a) * b)": "down(act(gate) * up of both(x))",
    "a, b = self.both(x).chunk(2, dim=-1)\nreturn self.down(self.act(b) * a)": "down(act(gate) * up of both(x))",
    "y = self.both(x)\nreturn self.down(F.relu(y[..., ::2]) * y[..., 1::2])": "down(relu(gate) * up of both(x))",
}
NOT_RECOGNISED = [
    "return self.down_proj(self.act_fn(self.up_proj(x)))",
    "return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))",
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * 1.01",
    "return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=20.0) * self.up_proj(x))",
    "return self.down_proj(F.dropout(self.act_fn(self.gate_proj(x)), 0.1, self.training) * self.up_proj(x))",
    "return self.down_proj(self.act_fn(self.gate_proj(x.float())) * self.up_proj(x.float()))",
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * self.scale",
    "return self.down_proj(torch.nn.functional.mish(self.gate_proj(x)) * self.up_proj(x))",
    "return F.linear(self.act_fn(self.gate_proj(x)) * self.up_proj(x), self.down_proj.weight)",
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)), None",
    "return self.down_proj(self.act_fn(self.gate_proj(self.gate_proj(x))) * self.up_proj(x))",
]


@pytest.mark.parametrize("body", RECOGNISED)
def test_a_gated_mlp_is_recognised_whatever_its_names(body: str) -> None:
    """Projections and activation are told apart by what the numbers do, not by what they are called."""
    form, doubt = mlps.recognise(only_class(body))
    assert (str(form), doubt) == (RECOGNISED[body], "")


@pytest.mark.parametrize("body", NOT_RECOGNISED)
def test_what_is_near_a_gated_mlp_is_none(body: str) -> None:
    """Another factor, a clamp far out, dropout, a cast, a weight that is read: each is seen."""
    assert mlps.recognise(only_class(body))[0] is None


def test_a_method_of_its_own_that_a_subclass_may_change_is_respected() -> None:
    """A forward that calls a method of its class is left alone, though the numbers fit today."""
    body = "return self.down_proj(self.prepare(self.act_fn(self.gate_proj(x))) * self.up_proj(x))"
    cls = only_class(body, inside="    def prepare(self, y):\n        return y\n")
    assert mlps.recognise(cls) == (None, "calls its own prepare, which a subclass may change")


def test_what_speaks_of_a_gate_and_is_not_recognised_is_listed() -> None:
    """A class that has gate and down projections and another formula stands in the report, with the reason."""
    name = "transformers.models.dory.modeling_dory"
    importlib.import_module(name)
    with served(mlps.rows) as report:
        lines = [line for line in report.lines if line.subject == f"{name}:DoryMLP"]
    assert [(line.choice, "reads " in line.reason) for line in lines] == [("its own code", True)]


def test_probing_leaves_the_generator_alone() -> None:
    """The numbers that a script draws are the same, whether its model was probed or not."""
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert mlps.recognise(only_class(next(iter(RECOGNISED))))[0] is not None
    assert torch.equal(torch.rand(3), expected)


STATES = {
    "meta": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "fake": FakeTensorMode,
}


@pytest.mark.parametrize("state", STATES)
def test_probing_is_not_disturbed_by_the_state_of_the_caller(state: str) -> None:
    """A model file imported on meta, with fake tensors, under inference_mode or autocast is recognised all the same."""

    class Fresh(torch.nn.SiLU):
        pass

    with STATES[state]():
        assert mlps.recognise(only_class(next(iter(RECOGNISED))))[0] is not None
        assert name_of(Fresh()) == "silu"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["llama", "phi3", "gemma2"])
def test_a_model_computes_the_same(name: str, dtype: torch.dtype) -> None:
    """Loss, logits and every gradient agree with and without the rows, to the roundings of the dtype."""
    model = model_of(name, dtype)
    expected = step(model)
    with served(mlps.rows) as report:
        found = step(model)
        (calls,) = [row["calls"] for row in receipt() if row["op"] == "glu"]
        targets = applied(report)
    assert any(target.startswith(f"transformers.models.{name}.") for target in targets)
    assert calls == 2
    assert distance(found, expected) < (2e-6 if dtype == torch.float32 else 0.03)


def test_unpatching_restores_the_class() -> None:
    """The forward of a class is the very function that it was."""
    from transformers.models.llama.modeling_llama import LlamaMLP

    before = LlamaMLP.forward
    with served(mlps.rows):
        assert LlamaMLP.forward is not before
        assert LlamaMLP.forward.__wrapped__ is before
    assert LlamaMLP.forward is before


@pytest.fixture
def mlp() -> Any:
    """An MLP of Llama."""
    from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP

    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(hidden_size=8, intermediate_size=12, num_attention_heads=2))


def test_submodules_are_called_not_their_weights_read(mlp: Any) -> None:
    """What PEFT and quantisation put in the place of a projection is called, in the order of the original."""
    called = []

    class Adapted(torch.nn.Module):
        def __init__(self, name: str, inner: torch.nn.Module) -> None:
            super().__init__()
            self.name, self.inner = name, inner

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            called.append(self.name)
            return 2 * self.inner(x)

    for name in ("gate_proj", "up_proj", "down_proj"):
        setattr(mlp, name, Adapted(name, getattr(mlp, name)))
    x = torch.randn(3, 8)
    expected, order = mlp(x), called.copy()
    called.clear()
    with served(mlps.rows):
        torch.testing.assert_close(mlp(x=x), expected)
    assert called == order == ["gate_proj", "up_proj", "down_proj"]


def test_an_activation_that_glu_does_not_know_is_called(mlp: Any) -> None:
    """mish, a module with a hook and projections of two dtypes compute as before; the report says so once."""
    x = torch.randn(3, 8)
    mlp.act_fn = torch.nn.Mish()
    expected = mlp(x)
    with served(mlps.rows) as report:
        for _ in range(2):
            assert torch.equal(mlp(x), expected)
        reasons = [line.reason for line in report.lines if line.subject == "LlamaMLP"]
        assert [row for row in receipt() if row["op"] == "glu"] == []
    assert reasons == ["Mish is no activation of glu, or has hooks"]


def test_hooks_of_an_activation_run(mlp: Any) -> None:
    """A hook on act_fn sees what it saw before."""
    seen = []
    mlp.act_fn.register_forward_hook(lambda module, args, output: seen.append(output.shape))
    with served(mlps.rows):
        mlp(torch.randn(3, 8))
    assert seen == [(3, 12)]


def test_projections_of_two_dtypes_compute_as_before(mlp: Any) -> None:
    """A gate in float32 beside an up in float64 is multiplied as torch does, not refused."""
    mlp.up_proj, mlp.down_proj = mlp.up_proj.double(), mlp.down_proj.double()
    mlp.up_proj.register_forward_pre_hook(lambda module, args: (args[0].double(),))
    x = torch.randn(3, 8)
    expected = mlp(x)
    with served(mlps.rows) as report:
        assert torch.equal(mlp(x), expected)
        assert [line.reason for line in report.lines if line.subject == "LlamaMLP"] == [
            "its projections give two dtypes"
        ]


@pytest.mark.parametrize("act", ["silu", "gelu_new", "mish"])
def test_compiled_code_has_no_break(mlp: Any, act: str) -> None:
    """torch.compile traces the forward as one graph, for known and unknown activations, and it computes the same."""
    from transformers.activations import ACT2FN

    mlp.act_fn = ACT2FN[act]
    x = torch.randn(3, 8, requires_grad=True)
    expected = mlp(x)
    expected.sum().backward()
    gradient, x.grad = x.grad, None
    with served(mlps.rows):
        found = torch.compile(mlp, fullgraph=True, backend="eager")(x)
        found.sum().backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(x.grad, gradient)


KNOWN = {
    "gelu": "gelu", "gelu_python": "gelu", "gelu_new": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu", "relu": "relu", "relu2": "relu_squared", "sigmoid": "sigmoid", "silu": "silu",
    "swish": "silu",
}  # fmt: skip


def test_activations_are_told_by_their_numbers() -> None:
    """Of all activations of transformers those have a name that glu has; clipped and parametrised ones have none."""
    from transformers.activations import ACT2CLS, ACT2FN

    assert {name: found for name in ACT2CLS if (found := name_of(ACT2FN[name]))} == KNOWN


def test_functions_and_options_count() -> None:
    """Functions of torch are known by identity, torch.nn.GELU by its option, a lambda and None not at all."""
    asked = [F.silu, torch.sigmoid, F.gelu, torch.nn.GELU(), torch.nn.GELU("tanh"), lambda x: F.silu(x), None]
    assert [name_of(act) for act in asked] == ["silu", "sigmoid", "gelu", "gelu", "gelu_tanh", None, None]


def test_a_subclass_of_an_activation_is_asked_for_itself() -> None:
    """A class that is derived from SiLU and computes something else is not taken for it."""

    class Scaled(torch.nn.SiLU):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    assert name_of(Scaled()) is None
