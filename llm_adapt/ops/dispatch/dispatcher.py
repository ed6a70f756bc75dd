"""Dispatcher: chooses a kernel for a new kind of call, has it proved, and binds it; keeps what the receipt tells."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch

from llm_adapt.errors import KernelError
from llm_adapt.ops.dispatch import registry
from llm_adapt.ops.dispatch.call import Call, TensorFacts, describe, same
from llm_adapt.ops.dispatch.calling import as_autocast, autocast_dtype, outside_autocast, positional
from llm_adapt.ops.dispatch.choice import Choice, not_on_the_host, proof_kind, refusal
from llm_adapt.ops.dispatch.entry import Compiled, make_entry, tensor_check
from llm_adapt.ops.dispatch.in_force import Moment, listeners, lock, moment, policy_in_force
from llm_adapt.ops.dispatch.proof import Verdict, prove
from llm_adapt.ops.dispatch.proving_ground import apart
from llm_adapt.ops.dispatch.registry import REFERENCE, FusedOp, Kernel

__all__ = ["Binding", "Dispatcher", "dispatcher_of", "dispatchers", "fused_op"]

log = logging.getLogger("llm_adapt")
P = ParamSpec("P")
R = TypeVar("R")
_MOST_CHECKS = 4  # of one set of options: a model calls an op with few shapes in turn, and each check takes time
_MOST_KEYS = 8192  # of one op; then all are forgotten and found anew, which costs microseconds each


class Binding:
    """A kernel bound to a kind of call, and how often it was called (by several threads at once: about).

    Attributes:
        call: takes all of the op's arguments by position.
        example: facts of the first such call.
        calls: how often it was called; of compiled code, how often it was traced.
    """

    __slots__ = ("call", "calls", "choice", "example")

    def __init__(self, call: Callable[..., Any], choice: Choice, example: Call) -> None:
        self.call, self.choice, self.example, self.calls = call, choice, example, 0


class Dispatcher:
    """Everything about one op that changes: its bindings, its proofs, its quarantined kernels."""

    def __init__(self, op: FusedOp, layer: str = "", whole: Dispatcher | None = None) -> None:
        self.op, self.layer, self.whole = op, layer, whole or self  # whole: of the op, in all layers
        self.table: dict[Any, Binding] = {}
        self.recent: dict[Any, tuple[tuple[Callable[..., bool], Binding], ...]] = {}  # options -> checks of tensors
        self.compiled = Compiled()
        self.bindings: dict[Any, Binding] = {}  # kind of call -> what the receipt tells; keys differ by shapes too
        self.verdicts: dict[Any, Verdict] = {}
        self.quarantine: dict[str, str] = {}
        self.layers: dict[str, Callable[..., Any]] = {}
        self.entry = make_entry(op, self)

    def forget(self) -> None:
        """Drop what was decided for keys: the policy has changed. Verdicts and the receipt stay."""
        with lock:
            for dispatcher in (self, *map(dispatcher_of, self.layers.values())):
                dispatcher.table.clear()
                dispatcher.recent.clear()
                dispatcher.entry.__globals__["_version"] += 1  # compiled code is guarded by it, and compiled anew

    def start_over(self) -> None:
        """Forget everything that was learned of this op's kernels. Modules keep their layer's entry, so it stays."""
        self.forget()
        for memory in (self.bindings, self.verdicts, self.quarantine):
            memory.clear()

    def at(self, layer: str) -> Callable[..., Any]:
        """The op as the module of that name calls it; the op itself unless the policy tells layers apart."""
        if not policy_in_force().has_layers(self.op.name):
            return self.entry
        with lock:
            if layer not in self.layers:
                named = Dispatcher(self.op, layer, self)
                named.verdicts, named.quarantine, named.bindings = self.verdicts, self.quarantine, self.bindings
                named.entry._dispatcher = named  # type: ignore[attr-defined]
                self.layers[layer] = named.entry
            return self.layers[layer]

    # -- called by the entry ----------------------------------------------------------------------------------

    def bind(self, options: Any, key: Any, arguments: tuple[Any, ...]) -> Binding:
        """Choose for a new key, and remember. Holds no lock: a proof may come by here for another op."""
        since = moment()
        if self.op.lists and (error := self.reject(None, arguments)):  # a tensor passes for a list of its rows
            raise error
        named = as_autocast(self.op, dict(zip(self.op.signature.parameters, arguments, strict=True)))
        call = self.describe(named)
        choice = self.choose(call, lambda kernel: self.proved(kernel, call, named))
        if any(self.op.kinds.get(name) == "option" for name in call.tensors):
            choice.is_final = False  # a key would keep that tensor
        is_cast = bool(self.op.autocast) and torch._C._is_any_autocast_enabled()  # to a dtype that guards do not see
        return self._remember(key, call, choice, since, options, None if is_cast else tensor_check(self.op, arguments))

    def traced(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> str:
        """The library that compiled code calls, chosen while it is traced: of a compilable kernel, or the reference.

        Kernels are proved there on the op's own inputs of that dtype, with the options of the call.
        """
        since, call = moment(), self._traced_call(tensors, options)
        is_autocast = torch._C._is_any_autocast_enabled()
        casts = (is_autocast, call.device, autocast_dtype(call.device) if is_autocast else None)
        key = ("compiled", *casts, call.is_inference, call.is_transformed, call.is_deterministic, tensors, options)
        found = self.table.get(key)
        if found is None:
            choice = self.choose(call, lambda kernel: self.proved_on_samples(kernel, call))
            found = self._remember(key, call, choice, since)
        found.calls += 1
        name = "_".join([found.choice.library, *(str(part).replace(".", "_") for part in casts if is_autocast)])
        vars(self.compiled).setdefault(name, found.call)
        return name

    def _traced_call(self, tensors: tuple[Any, ...], options: tuple[Any, ...]) -> Call:
        named: dict[str, TensorFacts] = {}
        for name, given_dtype, device, needs_grad in tensors:
            is_cast = name in self.op.autocast and torch._C._is_any_autocast_enabled()
            dtype = (autocast_dtype(device) if is_cast else None) or given_dtype
            key = name if self.op.kinds[name] == "tensor" else f"{name}[{sum(k.startswith(name + '[') for k in named)}]"
            named[key] = TensorFacts(None, dtype, device, needs_grad, True, True, "Tensor")
        values = self.op.defaults | dict(options)
        given = {n for n, value in options if not same(value, self.op.defaults.get(n))} | {n for n, *_ in tensors}
        return Call(
            self.op.name,
            named,
            {name: value for name, value in values.items() if name not in {n for n, *_ in tensors}},
            frozenset(given),
            is_inference=torch.is_inference_mode_enabled(),
            is_transformed=torch._C._are_functorch_transforms_active(),
            is_compiling=True,
            is_deterministic=torch.are_deterministic_algorithms_enabled(),
            layer=self.layer,
            passing=self.op.dynamic | self.op.hints,
        )

    def reject(self, error: Exception | None, arguments: tuple[Any, ...]) -> Exception | None:
        """Say which argument is not what the op takes; the error as it is when all are."""
        for (name, kind), value in zip(self.op.kinds.items(), arguments, strict=True):
            is_absent = value is None and self.op.signature.parameters[name].default is None
            if kind == "tensor" and not is_absent and not isinstance(value, torch.Tensor):
                return TypeError(f"{self.op.name}: {name} must be a tensor; found {type(value).__name__}.")
            if kind == "tensors" and not is_absent and not _is_list_of_tensors(value):
                return TypeError(f"{self.op.name}: {name} must be a list of tensors; found {_spell(value)}.")
            if kind == "option" and type(value).__hash__ is None:
                return TypeError(f"{self.op.name}: {name}={value!r} was given; pass a value that can be hashed.")
        return error

    # -- choosing ---------------------------------------------------------------------------------------------

    def describe(self, arguments: dict[str, Any], **state: Any) -> Call:
        """The facts of a call, with the states of the process that matter."""
        state = {
            "is_inference": torch.is_inference_mode_enabled(),
            "is_transformed": torch._C._are_functorch_transforms_active(),
            "is_deterministic": torch.are_deterministic_algorithms_enabled(),
            "passing": self.op.dynamic | self.op.hints,
        } | state
        return describe(self.op.name, self.op.signature, arguments, self.op.lists, layer=self.layer, **state)

    def choose(self, call: Call, proved: Callable[[Kernel], Verdict | None]) -> Choice:
        """Ask the libraries in order; the first whose kernel does not refuse and is proved serves.

        Raises:
            KernelError: the policy chose a library for this op and it cannot serve the call.
        """
        chosen = policy_in_force().chosen(self.op.name, self.layer)
        if chosen == REFERENCE:
            return Choice(REFERENCE, "chosen by the policy")
        if chosen:
            return self._explicit(chosen, call, proved)
        refusals: dict[str, str] = {}
        is_final = True
        for library in policy_in_force().order:
            reason, verdict = self._ask(library, call, proved)
            if not reason:
                return Choice(library, "first in order that serves", refusals, verdict, is_final)
            refusals[library] = reason
            is_final = is_final and (verdict is None or verdict.is_final)
        why = "no kernel serves" if refusals else "no kernel library is in the order"
        return Choice(REFERENCE, why, refusals, is_final=is_final)

    def _explicit(self, library: str, call: Call, proved: Callable[[Kernel], Verdict | None]) -> Choice:
        reason, verdict = self._ask(library, call, proved)
        if reason:
            raise KernelError(
                f"{self.op.name}={library} was chosen explicitly, and it cannot serve {call}: {reason}. "
                "An explicit choice never falls back: change the choice, or the call."
            )
        return Choice(library, "chosen by the policy", {}, verdict)

    def _ask(self, library: str, call: Call, proved: Callable[[Kernel], Verdict | None]) -> tuple[str, Verdict | None]:
        """Why a library does not serve ("" when it does), and the verdict of the proof."""
        if policy_in_force().denies(self.op.name, library):
            return "denied by the policy", None
        absent = registry.load_library(library)
        kernel = self.op.kernels.get(library)
        if kernel is None:
            return absent or "has no kernel of this op", None
        if library in self.quarantine:
            return f"quarantined: {self.quarantine[library]}", None
        reason = not_on_the_host(library, call, policy_in_force().device) or refusal(self.op, kernel, call)
        if reason:
            return reason, None
        verdict = proved(kernel)
        if verdict is not None and not verdict.holds:
            return f"failed its proof: {verdict.reason}", verdict
        return "", verdict

    def ask_all(self, arguments: dict[str, Any]) -> tuple[Call, dict[str, tuple[str, Verdict | None]]]:
        """Ask every library in the order about a call, those after the first that serves too; nothing is bound.

        Returns:
            the call, and library -> (why it does not serve, "" when it does; the verdict of its proof).
        """
        call = self.describe(arguments)
        chosen = policy_in_force().chosen(self.op.name, self.layer)
        libraries = (*filter(lambda name: name not in ("", REFERENCE), (chosen,)), *policy_in_force().order)
        return call, {
            library: self._ask(library, call, lambda kernel: self.proved(kernel, call, arguments))
            for library in dict.fromkeys(libraries)
        }

    # -- proving ----------------------------------------------------------------------------------------------

    def proved(self, kernel: Kernel, call: Call, arguments: dict[str, Any]) -> Verdict | None:
        """The verdict for this kind of call, from memory or from a proof now; None when proofs are off."""
        if not policy_in_force().proof.at_first_use:
            return None
        if torch._C._get_tracing_state() is not None:  # it records twice, and wants the same operators both times
            return Verdict(False, "it was not bound before torch.jit.trace began", is_final=False)
        if call.is_transformed:  # the tensors are functorch's, and mean nothing outside
            return self.proved_on_samples(kernel, call)
        kind = (kernel.library, proof_kind(call, self.op))
        if kind not in self.verdicts:
            if unfit := _why_not_now(self.op, call):
                return Verdict(False, unfit, is_final=False)
            self.verdicts[kind] = verdict = prove(self.op, kernel, arguments, policy_in_force().cases)
            if not verdict.holds:
                self.condemn(kernel, call, verdict)
        return self.verdicts[kind]

    def proved_on_samples(self, kernel: Kernel, call: Call) -> Verdict | None:
        """The same for a call whose tensors are not there: on the op's own inputs, with the call's options."""
        if not policy_in_force().proof.at_first_use:
            return None
        kind = (kernel.library, call.dtype, call.device, tuple(call.options.items()))
        if kind not in self.verdicts:
            if unfit := _why_not_now(self.op, call):
                return Verdict(False, unfit, is_final=False)
            verdict = Verdict(False, "no input of the op's own has this form, so it could not be proved")
            for sample in apart(lambda: list(self.op.samples(call)), call.device):
                verdict = prove(self.op, kernel, sample, policy_in_force().cases)
                if not verdict.holds:
                    self.condemn(kernel, call, verdict)
                    break
            self.verdicts[kind] = verdict
        return self.verdicts[kind]

    def condemn(self, kernel: Kernel, call: Call, verdict: Verdict) -> None:
        """Quarantine a kernel that failed its proof: one clear warning, or an error in strict mode."""
        with lock:  # first of all: what follows may raise, a warning too
            self.quarantine[kernel.library] = verdict.reason
            self.whole.forget()
        message = (
            f"Kernel {kernel.name} was quarantined: for {call} {verdict.reason}. "
            f"{'Case: ' + verdict.case + '. ' if verdict.case else ''}It serves no more in this process."
        )
        if policy_in_force().strict or policy_in_force().proof.raises:
            raise KernelError(message)
        warnings.warn(message, RuntimeWarning, stacklevel=2)

    # -- calling ----------------------------------------------------------------------------------------------

    def callable_of(self, library: str, call: Call, every: int = 0) -> Callable[..., Any]:
        """What a binding calls with all of the op's arguments by position."""
        function = positional(self.op, self.op.kernels.get(library))
        # functorch's tensors mean nothing outside, where a proof runs
        if every and library != REFERENCE and not call.is_compiling and not call.is_transformed:
            function = self._sampled(function, self.op.kernels[library], call, every)
        if torch._C._is_any_autocast_enabled():
            function = outside_autocast(self.op, function, call.device)
        return function

    def _sampled(self, function: Callable[..., Any], kernel: Kernel, call: Call, every: int) -> Callable[..., Any]:
        """Prove again at each so-many-th call. After a failure the call is chosen for anew, as all that follow."""
        names = list(self.op.signature.parameters)
        count = 0

        def sampled(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count % every == 0 and not _why_not_now(self.op, call):
                named = dict(zip(names, arguments, strict=True))
                verdict = prove(self.op, kernel, named, policy_in_force().cases)
                if not verdict.holds:
                    self.condemn(kernel, call, verdict)
                    choice = self.choose(call, lambda other: self.proved(other, call, named))
                    return positional(self.op, self.op.kernels.get(choice.library))(*arguments)
            return function(*arguments)

        return sampled

    def _remember(
        self,
        key: Any,
        call: Call,
        choice: Choice,
        since: Moment,
        options: Any = None,
        check: Callable[..., bool] | None = None,
    ) -> Binding:
        """The binding for this kind of call; looked up from now on, unless the policy has changed meanwhile."""
        refusals = tuple(choice.refusals.items())
        casts = (torch._C._is_any_autocast_enabled(), autocast_dtype(call.device))
        state = (call.is_compiling, call.is_transformed, *casts, since.policy)
        kind = (choice.library, choice.reason, refusals, call.variant, call.dtype, call.device, call.layer, state)
        with lock:
            found = self.bindings.get(kind)
            if found is None:
                function = self.callable_of(choice.library, call, since.policy.proof.every)
                found = self.bindings[kind] = Binding(function, choice, call)
                log.info("%s: %s (%s)", call, choice.library, choice.reason)
            # Another thread may have changed the policy, or found the kernel wrong, while this one was choosing.
            if choice.is_final and moment() == since and choice.library not in self.quarantine:
                if len(self.table) >= _MOST_KEYS:
                    self.table.clear()
                    self.recent.clear()
                self.table[key] = found
                known = self.recent.get(options, ())
                if check is not None and len(known) < _MOST_CHECKS:
                    self.recent[options] = (*known, (check, found))
        return found


def _is_list_of_tensors(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, torch.Tensor) for item in value)


