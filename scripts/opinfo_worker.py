"""One process of the OpInfo sweep: compares the operators that it is told on its standard input, a line each.

Started by sweep_opinfo.py, which starts another when an operator ends this one. A request is the place of an operator
in torch's op_db; the answer is one line of JSON on the file descriptor it was given.
"""

from __future__ import annotations

import faulthandler
import importlib
import itertools
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

COLUMNS = ("forward", "gradient", "in place", "out=", "bfloat16")
# Results that nobody has written yet: their values mean nothing.
UNWRITTEN = ("empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided", "resize_")
_SEED = 20


@dataclass
class Finding:
    """What one column of one operator came to."""

    outcome: str = "no sample"
    samples: int = 0
    text: str = ""

    def worse(self, outcome: str, text: str) -> None:
        """Keep the first bad outcome."""
        if self.outcome in ("no sample", "pass"):
            self.outcome, self.text = outcome, text


@dataclass
class Copier:
    """Copies tensors to a device with their strides; those that share memory share it there too."""

    device: str
    storages: dict[int, Any] = field(default_factory=dict)

    def tree(self, value: Any) -> Any:
        """Copy every tensor inside `value`, and name the device where the CPU was named."""
        import torch
        from torch.utils._pytree import tree_map

        def one(leaf: Any) -> Any:
            if isinstance(leaf, torch.Tensor):
                return self.tensor(leaf)
            if isinstance(leaf, torch.device) or leaf == "cpu":
                return type(leaf)(self.device)
            return leaf

        return tree_map(one, value)

    def tensor(self, tensor: Any) -> Any:
        """A leaf that needs a gradient where `tensor` does."""
        import torch

        source = tensor.detach()
        if source.layout != torch.strided or source.is_conj() or source.is_neg():
            copy = source.clone() if self.device == "cpu" else source.to(self.device)
        else:
            copy = self._storage(source).as_strided(source.size(), source.stride(), source.storage_offset())
        return copy.detach().requires_grad_(tensor.requires_grad)

    def _storage(self, source: Any) -> Any:
        import torch

        key = hash((source.untyped_storage()._cdata, source.dtype))
        if key not in self.storages:
            count = source.untyped_storage().nbytes() // source.itemsize
            there = torch.empty(count, dtype=source.dtype, device=self.device)
            there.copy_(source.as_strided((count,), (1,), 0))
            self.storages[key] = there
        return self.storages[key]


def tensors_of(value: Any) -> list[Any]:
    """Every tensor of a nested result."""
    import torch
    from torch.utils._pytree import tree_leaves

    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def difference(found: Any, expected: Any, device: str, values: str) -> str:
    """Where two results differ, "" where they do not. `values`: "exact", "random" or "unwritten"."""
    import torch
    from torch.utils._pytree import tree_flatten

    ours, structure = tree_flatten(found)
    theirs, expected_structure = tree_flatten(expected)
    if len(ours) != len(theirs):
        return f"structure {structure}, the CPU gives {expected_structure}"
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(one, torch.Tensor) != isinstance(other, torch.Tensor):
            text = f"{type(one).__name__}, the CPU gives {type(other).__name__}"
        elif not isinstance(other, torch.Tensor):
            same = str(one) == str(other) or values != "exact" or isinstance(other, torch.device)
            text = "" if same else f"value {one!r}, the CPU gives {other!r}"
        else:
            text = _tensor_difference(one, other, device, values)
        if text:
            return text
    return ""


def _tensor_difference(found: Any, expected: Any, device: str, values: str) -> str:
    import torch

    if found.device.type != device:
        return f"result on {found.device.type}"
    for what in ("dtype", "shape", "layout", "is_conj", "is_neg"):
        one, other = (getattr(tensor, what) for tensor in (found, expected))
        one, other = (one(), other()) if callable(one) else (one, other)
        if one != other:
            return f"{what} {one}, the CPU gives {other}"
    if expected.layout == torch.strided and expected.numel() > 0:
        strides = [
            [stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1]
            for tensor in (found, expected)
        ]
        if strides[0] != strides[1]:
            return f"strides {found.stride()}, the CPU gives {expected.stride()}"
    here = found.detach().cpu()
    if values == "unwritten":
        return ""
    if values == "random":
        return _statistics_differ(here, expected.detach())
    try:
        torch.testing.assert_close(here, expected.detach(), equal_nan=True)
    except AssertionError as error:
        return "values: " + " ".join(str(error).split())[:160]
    return ""


