"""Import order: whatever is imported, copied and patched first, the result is the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_adapt.patching import Plan
from tests.patching.toys import load, toys, wrap

KIT = {
    "kit": "from kit.core import norm",
    "kit.core": "def norm(x): return ('norm', x)\ndef scale(x): return ('scale', x)",
    "kit.layers": """
        from kit.core import norm, scale
        impl = {'norm': norm}
        def layer(x, f=scale): return f(impl['norm'](x))
    """,
}
# Ways to keep a copy of {f}, and the expression that calls it.
WAYS = [
    ("c{i} = {f}", "c{i}(1)"),
    ("def c{i}(x, f={f}): return f(x)", "c{i}(1)"),
    ("c{i} = functools.partial({f})", "c{i}(1)"),
    ("c{i} = {{'k': [{f}]}}", "c{i}['k'][0](1)"),
    ("c{i} = ({f}, 0)", "c{i}[0](1)"),
    ("class c{i}: impl = staticmethod({f})", "c{i}.impl(1)"),
    ("c{i} = (lambda g: lambda x: g(x))({f})", "c{i}(1)"),
]
FUNCTIONS = ["kit.norm", "kit.core.norm", "kit.core.scale", "kit.layers.layer"]
COPY = st.tuples(st.sampled_from(FUNCTIONS), st.sampled_from(WAYS))
STEPS = ("import kit.core", "import kit.layers", "import user", "patch")


def answers(order: list[str], copies: list[tuple[str, tuple[str, str]]]) -> tuple[list[Any], list[Any], bool]:
    """Do the steps in this order; what every copy answers then and after undo, and whether identities came back."""
    source = ["import functools, kit, kit.core, kit.layers"]
    source += [way.format(i=i, f=f) for i, (f, (way, _)) in enumerate(copies)]
    calls = [call.format(i=i) for i, (_, (_, call)) in enumerate(copies)]
    with toys({**KIT, "user": "\n".join(source)}):
        plan = Plan([wrap("kit.core:norm"), wrap("kit.core:scale"), wrap("kit.layers:layer")])
        steps: dict[str, Callable[[], Any]] = {"patch": plan.apply}
        try:
            for step in order:
                steps.get(step, lambda step=step: load(step.removeprefix("import ")))()
            user = vars(load("user"))
            patched = [eval(call, user) for call in calls]
            assert [outcome.status for outcome in plan.outcomes()] == ["applied"] * 3
        finally:
            left = plan.undo()
        restored = [eval(call, user) for call in calls]
        core, layers = load("kit.core"), load("kit.layers")
        same = load("kit").norm is core.norm is layers.norm is layers.impl["norm"] and layers.scale is core.scale
        return patched, restored, same and not left


@settings(deadline=None, max_examples=40)
@given(st.permutations(STEPS), st.lists(COPY, max_size=4))
def test_the_order_of_imports_and_patch_never_matters(
    order: list[str], copies: list[tuple[str, tuple[str, str]]]
) -> None:
    """Every order gives what patching last gives, and undo gives what never patching gives."""
    patched, restored, same = answers(order, copies)
    expected = {
        "norm": ("loud", ("norm", 1)),
        "scale": ("loud", ("scale", 1)),
        "layer": ("loud", ("loud", ("scale", ("loud", ("norm", 1))))),
    }
    original = {"norm": ("norm", 1), "scale": ("scale", 1), "layer": ("scale", ("norm", 1))}
    names = [f.rpartition(".")[2] for f, _ in copies]
    assert patched == [expected[name] for name in names]
    assert restored == [original[name] for name in names]
    assert same
