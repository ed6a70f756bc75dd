"""The chunked loss of a linear layer against the layer and the plain loss."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llm_adapt.ops.cross_entropy import cross_entropy
from llm_adapt.ops.dispatch.proof import run_op
from llm_adapt.ops.fused_linear_cross_entropy import fused_linear_cross_entropy

op = fused_linear_cross_entropy.op
reference = op.reference


def draw(*sizes: int, seed: int = 0) -> torch.Tensor:
    """Normal numbers in float64."""
    return torch.randn(sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def tensors(rows: int, width: int, classes: int, ignored: int = -100) -> dict[str, torch.Tensor]:
    """Arguments of a call; every fourth row is ignored."""
    target = torch.randint(classes, (rows,), generator=torch.Generator().manual_seed(1))
    target[::4] = ignored
    return {"hidden": draw(rows, width), "weight": draw(classes, width, seed=2), "target": target}


def unfused(
    hidden: torch.Tensor, weight: torch.Tensor, target: torch.Tensor, bias: torch.Tensor | None = None, **rest: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer, then the plain loss."""
    return cross_entropy.op.reference(F.linear(hidden, weight, bias), target, **rest)


@given(
    sizes=st.tuples(st.integers(0, 7), st.integers(1, 5), st.integers(1, 9)),
    chunk=st.sampled_from([None, 1, 2, 3, 100]),
    ignored=st.sampled_from([-100, 0]),
    smoothing=st.sampled_from([0.0, 0.2]),
    z_loss=st.sampled_from([0.0, 0.01]),
    scale=st.sampled_from([1.0, 0.5]),
    softcap=st.sampled_from([None, 1.5]),
    reduction=st.sampled_from(["none", "mean", "sum"]),
    extras=st.sets(st.sampled_from(["bias", "class_weight"])),
)
def test_it_is_the_layer_and_the_loss(
    sizes: tuple[int, int, int], chunk: int | None, ignored: int, extras: set[str], **options: Any
) -> None:
    """With every option and any chunk it has the losses and gradients of the unfused computation."""
    options = {
        "ignore_index": ignored,
        "label_smoothing": options["smoothing"],
        "z_loss": options["z_loss"],
        "logit_scale": options["scale"],
        "logit_softcap": options["softcap"],
        "reduction": options["reduction"],
    }
    given_tensors = tensors(*sizes, ignored) | {name: draw(sizes[2], seed=3).abs() + 0.1 for name in extras}
    expected = run_op(op, lambda **call: unfused(**call, **options), given_tensors)
    found = run_op(op, lambda **call: reference(**call, **options, chunk_rows=chunk), given_tensors)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], equal_nan=True)


def test_rows_with_two_axes() -> None:
    """hidden may be [B, S, H] with target [B, S]; the losses have the shape of target."""
    hidden, weight, target = draw(2, 3, 4), draw(7, 4, seed=2), torch.arange(6).view(2, 3)
    found, z = reference(hidden, weight, target, reduction="none", chunk_rows=2)
    assert found.shape == z.shape == (2, 3)
    torch.testing.assert_close(found, unfused(hidden, weight, target, reduction="none")[0])


@pytest.mark.parametrize("wanted", [("hidden",), ("weight",), ("bias",)])
def test_only_the_gradients_that_are_wanted(wanted: tuple[str, ...]) -> None:
    """With a frozen layer, or a frozen body, the one gradient that is wanted is right and the others stay None."""
    arguments = tensors(6, 4, 7) | {"bias": draw(7, seed=3)}
    for name in wanted:
        arguments[name].requires_grad_()
    (expected,) = torch.autograd.grad(unfused(**arguments)[0], [arguments[name] for name in wanted])
    reference(**arguments, chunk_rows=4)[0].backward()
    for name in ("hidden", "weight", "bias"):
        grad = arguments[name].grad
        assert (grad is not None) == (name in wanted)
        if grad is not None:
            torch.testing.assert_close(grad, expected)


class _Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return result


def test_the_logits_are_never_whole() -> None:
    """Neither pass makes a tensor larger than one chunk of logits or the weight."""
    rows, width, classes, chunk = 64, 4, 32, 8
    arguments = tensors(rows, width, classes)
    for name in ("hidden", "weight"):
        arguments[name].requires_grad_()
    largest = _Largest()
    with largest:
        reference(**arguments, chunk_rows=chunk, label_smoothing=0.1)[0].backward()
    assert largest.elements == max(chunk * classes, rows * width, classes * width)