def _statistics_differ(found: Any, expected: Any) -> str:
    """Mean and spread of random numbers, where there are enough of them to tell."""
    import torch

    if found.numel() < 64 or found.is_complex():
        return ""
    one, other = found.to(torch.float64), expected.to(torch.float64)
    spread = max(one.std().item(), other.std().item())
    distance = abs(one.mean().item() - other.mean().item())
    if distance > 8 * spread / found.numel() ** 0.5:
        return f"statistics: mean {one.mean().item():.3g}, the CPU gives {other.mean().item():.3g}"
    return ""


@contextmanager
def drawing() -> Iterator[list[str]]:
    """Names of the operators that took random numbers of the CPU inside."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    drawn: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            before = torch.random.get_rng_state()
            result = func(*args, **(kwargs or {}))
            if not torch.equal(before, torch.random.get_rng_state()):
                drawn.append(str(func))
            return result

    with Watch():
        yield drawn


class Comparison:
    """One operator on the device and on the CPU."""

    def __init__(self, info: Any, device: str, samples: int) -> None:
        self.info, self.device, self.limit = info, device, samples

    def run(self) -> dict[str, Finding]:
        """Every column that the operator has."""
        import torch

        info = self.info
        if not info.dtypes:
            return {"forward": Finding()}  # the CPU does not have it
        dtype = next((one for one in (torch.float32, torch.int64) if one in info.dtypes), None)
        dtype = dtype or min(info.dtypes, key=str)
        findings = {"forward": self._column(dtype, self._forward)}
        if info.supports_autograd and dtype.is_floating_point:
            findings["gradient"] = self._column(dtype, self._gradient, requires_grad=True)
        if info.inplace_variant is not None:
            findings["in place"] = self._column(dtype, self._in_place)
        if info.supports_out:
            findings["out="] = self._column(dtype, self._out)
        if dtype == torch.float32 and torch.bfloat16 in info.dtypes:
            findings["bfloat16"] = self._column(torch.bfloat16, self._forward)
        return findings

    def _column(self, dtype: Any, act: Callable[[Any, str], Any], requires_grad: bool = False) -> Finding:
        finding = Finding()
        for sample in self._samples(dtype, requires_grad):
            try:
                with drawing() as drawn:
                    self._on("cpu", act, sample)
                expected = self._on("cpu", act, sample)  # without the watch, under which some gradients are lost
            except Exception:  # noqa: BLE001 - what the CPU refuses for whatever reason cannot be compared
                continue
            finding.samples += 1
            try:
                found = self._on(self.device, act, sample)
            except Exception as error:  # noqa: BLE001 - any refusal is an outcome
                finding.worse("refused", f"{type(error).__name__}: {_first_line(error)}")
                continue
            text = difference(found, expected, self.device, self._values(bool(drawn)))
            if text:
                finding.worse("deviates", text)
            elif finding.outcome == "no sample":
                finding.outcome = "pass"
        return finding

    def _samples(self, dtype: Any, requires_grad: bool) -> Iterator[Any]:
        import torch

        torch.manual_seed(_SEED)
        try:
            made = self.info.sample_inputs("cpu", dtype, requires_grad=requires_grad)
            yield from itertools.islice(made, self.limit)
        except RuntimeError as error:
            print(f"no samples of {self.info.name}: {error}", file=sys.stderr)

    def _values(self, is_random: bool) -> str:
        if self.info.name.rpartition(".")[2] in UNWRITTEN:
            return "unwritten"
        return "random" if is_random else "exact"

    def _on(self, device: str, act: Callable[[Any, str], Any], sample: Any) -> Any:
        import torch

        copier = Copier(device)
        arguments = copier.tree((sample.input, sample.args, sample.kwargs))
        torch.manual_seed(_SEED)
        result = act((*arguments, sample), device)
        if device != "cpu":
            torch.get_device_module(device).synchronize()
        return result

    def _forward(self, arguments: Any, device: str) -> Any:
        first, args, kwargs, _ = arguments
        return self.info(first, *args, **kwargs)

    def _in_place(self, arguments: Any, device: str) -> Any:
        first, args, kwargs, _ = arguments
        result = self.info.inplace_variant(first, *args, **kwargs)
        return result, first, result is first or not tensors_of(first)

    def _seeded(self, first: Any, args: Any, kwargs: Any) -> Callable[..., Any]:
        import torch

        def call(**more: Any) -> Any:
            torch.manual_seed(_SEED)
            return self.info(first, *args, **kwargs, **more)

        return call

    def _out(self, arguments: Any, device: str) -> Any:
        """Into tensors that must grow, and into tensors of the right shape with strides of their own."""
        import torch
        from torch.utils._pytree import tree_map_only

        first, args, kwargs, _ = arguments
        call = self._seeded(first, args, kwargs)
        shaped = call()
        none = tree_map_only(torch.Tensor, lambda one: one.new_empty(0), shaped)
        strided = tree_map_only(torch.Tensor, lambda one: one.new_empty((*one.shape, 2))[..., 0], shaped)
        grown, written = call(out=none), call(out=strided)
        if device == "cpu":  # some kernels of the CPU are wrong for such an out=
            torch.testing.assert_close(tensors_of((grown, written)), tensors_of((shaped, shaped)), equal_nan=True)
        same = [one is other for one, other in zip(tensors_of(written), tensors_of(strided), strict=True)]
        return tensors_of(none), tensors_of(grown), tensors_of(strided), same

    def _gradient(self, arguments: Any, device: str) -> Any:
        import torch

        first, args, kwargs, sample = arguments
        leaves = [one for one in tensors_of((first, args, kwargs)) if one.requires_grad]
        result = self.info(first, *args, **kwargs)
        if sample.output_process_fn_grad is not None:
            result = sample.output_process_fn_grad(result)
        outputs = [one for one in tensors_of(result) if one.requires_grad]
        generator = torch.Generator().manual_seed(7)
        upstream = [torch.randn(one.shape, generator=generator).to(one.dtype).to(device) for one in outputs]
        return torch.autograd.grad(outputs, leaves, upstream, allow_unused=True)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:240] if lines else ""


def start(simulate: str) -> str:
    """Start the simulated device; torch's name for it."""
    from llm_adapt import simulators
    from llm_adapt.adapters import activate, adapters

    name = simulators.enter(simulate).simulator.name
    activate(adapters()[name])
    simulators.install()
    return adapters()[name].device_type


