"""Norms of model files: which formula each class computes, what keeps a class as it is, and what a replacement does."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.frameworks.transformers import norms, rotary
from llm_adapt.frameworks.transformers.norm_candidates import forward_of
from llm_adapt.frameworks.transformers.probe import share_apart
from tests.frameworks.transformers.probed import TOLD, make_module, modeling, op_calls, served_norm, told

pytest.importorskip("transformers")


RMS = """
class SomeRMSNorm(nn.Module):
    def __init__(self, size, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps
    def forward(self, x):
        y = x.float()
        {before}
        y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + self.eps)
        {after}
        return (self.weight * y).to(x.dtype)
"""


# -- recognising --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "cls", "family"),
    [
        ("llama", "LlamaRMSNorm", "rms_norm, cast_first, result dtype promoted"),
        ("gemma2", "Gemma2RMSNorm", "rms_norm, one_plus, result dtype x"),
        ("qwen3_next", "Qwen3NextRMSNorm", "rms_norm, one_plus, result dtype x"),
        ("gpt_oss", "GptOssRMSNorm", "rms_norm, standard, result dtype x"),
        ("llama4", "Llama4TextRMSNorm", "rms_norm, cast_first, result dtype promoted"),
        ("nanochat", "NanoChatRMSNorm", "rms_norm, no weight"),
        ("t5", "T5LayerNorm", "rms_norm, cast_first, x and weight of one dtype"),
        ("cohere", "CohereLayerNorm", "layer_norm, standard, result dtype x"),
        ("olmo", "OlmoLayerNorm", "layer_norm, no weight"),
    ],
)
def test_each_formula_is_recognised(model: str, cls: str, family: str) -> None:
    """The order of roundings, the form of the weight and the dtype of the result are told apart."""
    found = norms.examine(modeling(model))[getattr(modeling(model), cls)]
    assert not isinstance(found, str)
    assert [formula.family for formula in found] == [family]


def test_a_flag_of_the_instance_chooses_its_formula() -> None:
    """Gemma-3n's norm has a weight or none, as each instance says."""
    found = norms.examine(modeling("gemma3n"))[modeling("gemma3n").Gemma3nRMSNorm]
    assert [(formula.flags, formula.weight) for formula in found] == [
        ((("with_scale", True),), "weight"),
        ((("with_scale", False),), ""),
    ]


@pytest.mark.parametrize(
    ("model", "cls", "reason"),
    [
        ("falcon_h1", "FalconH1RMSNormGated", "its forward takes (hidden_states, gate)"),
        ("qwen3_next", "Qwen3NextRMSNormGated", "its forward takes (hidden_states, gate)"),
        ("deberta", "DebertaLayerNorm", "it rounds in another order in 16 bits"),
        ("axk2", "AXK2GatedRMSNorm", "its constructor takes a config"),
    ],
)
def test_what_computes_something_else_is_left_alone(model: str, cls: str, reason: str) -> None:
    """A gated norm, another order of roundings and a norm with modules of its own keep their forward, and say why."""
    assert norms.examine(modeling(model))[getattr(modeling(model), cls)] == reason


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        ("", "", None),
        ("", "y = y * 1.001", "it computes none of the formulas"),
        ("", "y = y.to(x.dtype).float()", None),  # then it is cast_first with a result of x
        ("y = y - y.mean(-1, keepdim=True)", "", None),  # then it is LayerNorm
        ("y = y - y.amin(-1, keepdim=True)", "", "it computes none of the formulas"),
        ("y = y + 0.5 if x.ndim == 2 and len(x) == 5 else y", "", "it computes something else for x of 2 axes"),
        ("y = y + 0.5 if x.shape[-1] == 24 else y", "", "it computes something else for x of 2 axes"),
        ("y = y.detach()", "", "its gradient is not that of its formula"),
        ("self.calls = 1", "", "its forward changes its instance, or its input"),
        ("x.mul_(1)", "", "its forward changes its instance, or its input"),
        ("y = y + 0 * torch.rand_like(y)", "", "calls aten.rand_like"),
        ("assert float(y.sum()) < 1e9", "", "calls aten._local_scalar_dense"),
        ("y = y.double()", "y = y.float()", "it computes in float64, on purpose"),
        ("raise RuntimeError('no')", "", "its forward raises RuntimeError: no"),
        ("y = y.half().float()", "", "it computes none of the formulas"),
        ("y = y.bfloat16().float() if x.dtype is torch.float16 else y", "", "it rounds in another order in 16 bits"),
        ("", "y = y * (1 + 2**-10) if x.dtype is torch.bfloat16 else y", "it rounds in another order in 16 bits"),
    ],
)
def test_numbers_decide(before: str, after: str, reason: str | None) -> None:
    """One line in the body, under the same name, makes another norm of it, or none."""
    module = make_module(RMS.format(before=before, after=after))
    found = norms.examine(module)[module.SomeRMSNorm]
    assert (found if isinstance(found, str) else None) == reason
    if reason is None and not isinstance(found, str):
        expected = ("layer_norm" if before else "rms_norm", "cast_first" if after else "standard", "x", "eps")
        assert [(one.op, one.form, one.result_dtype, one.eps) for one in found] == [expected]