def test_what_is_kept_for_the_backward_pass_is_linear_in_the_rows() -> None:
    """Between the passes the inputs and one number a row are kept; no chunk of logits."""
    kept: list[int] = []
    arguments = tensors(64, 4, 32)
    arguments["hidden"].requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.numel()), t)[1], lambda t: t):
        reference(**arguments, chunk_rows=8)
    assert max(kept) == 64 * 4
    assert all(count in (64 * 4, 32 * 4, 64, 1) for count in kept)


def test_16_bit_gradients_of_the_weight_do_not_fade() -> None:
    """Many chunks add up in float32: in bfloat16 the sum of ones would stop at 256."""
    rows = 1024
    hidden = torch.ones(rows, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    loss, _ = reference(hidden, weight, torch.zeros(rows, dtype=torch.long), reduction="sum", chunk_rows=1)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [-512.0, 512.0]


def test_inside_grad_and_vmap() -> None:
    """torch.func.grad and vmap go through it: a gradient for each of several bodies."""
    arguments = tensors(6, 4, 7)
    rest = {"weight": arguments["weight"], "target": arguments["target"]}
    several = torch.stack((arguments["hidden"], 2 * arguments["hidden"]))

    def of(function: Any) -> torch.Tensor:
        return torch.vmap(torch.func.grad(lambda hidden: function(hidden, **rest)[0]))(several)

    torch.testing.assert_close(of(lambda *a, **k: reference(*a, **k, chunk_rows=4)), of(unfused))


def test_compiled_for_any_number_of_rows() -> None:
    """Code compiled with dynamic shapes is one graph and right for other numbers of rows."""
    compiled = torch.compile(
        lambda **call: reference(**call, chunk_rows=4), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (6, 9, 13):
        arguments = tensors(rows, 4, 7)
        torch.testing.assert_close(compiled(**arguments)[0], unfused(**arguments)[0])


def test_autocast_computes_the_layer_in_16_bits() -> None:
    """Inside torch.autocast the layer's tensors are cast as F.linear would cast them; the loss stays in float32."""
    arguments = {
        name: value.float() if value.is_floating_point() else value for name, value in tensors(8, 4, 9).items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = fused_linear_cross_entropy(**arguments)
        logits = F.linear(arguments["hidden"], arguments["weight"])
    assert logits.dtype == torch.bfloat16
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, F.cross_entropy(logits.float(), arguments["target"]))


def test_every_flag_changes_the_result() -> None:
    """No option and no optional tensor is ignored; chunk_rows alone changes nothing."""
    arguments = tensors(8, 4, 9, ignored=4)
    plain, _ = reference(**arguments)
    flags = [{"label_smoothing": 0.1}, {"z_loss": 0.01}, {"logit_scale": 0.5}, {"logit_softcap": 2.0}]
    flags += [{"ignore_index": 4}, {"reduction": "sum"}, {"bias": draw(9, seed=3)}]
    flags += [{"class_weight": draw(9, seed=3).abs() + 0.1}]
    for flag in flags:
        assert not torch.allclose(reference(**arguments, **flag)[0], plain), flag
    torch.testing.assert_close(reference(**arguments, chunk_rows=3)[0], plain)


@pytest.mark.parametrize(
    ("arguments", "kind", "text"),
    [
        ({"weight": draw(5, 3)}, ValueError, r"\(V, 4\) was expected"),
        ({"weight": draw(5)}, ValueError, "was expected"),
        ({"weight": draw(5, 4).float()}, TypeError, "one dtype"),
        ({"bias": draw(5).float()}, TypeError, "one dtype"),
        ({"bias": draw(4)}, ValueError, r"bias has shape \(4,\)"),
        ({"chunk_rows": 0}, ValueError, "at least 1"),
        ({"target": torch.zeros(2, dtype=torch.long)}, ValueError, "one a row"),
        ({"target": draw(3)}, TypeError, "give indices"),
        ({"class_weight": draw(4)}, ValueError, r"\(5,\) was expected"),
        ({"label_smoothing": -0.1}, ValueError, "must lie in"),
        ({"logit_softcap": 0.0}, ValueError, "must be positive"),
        ({"reduction": ""}, ValueError, "reduction='' was asked"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments: dict[str, Any], kind: type[Exception], text: str) -> None:
    """Shapes, dtypes and numbers that give no loss are errors that say what was found."""
    plain = {"hidden": draw(3, 4), "weight": draw(5, 4), "target": torch.zeros(3, dtype=torch.long)}
    with pytest.raises(kind, match=text):
        reference(**(plain | arguments))
