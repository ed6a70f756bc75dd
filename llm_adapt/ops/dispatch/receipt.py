"""Receipt: what served every op so far, as plain data: for the report, `llm-adapt ops` and `llm-adapt diff`."""

from __future__ import annotations

from typing import Any

from llm_adapt.ops.dispatch.dispatcher import Binding, Dispatcher, dispatchers
from llm_adapt.ops.dispatch.in_force import policy_in_force
from llm_adapt.ops.dispatch.registry import REFERENCE

__all__ = ["policy_text", "receipt"]


def receipt() -> list[dict[str, Any]]:
    """One row for each kind of call that was made, those called most often first within an op.

    Each row: op, library, variant, dtype, device, layer, calls, reason, example, refusals (library -> reason), proof
    (result -> error as a share of what is allowed) and, where kernels of the op are quarantined, quarantine.
    """
    return [row for name in sorted(dispatchers) for row in _rows(dispatchers[name])]


def _rows(dispatcher: Dispatcher) -> list[dict[str, Any]]:
    bindings = sorted(dispatcher.bindings.values(), key=lambda binding: -binding.calls)
    return [_row(dispatcher, binding) for binding in bindings]


def _row(dispatcher: Dispatcher, binding: Binding) -> dict[str, Any]:
    call, choice = binding.example, binding.choice
    row: dict[str, Any] = {
        "op": call.op,
        "library": choice.library,
        "variant": call.variant,
        "dtype": str(call.dtype).removeprefix("torch.") if call.dtype else "",
        "device": call.device,
        "layer": call.layer,
        "compiled": call.is_compiling,
        "calls": binding.calls,
        "reason": choice.reason,
        "example": str(call),
        "refusals": choice.refusals,
    }
    if choice.library != REFERENCE:
        verdict = choice.verdict
        row["proof"] = "off" if verdict is None else {name: round(error, 4) for name, error in verdict.errors.items()}
    if dispatcher.quarantine:
        row["quarantine"] = dict(dispatcher.quarantine)
    return row


def policy_text() -> str:
    """The policy in force in one line."""
    policy = policy_in_force()
    parts = ["order=" + ">".join(policy.order)] if policy.order else ["no library is in the order"]
    parts += [f"{op}={library}" for op, library in policy.choose.items()]
    parts += [f"{pattern}:{op}={library}" for pattern, op, library in policy.layers]
    parts += [f"-{name}" for name in sorted(policy.deny)]
    return ", ".join(parts)
