"""Proof: a kernel and the float64 reference on the same inputs, outputs and gradients compared.

A proof leaves no trace in the call it precedes. It runs in a thread of its own, because saved-tensor hooks,
dispatch modes, functorch, autocast and inference mode belong to a thread; it draws from generators of its own; and
it works on copies. The reference runs on the CPU in float64, which every device can be compared with.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch.proving_ground import apart, check_device
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

__all__ = [
    "Verdict",
    "compare",
    "differentiable",
    "float_dtypes",
    "named_tensors",
    "prove",
    "run_op",
    "without_values",
]

T = TypeVar("T")
_MOST_ELEMENTS = 2**20  # of all tensors together; a larger call is proved on a part of it
_MOST_CASES = 4  # saved by one process


@dataclass(frozen=True)
class Verdict:
    """What a proof found.

    Attributes:
        holds: every result lies within the tolerance.
        reason: what failed, "" when it holds.
        errors: result -> largest error as a share of what is allowed; above 1 it fails.
        seconds: how long the proof took.
        case: file with the inputs of a failed proof, "" when none was saved.
        is_partial: the call was too large and a part of it was proved.
        is_final: False when nothing was run, because it could not be here and now.
    """

    holds: bool
    reason: str = ""
    errors: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    case: str = ""
    is_partial: bool = False
    is_final: bool = True


def prove(op: FusedOp, kernel: Kernel, arguments: dict[str, Any], cases: str = "") -> Verdict:
    """Run the kernel and the reference on copies of these arguments and compare.

    Args:
        arguments: of one call, by name, complete.
        cases: folder for the inputs of a failed proof; "" = they are not saved.

    Returns:
        the verdict; an exception of the kernel is a failed proof, one of the reference is raised.
    """
    return apart(lambda: _prove(op, kernel, arguments, cases), _device(arguments).type)


def _device(arguments: Mapping[str, Any]) -> torch.device:
    """Where the call computes: the first place that is not the CPU."""
    tensors = [tensor for value in arguments.values() for _, tensor in named_tensors("", value)]
    return next((tensor.device for tensor in tensors if tensor.device.type != "cpu"), torch.device("cpu"))


def _prove(op: FusedOp, kernel: Kernel, arguments: dict[str, Any], cases: str) -> Verdict:
    start = time.perf_counter()
    small = _part(op, arguments)
    is_partial = small is not arguments
    if op.random:
        small = small | {op.random: 0.0}
    expected = run_op(op, op.reference, small, kernel.has_backward, oracle=op.oracle)
    try:
        taken = {name: value for name, value in small.items() if name in kernel.honours}
        ours = run_op(op, kernel.function, taken, kernel.has_backward)
    except Exception as error:  # noqa: BLE001 - whatever it raises is why it does not serve
        found = Verdict(False, _raised(error))
        check_device(_device(small), kernel.name, found.reason)
    else:
        for name in kernel.no_gradient:  # calls that need it are refused
            for results in (expected, ours):
                results.pop(f"gradient of {name}", None)
        found = compare(op, ours, expected, float_dtypes(small))
        if found.holds:
            plain = run_op(op, op.reference, small, with_gradients=False)
            found = _same_dtypes(ours, plain) or _alone(op, kernel, taken, expected) or found
    case = "" if found.holds or not cases else _save(op, kernel, small, Path(cases))
    seconds = time.perf_counter() - start
    return Verdict(found.holds, found.reason, found.errors, seconds, case, is_partial)


def _part(op: FusedOp, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, or of a large call a part of them.

    A part may fit together where the whole does not. So the reference is shown the whole without its values; when it
    refuses that, the whole is proved, and the reference says why, or needs the values.
    """
    if op.shrink is None or _elements(arguments.values()) <= _MOST_ELEMENTS:
        return arguments
    try:
        op.reference(**{name: without_values(value) for name, value in arguments.items()})
    except Exception:  # noqa: BLE001 - raised again by the whole call
        return arguments
    return op.shrink(arguments)


def without_values(value: Any) -> Any:
    """A tensor, or a list of them, on meta: its shape, dtype and no values."""
    if isinstance(value, (list, tuple)):
        return type(value)(without_values(item) for item in value)
    return value.detach().to("meta") if isinstance(value, torch.Tensor) else value