def is_sound(device: str) -> bool:
    """Whether the device still computes: a failure in its queue may stop all that comes after."""
    import torch

    try:
        numbers = torch.arange(6.0).to(device)
        target = torch.zeros(3, 4, device=device)
        target[:, ::2].copy_(numbers.reshape(2, 3).t())  # between strided tensors: a kernel, not a copy of bytes
        total = target.sum(1).tolist()
        torch.get_device_module(device).synchronize()
    except RuntimeError:
        return False
    return bool(total == [3.0, 5.0, 7.0])


def fallback_counts(name: str) -> dict[str, int]:
    """Calls of operators that the device leaves to the CPU; {} where its simulator does not count them."""
    module = sys.modules.get(f"llm_adapt_{name}_kernels")
    counts: dict[str, int] = module.fallback_counts() if hasattr(module, "fallback_counts") else {}
    return counts


def main(simulate: str, samples: int, answers: int) -> None:
    """Answer requests until there are no more."""
    faulthandler.enable()
    warnings.simplefilter("ignore")
    device = start(simulate)
    name = simulate.partition(":")[0]
    op_db = importlib.import_module("torch.testing._internal.common_methods_invocations").op_db
    warnings.simplefilter("ignore")
    with os.fdopen(answers, "w", encoding="utf-8") as stream:
        names = [info.name + (f".{info.variant_test_name}" if info.variant_test_name else "") for info in op_db]
        print(json.dumps({"names": names}), file=stream, flush=True)
        for line in sys.stdin:
            before = fallback_counts(name)
            findings = Comparison(op_db[int(line)], device, samples).run()
            after = fallback_counts(name)
            answer = {
                "findings": {column: vars(finding) for column, finding in findings.items()},
                "fallbacks": sorted(key for key, count in after.items() if count != before.get(key, 0)),
                "is_sound": is_sound(device),
            }
            print(json.dumps(answer), file=stream, flush=True)
            if not answer["is_sound"]:
                return


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
