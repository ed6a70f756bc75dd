"""Choice: who serves a kind of call and why, and what every kernel is refused for, whatever it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from llm_adapt.ops.dispatch.call import Call, UnknownShapeError
from llm_adapt.ops.dispatch.proof import Verdict
from llm_adapt.ops.dispatch.registry import FusedOp, Kernel

__all__ = ["Choice", "not_on_the_host", "proof_kind", "refusal"]

_ON_THE_HOST = ("chunked", "inductor", "openmp", "torch_native")  # libraries that compute on the CPU as well


@dataclass
class Choice:
    """Who serves a kind of call, and why.

    Attributes:
        library: the kernel's library, or "reference".
        reason: one line.
        refusals: library -> why it does not serve, in the order in which they were asked.
        verdict: of the proof, None when there was none.
        is_final: False when a kernel was passed over for what will pass: the next such call is asked anew.
    """

    library: str
    reason: str
    refusals: dict[str, str] = field(default_factory=dict)
    verdict: Verdict | None = None
    is_final: bool = True


def not_on_the_host(library: str, call: Call, device: str) -> str:
    """Why a library may not serve tensors on the CPU in a process of another device; "" when it may.

    A model is often made, or evaluated, on the host. A device's kernel would raise there, and a failed proof would
    take it away from the device as well.
    """
    if device in ("", "cpu") or library in _ON_THE_HOST or call.device != "cpu":
        return ""
    return f"computes on {device}; the tensors are on the CPU"


def refusal(op: FusedOp, kernel: Kernel, call: Call) -> str:
    """Why a kernel may not serve a call, whatever it computes; "" when it may."""
    dropped = sorted(call.given - kernel.honours - op.hints)
    if dropped:
        return f"does not honour {', '.join(dropped)}"
    if any(not tensor.is_plain for tensor in call.tensors.values()):
        kinds = {tensor.type_name for tensor in call.tensors.values() if not tensor.is_plain}
        return f"takes plain tensors, not {', '.join(sorted(kinds))}"
    if any(tensor.dtype.is_complex for tensor in call.tensors.values()):
        return "takes real tensors: nothing compares complex ones"
    numbers = sorted(name for name in call.tensors if op.kinds.get(name) == "option")
    if numbers:
        return f"takes a number, not a tensor, as {', '.join(numbers)}"
    if any(tensor.device == "meta" for tensor in call.tensors.values()):
        return "computes, and tensors on meta have no values"
    if op.differentiable != () and not call.is_inference:
        if not kernel.has_backward:
            return "has no backward; serves in torch.inference_mode() only"
        if kernel.inference_only:
            return "serves in torch.inference_mode() only"
        lost = [name for name, tensor in call.tensors.items() if tensor.needs_grad and not _gives(op, kernel, name)]
        if lost:
            return f"gives no gradient of {', '.join(lost)}, which the reference does"
    if call.is_transformed and not kernel.functorch:
        return "does not serve inside vmap, grad and jvp"
    if call.is_deterministic and not kernel.deterministic:
        return "is not deterministic, which torch.use_deterministic_algorithms asks for"
    if call.is_compiling and not kernel.compilable:
        return "cannot be traced by torch.compile"
    try:
        return kernel.refuses(call) or ""
    except UnknownShapeError:
        return "decides by shapes, which are unknown while code is compiled"


def _gives(op: FusedOp, kernel: Kernel, name: str) -> bool:
    is_differentiable = op.differentiable is None or name.partition("[")[0] in op.differentiable
    return is_differentiable and name not in kernel.no_gradient


def proof_kind(call: Call, op: FusedOp) -> Any:
    """What a proof holds for.

    Axes up to 16 and last axes count as they are; longer ones by their power of two, whether they are multiples of 16,
    and which of them are equal: tensors whose sizes do not fit are then a kind of their own, and the reference, run
    by the proof, says so.
    """
    order: dict[int, int] = {}

    def coarse(size: int) -> Any:
        return size if size <= 16 else (order.setdefault(size, len(order)), size.bit_length(), size % 16 == 0)

    tensors = tuple(
        (name, t.dtype, t.device, tuple(map(coarse, t.shape)), t.shape[-1:], t.layout)
        for name, t in call.tensors.items()
    )
    options = tuple((name, value) for name, value in call.options.items() if name not in op.dynamic | op.hints)
    return tensors, options, call.is_inference