def _spell(value: Any) -> str:
    kinds = sorted({type(item).__name__ for item in value}) if isinstance(value, (list, tuple)) else []
    return type(value).__name__ + (f" of {', '.join(kinds)}" if kinds else "")


def _why_not_now(op: FusedOp, call: Call) -> str:
    """Why nothing can be proved here and now; "" when it can.

    A proof would fall into a graph of the device that is being captured. In a backward pass on a device its gradients
    would wait for the thread of that device, which waits for the proof.
    """
    is_capturing = getattr(getattr(torch, call.device, None), "is_current_stream_capturing", None)
    if is_capturing and is_capturing():
        return "it was not proved before the capture of a graph began"
    has_gradients = op.differentiable != () and not op.mutates
    if has_gradients and call.device != "cpu" and torch._C._current_graph_task_id() != -1:
        return "it was not proved before the backward pass began"
    return ""


def dispatcher_of(entry: Callable[..., Any]) -> Dispatcher:
    """The dispatcher behind the function that callers call."""
    found: Dispatcher = entry._dispatcher  # type: ignore[attr-defined]
    return found


dispatchers: dict[str, Dispatcher] = {}  # op -> its dispatcher, for the ops imported so far


def fused_op(**fields: Any) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Declare the decorated reference as an op. Fields as of FusedOp; the result is what callers call."""

    def declare(reference: Callable[P, R]) -> Callable[P, R]:
        op = FusedOp(reference, **fields)
        registry.add_op(op)
        dispatcher = Dispatcher(op)
        dispatcher.entry._dispatcher = dispatcher  # type: ignore[attr-defined]
        dispatcher.entry.at = dispatcher.at  # type: ignore[attr-defined]
        dispatchers[op.name] = listeners[op.name] = dispatcher
        return dispatcher.entry

    return declare