def run_op(
    op: FusedOp,
    function: Callable[..., Any],
    arguments: Mapping[str, Any],
    with_gradients: bool = True,
    oracle: torch.dtype | None = None,
    only: str = "",
) -> dict[str, torch.Tensor]:
    """Call a kernel or the reference on copies and return its results and gradients, by name.

    Args:
        with_gradients: go backward as well.
        only: the one tensor that needs a gradient; default: all that may.
        oracle: run on the CPU with floating-point tensors in this dtype.

    Returns:
        "output", or "output[0]", "output[1]" ... ; "gradient of x" ...; "x" for what is changed in place.
    """
    copies = {name: _copied(value, oracle) for name, value in arguments.items()}
    wanted = [pair for pair in differentiable(op, copies) if only in ("", pair[0])] if with_gradients else []
    for _, tensor in wanted:
        tensor.requires_grad_()
    outputs = named_tensors("output", function(**copies))
    _check_inputs(op, copies, arguments)
    results = {name: value.detach() for name, value in outputs}
    for name in op.mutates:
        results.update((key, value.detach()) for key, value in named_tensors(name, copies.get(name)))
    # Numbered by their place among all outputs: which of them are reached depends on what needs a gradient.
    reached = [(value, _upstream(value, place)) for place, (_, value) in enumerate(outputs) if value.requires_grad]
    if wanted and reached:
        ends, upstream = zip(*reached, strict=True)
        gradients = torch.autograd.grad(ends, [tensor for _, tensor in wanted], upstream, allow_unused=True)
        results.update(
            (f"gradient of {name}", value)
            for (name, _), value in zip(wanted, gradients, strict=True)
            if value is not None
        )
    return results


def _check_inputs(op: FusedOp, copies: Mapping[str, Any], arguments: Mapping[str, Any]) -> None:
    """Raises KernelError when an input was changed that the op does not change."""
    for name in copies.keys() - set(op.mutates):
        before, after = named_tensors(name, arguments[name]), named_tensors(name, copies[name])
        for (place, old), (_, new) in zip(before, after, strict=True):
            if not torch.equal(_bytes(new), _bytes(old.detach().cpu().to(new.dtype))):  # an NPU has no float64
                raise KernelError(f"it changed {place}, which it may only read")


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    # A clone: one element with a stride of 2 counts as contiguous, and cannot be viewed as bytes.
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)


def compare(
    op: FusedOp,
    ours: Mapping[str, torch.Tensor],
    expected: Mapping[str, torch.Tensor],
    dtypes: Iterable[torch.dtype] = (),
    size: float = 0.0,
) -> Verdict:
    """Compare results by name. A result or gradient that only one side has is a failure.

    Args:
        dtypes: of the inputs: a wide result may carry a rounding to the narrowest of them.
        size: root mean square of the largest gradient, which tells how much of one may be left where all cancels.
    """
    errors: dict[str, float] = {}
    size = size or gradient_size(expected)
    for name in expected:
        if name not in ours:
            return Verdict(False, f"{name} is missing", errors)
        found, wanted = ours[name].detach().cpu(), expected[name].detach().cpu()
        if found.shape != wanted.shape:
            return Verdict(False, f"{name} has shape {tuple(found.shape)}, not {tuple(wanted.shape)}", errors)
        is_gradient = name.startswith("gradient")
        rtol = max(op.tolerance.rtol(dtype, is_gradient) for dtype in (found.dtype, *dtypes))
        errors[name] = _error(found, wanted, rtol, op.tolerance.steps, size if is_gradient else 0.0)
        if not errors[name] <= 1.0:
            return Verdict(False, f"{name} is wrong: {_worst(found, wanted)}", errors)
    for name in ours.keys() - expected.keys() - ({"output"} if op.mutates else set()):  # torch returns what it changes
        return Verdict(False, f"{name} is more than the reference gives", errors)
    return Verdict(True, "", errors)


def gradient_size(expected: Mapping[str, torch.Tensor]) -> float:
    """Root mean square of the largest gradient among results."""
    gradients = (value for name, value in expected.items() if name.startswith("gradient") and value.numel())
    return max((float(value.double().square().mean().sqrt()) for value in gradients), default=0.0)


def _raised(error: Exception) -> str:
    return f"it raised {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _alone(
    op: FusedOp, kernel: Kernel, taken: Mapping[str, Any], expected: Mapping[str, torch.Tensor]
) -> Verdict | None:
    """A verdict when a gradient is wrong or missing where its tensor alone needs one: the others are frozen (LoRA)."""
    names = [name for name, _ in differentiable(op, taken) if f"gradient of {name}" in expected]
    for name in names if len(names) > 1 else ():
        gradient = f"gradient of {name}"
        try:
            found = run_op(op, kernel.function, taken, only=name)
        except Exception as error:  # noqa: BLE001 - as in _prove
            reason = f"{_raised(error)}, when {name} alone needs a gradient"
            check_device(_device(taken), kernel.name, reason)
            return Verdict(False, reason)
        ours = {key: value for key, value in found.items() if key == gradient}
        verdict = compare(op, ours, {gradient: expected[gradient]}, float_dtypes(taken), gradient_size(expected))
        if not verdict.holds:
            return replace(verdict, reason=f"{verdict.reason}, when {name} alone needs a gradient")
    return None