def test_instances_that_carry_hooks_are_left_alone() -> None:
    """A hook of the instance's own would see other calls."""
    source = RMS.format(before="", after="").replace(
        "self.eps = eps", "self.eps = eps; self.register_forward_hook(lambda *args: None)"
    )
    module = make_module(source)
    assert norms.examine(module) == {module.SomeRMSNorm: "its instances carry hooks"}


def test_eps_is_found_wherever_it_is() -> None:
    """By what the numbers do when an attribute changes, among others; else among the usual constants."""
    source = RMS.format(before="", after="").replace("self.eps = eps", "self.eps = 1.0; self.tiny = eps")
    module = make_module(source.replace("+ self.eps", "+ self.tiny * self.eps"))
    (found,) = norms.examine(module)[module.SomeRMSNorm]
    assert (found.eps, found.flags) == ("tiny", (("eps", 1.0),))  # type: ignore[union-attr]
    new, norm, x = norms.replacement(module.SomeRMSNorm, (found,), told), module.SomeRMSNorm(8), torch.randn(3, 8)  # type: ignore[arg-type]
    norm.eps = 1e5
    torch.testing.assert_close(new(norm, x), norm(x))
    module = make_module(source.replace("+ self.eps", "+ self.tiny"))
    assert [one.eps for one in norms.examine(module)[module.SomeRMSNorm]] == ["tiny"]  # type: ignore[union-attr]
    module = make_module(source.replace("+ self.eps", "+ 1e-5"))
    assert [one.eps for one in norms.examine(module)[module.SomeRMSNorm]] == [1e-5]  # type: ignore[union-attr]
    module = make_module(source.replace("+ self.eps", "+ 3e-5"))
    assert norms.examine(module) == {module.SomeRMSNorm: "it computes none of the formulas"}


def test_only_classes_of_the_module_itself_are_tried() -> None:
    """A class that was imported from elsewhere, and one that looks like no norm, are not constructed."""
    module = make_module(RMS.format(before="", after="") + "\nclass Boom(nn.Module):\n    def __init__(self): 1 / 0\n")
    module.LlamaRMSNorm = modeling("llama").LlamaRMSNorm  # type: ignore[attr-defined]
    module.Alias = module.SomeRMSNorm  # type: ignore[attr-defined]
    assert list(norms.examine(module)) == [module.SomeRMSNorm]


# -- what a probe leaves behind -----------------------------------------------------------------------------------


def test_a_probe_changes_nothing_outside() -> None:
    """Generators, default dtype, gradient mode and module state are as before, though a constructor draws numbers."""
    source = RMS.format(before="", after="").replace("torch.ones(size)", "torch.randn(size)")
    module = make_module(source)
    before = (torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled())
    with torch.no_grad():
        assert not isinstance(norms.examine(module)[module.SomeRMSNorm], str)
        assert not torch.is_grad_enabled()
    after = (torch.get_rng_state(), torch.get_default_dtype(), torch.is_grad_enabled())
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


@pytest.mark.parametrize("around", ["device", "default_device", "fake", "inference", "autocast", "dtype"])
def test_a_probe_does_not_feel_where_it_runs(around: str) -> None:
    """A model file may be imported under meta devices, fake tensors, inference mode, autocast or another dtype."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    product = make_module(RMS.format(before="y = F.linear(y, torch.eye(x.shape[-1], dtype=y.dtype))", after=""))
    modules = [modeling("gemma2"), modeling("nemotron"), product]
    expected = [norms.examine(module) for module in modules]
    assert not any(isinstance(one, str) for found in expected for one in found.values())
    if around == "default_device":
        torch.set_default_device("meta")
    if around == "dtype":
        torch.set_default_dtype(torch.bfloat16)
    try:
        with {
            "device": lambda: torch.device("meta"),
            "fake": FakeTensorMode,
            "inference": torch.inference_mode,
            "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        }.get(around, torch.enable_grad)():
            found = [norms.examine(module) for module in modules]
            assert torch.empty(1).device.type == ("meta" if "device" in around else "cpu")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert found == expected


def test_the_autograd_engine_does_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients are compared without it: where it has started threads of a device, no forked child may use it."""

    def run(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the engine was started")

    monkeypatch.setattr(torch.autograd, "_engine_run_backward", run)
    monkeypatch.setattr(torch.autograd.graph, "_engine_run_backward", run)
    with pytest.raises(AssertionError, match="the engine was started"):
        torch.ones(1, requires_grad=True).backward()
    for model in ("llama", "nemotron"):
        found = {**norms.examine(modeling(model)), **rotary.examine(modeling(model))}
        assert len(found) == 2
        assert not any(isinstance(one, str) for one in found.values())


# -- replacements -------------------------------------------------------------------------------------------------

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from(
        [
            ("llama", "LlamaRMSNorm"), ("gemma2", "Gemma2RMSNorm"), ("gpt_oss", "GptOssRMSNorm"),
            ("nanochat", "NanoChatRMSNorm"), ("t5", "T5LayerNorm"), ("cohere", "CohereLayerNorm"),
            ("nemotron", "NemotronLayerNorm1P"), ("gemma3n", "Gemma3nRMSNorm"),
        ]
    ),
    shape=st.lists(st.integers(1, 5), min_size=0, max_size=3),
    size=st.integers(4, 70),  # in a row of two, LayerNorm's gradient is all cancellation
    x_dtype=st.sampled_from(DTYPES),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([1e-6, 1e-5, 0.1]),
    seed=st.integers(0, 2**16),
)  # fmt: skip
def test_the_replacement_is_the_original(
    which: tuple[str, str], shape: list[int], size: int, x_dtype: Any, dtype: Any, eps: float, seed: int
) -> None:
    """For every shape, dtype of x and of weight, the result has the dtype, the values and the gradients of before."""
    cls, new, original = served_norm(*which)
    generator = torch.Generator().manual_seed(seed)
    arguments = {} if which[0] == "nanochat" else {next(iter(inspect.signature(cls).parameters)): size}
    norm = cls(eps=eps, **arguments).to(dtype)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(*shape, size, generator=generator).to(x_dtype)
    results = []
    for forward in (original, new):
        leaf = x.clone().requires_grad_()
        norm.zero_grad()
        try:
            y = forward(norm, leaf)
        except RuntimeError as error:
            results.append(str(error))
            continue
        y.float().sum().backward()
        results.append([y.detach(), leaf.grad, *(parameter.grad for parameter in norm.parameters())])
    if isinstance(results[0], str):  # an operator that takes one dtype only
        assert results[0] == results[1]
        return
    for y, z in zip(*results, strict=True):
        assert (y.dtype, y.shape) == (z.dtype, z.shape)
        step = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}
        tolerance = max(step[one] for one in (y.dtype, x_dtype, dtype))
        torch.testing.assert_close(z, y, rtol=tolerance, atol=tolerance * max(1.0, float(y.abs().max())))


def test_roundings_are_those_of_the_original() -> None:
    """In 16 bits all but a few elements are the same to the bit, with a weight of either dtype."""
    for which in (("llama", "LlamaRMSNorm"), ("gemma2", "Gemma2RMSNorm"), ("gpt_oss", "GptOssRMSNorm")):
        cls, new, original = served_norm(*which)
        for dtype in (torch.bfloat16, torch.float32):
            norm = cls(64).to(dtype)
            torch.nn.init.normal_(norm.weight)
            x = torch.randn(128, 64).bfloat16()
            assert share_apart(new(norm, x), original(norm, x)) < 0.01


def test_a_float32_weight_gives_a_float32_result() -> None:
    """PEFT keeps norms in float32 and relies on what Llama's then returns."""
    cls, new, original = served_norm("llama", "LlamaRMSNorm")
    x = torch.randn(2, 8).bfloat16()
    assert new(cls(8), x).dtype == original(cls(8), x).dtype == torch.float32


def test_the_signature_is_kept() -> None:
    """Keyword calls work, and inspection shows what it showed."""
    for which, keyword in ((("llama", "LlamaRMSNorm"), "hidden_states"), (("gemma2", "Gemma2RMSNorm"), "x")):
        cls, new, original = served_norm(*which)
        assert inspect.signature(new) == inspect.signature(original)
        assert (new.__qualname__, new.__module__) == (original.__qualname__, original.__module__)
        assert new(cls(8), **{keyword: torch.randn(2, 8)}).shape == (2, 8)