def _same_dtypes(ours: Mapping[str, torch.Tensor], plain: Mapping[str, torch.Tensor]) -> Verdict | None:
    """A verdict when a result has another dtype than the reference's, run in the call's own dtypes."""
    for name, value in plain.items():
        if ours[name].dtype != value.dtype:
            return Verdict(False, f"{name} is {ours[name].dtype}, not {value.dtype}")
    return None


def _error(found: torch.Tensor, wanted: torch.Tensor, rtol: float, steps: int, size: float) -> float:
    """Largest error as a share of what is allowed; infinite where a value is not finite on one side only.

    Args:
        size: of the numbers that a result of nothing but zeros is the difference of.
    """
    if not found.numel():
        return 0.0
    if not found.is_floating_point():
        most = int((found.long() - wanted.to(found.dtype).long()).abs().max())
        return most / steps if steps else (float("inf") if most else 0.0)
    a, b = found.double(), wanted.double().to(found.dtype).double()
    finite = torch.isfinite(b)
    if not torch.equal(torch.isfinite(a), finite) or not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return float("inf")
    a, b = a[finite], wanted.double()[finite]
    if not a.numel():
        return 0.0
    # With one key that is seen the gradient of a query is 0, a sum that cancels; kernels leave a rounding of it.
    step = torch.finfo(found.dtype).smallest_normal * torch.finfo(found.dtype).eps  # between subnormal numbers
    allowed = rtol * (b.abs() + (b.square().mean().sqrt() if b.any() else size)) + step
    difference = (a - b).abs()
    return float((difference / allowed).max())


def _worst(found: torch.Tensor, wanted: torch.Tensor) -> str:
    """Where the largest difference is, in words."""
    a, b = found.double(), wanted.double()
    difference = (a - b).abs().nan_to_num(nan=float("inf"), posinf=float("inf"))
    place = int(difference.argmax())
    index = [int(i) for i in torch.unravel_index(torch.tensor(place), a.shape)]
    return f"{float(a.flatten()[place]):.6g} instead of {float(b.flatten()[place]):.6g} at {index}"


def float_dtypes(arguments: Mapping[str, Any]) -> set[torch.dtype]:
    """Floating-point dtypes of the tensors among the arguments."""
    tensors = (tensor for value in arguments.values() for _, tensor in named_tensors("", value))
    return {tensor.dtype for tensor in tensors if tensor.is_floating_point()}


def _elements(values: Iterable[Any]) -> int:
    return sum(tensor.numel() for value in values for _, tensor in named_tensors("", value))


def named_tensors(name: str, value: Any) -> list[tuple[str, torch.Tensor]]:
    """The tensors of a value: itself, or the members of a tuple or list by index."""
    if isinstance(value, torch.Tensor):
        return [(name, value)]
    if isinstance(value, (tuple, list)):
        return [(f"{name}[{index}]", item) for index, item in enumerate(value) if isinstance(item, torch.Tensor)]
    return []


def _copied(value: Any, oracle: torch.dtype | None) -> Any:
    """A copy with the same strides, or for the oracle one on the CPU in its dtype."""
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item, oracle) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    if oracle is None:
        # Of what was expanded, one of the elements that share memory; then it is expanded again.
        part = value[tuple(slice(None if stride else 1) for stride in value.stride())]
        copy = torch.empty_strided(part.shape, part.stride(), dtype=value.dtype, device=value.device).copy_(part)
        return copy if part.shape == value.shape else copy.expand(value.shape)
    # First to the CPU: an NPU and an MLU turn float64 into float32.
    return value.cpu().to(oracle if value.is_floating_point() else value.dtype, copy=True)


def differentiable(op: FusedOp, arguments: Mapping[str, Any]) -> list[tuple[str, torch.Tensor]]:
    """The tensors among the arguments that a proof asks gradients of."""
    if op.mutates:
        return []
    names = arguments if op.differentiable is None else op.differentiable
    pairs = [pair for name in names for pair in named_tensors(name, arguments.get(name))]
    return [(name, tensor) for name, tensor in pairs if tensor.is_floating_point()]


def _upstream(value: torch.Tensor, index: int) -> torch.Tensor:
    """The gradient that enters an output: the same numbers for the kernel and the reference."""
    generator = torch.Generator().manual_seed(index)
    drawn = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    # Rounded as a 16-bit gradient would be, so that both sides are given the very same numbers.
    return drawn.to(torch.bfloat16).to(value.device, value.dtype)


_saved = 0


def _save(op: FusedOp, kernel: Kernel, arguments: Mapping[str, Any], folder: Path) -> str:
    """Write the inputs of a failed proof, at most a few per process."""
    global _saved
    if _saved >= _MOST_CASES:
        return ""
    _saved += 1
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{kernel.name}.{os.getpid()}.{_saved}.pt"
    torch.save({"op": op.name, "kernel": kernel.name, "arguments": {k: _plain(v) for k, v in arguments.items()}}, path)
    return str(path)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