@pytest.mark.parametrize(
    ("change", "is_served"),
    [
        ("", True),
        ("def extra_repr(self): return ''", True),
        ("def _norm(self, x): return 2 * x", False),
    ],
)
def test_a_subclass_that_computes_otherwise_has_the_original(change: str, is_served: bool) -> None:
    """What forward goes through may be overridden anywhere, later too; what it does not go through may differ."""
    cls, new, original = served_norm("gemma2", "Gemma2RMSNorm")
    space: dict[str, Any] = {}
    exec(f"{change or 'pass'}", space)
    child = type("Child", (cls,), {name: value for name, value in space.items() if callable(value)})
    norm, x, before = child(8), torch.randn(3, 8), op_calls()
    assert torch.equal(new(norm, x), original(norm, x)) or is_served
    torch.testing.assert_close(new(norm, x), original(norm, x))
    assert (op_calls() > before) == is_served


def test_a_flag_that_was_not_recognised_has_the_original() -> None:
    """Qwen4's norm in groups, and ConvNeXt's over channels, are other formulas of the same class."""
    cls, new, original = served_norm("qwen4_exp", "Qwen4ExpTextRMSNorm")
    norm, x, before = cls(16, group_size=4), torch.randn(3, 16), op_calls()
    torch.testing.assert_close(new(norm, x), original(norm, x))
    cls, new, original = served_norm("convnext", "ConvNextLayerNorm")
    norm, x = cls(8, data_format="channels_first"), torch.randn(2, 8, 3, 3)
    torch.testing.assert_close(new(norm, x), original(norm, x))
    assert op_calls() == before


def test_a_missing_or_shaped_weight_has_the_original() -> None:
    """A weight of None, or one of two axes, is for the original to take or to refuse."""
    cls, new, original = served_norm("cohere", "CohereLayerNorm")
    norm, x, before = cls((3, 8)), torch.randn(2, 3, 8), op_calls()
    torch.testing.assert_close(new(norm, x), original(norm, x))
    cls, new, _ = served_norm("llama", "LlamaRMSNorm")
    norm = cls(8)
    norm.weight = None
    with pytest.raises(TypeError):
        new(norm, x)
    assert op_calls() == before


@pytest.mark.parametrize("which", [("llama", "LlamaRMSNorm"), ("nemotron", "NemotronLayerNorm1P")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_is_as_before(which: tuple[str, str], dtype: torch.dtype) -> None:
    """Under autocast dtype and values are those of the original, which knows operators that autocast treats apart."""
    cls, new, original = served_norm(*which)
    norm, x, before = cls(16), torch.randn(5, 16).to(dtype), op_calls()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, z = original(norm, x), new(norm, x)
    assert y.dtype == z.dtype
    torch.testing.assert_close(z, y)
    assert (op_calls() > before) == (which[0] == "llama")


def test_what_autocast_changes_has_the_original_under_it() -> None:
    """A product of matrices is one: with autocast the original serves, and without it the op."""
    module = make_module(RMS.format(before="y = F.linear(y, torch.eye(x.shape[-1]))", after=""))
    found: Any = norms.examine(module)[module.SomeRMSNorm]
    new, norm, x = norms.replacement(module.SomeRMSNorm, found, told), module.SomeRMSNorm(16), torch.randn(5, 16)
    before, lines = op_calls(), len(TOLD)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(new(norm, x), norm(x))
    assert (op_calls(), len(TOLD)) == (before, lines + 1)
    torch.testing.assert_close(new(norm, x), norm(x))
    assert (op_calls(), len(TOLD)) == (before + 1, lines + 1)


def test_a_class_that_inherits_a_replaced_forward_is_tried_with_the_original() -> None:
    """What it inherits is not taken for its own: the numbers are the subclass's."""
    plain = make_module(RMS.format(before="", after=""))
    cls = plain.SomeRMSNorm
    own = cls.forward
    cls.forward = norms.replacement(cls, norms.examine(plain)[cls], told)  # type: ignore[arg-type]
    assert forward_of(cls) is own
    child = type("ChildRMSNorm", (cls,), {"__module__": plain.__name__})
    plain.ChildRMSNorm = child  # type: ignore[attr-defined]
    assert forward_of(child) is own
    assert norms.examine(plain)[child] == norms.examine(plain)[cls]
