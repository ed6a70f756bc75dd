"""Write docs/transformers_census.md: which norms and rotary functions of transformers are recognised, each proved.

    python scripts/transformers_census.py           imports every modeling file of the installed transformers (1 minute)
    python scripts/transformers_census.py --check   fails when the page is not what is found now

Every class and function that is recognised is then compared with its original evaluated in float64, on shapes and
numbers that the probe does not use: results, gradients, and in bfloat16 the roundings.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "transformers_census.md"
sys.path.insert(0, str(ROOT))

from llm_adapt.frameworks.transformers import norms, rotary  # noqa: E402
from llm_adapt.frameworks.transformers.norm_candidates import Candidate, flips, forward_of  # noqa: E402
from llm_adapt.frameworks.transformers.probe import NotRecognised, share_apart  # noqa: E402
from llm_adapt.ops.dispatch.dispatcher import dispatchers  # noqa: E402

_SIZE, _HEAD_SIZES = 40, (24, 32)
_EXACT, _APART = 1e-9, 0.02


class Finding(NamedTuple):
    """One class or function: its family, or why it is left; what is wrong with a family, "" when nothing is."""

    kind: str
    module: str
    name: str
    family: str = ""
    reason: str = ""
    problem: str = ""


class InFloat64(TorchDispatchMode):
    """What asks for float32 gets float64: the original, without its roundings."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") is torch.float32:
            kwargs["dtype"] = torch.float64
        return func(*args, **kwargs)


def modules() -> list[str]:
    """Names of all modules with models."""
    import transformers

    root = Path(transformers.__file__).parent / "models"
    paths = sorted(path.relative_to(root).with_suffix("") for path in root.rglob("modeling_*.py"))
    return [".".join(("transformers.models", *path.parts)) for path in paths]


def survey(module: ModuleType) -> Iterator[Finding]:
    """Everything in one module that looks like a norm or a rotary function, verified."""
    short = module.__name__.rpartition(".modeling_")[2]
    for cls, found in norms.examine(module).items():
        kind = "RMSNorm" if "rmsnorm" in cls.__name__.lower() else "other norm"
        if isinstance(found, str):
            yield Finding(kind, short, cls.__name__, reason=found)
        else:
            family = "; else ".join(_with_condition(formula) for formula in found)
            yield Finding(kind, short, cls.__name__, family, problem=verified(verify_norm, cls, found))
    for name, rotation in rotary.examine(module).items():
        if isinstance(rotation, str):
            yield Finding("rotary", short, name, reason=rotation)
        else:
            problem = verified(verify_rotary, vars(module)[name], rotation)
            yield Finding("rotary", short, name, rotation.family, problem=problem)


def _with_condition(formula: Any) -> str:
    flags = ", ".join(f"{name} is {value}" for name, value in formula.flags)
    return formula.family + (f" ({flags})" if flags else "")


def verified(verify: Any, *args: Any) -> str:
    """What is wrong, "" when nothing is."""
    try:
        verify(*args)
    except Exception as error:  # noqa: BLE001 - whatever happens is a line of the page, and an exit status
        return f"{type(error).__name__}: {error}"
    return ""


# -- norms --------------------------------------------------------------------------------------------------------


def verify_norm(cls: Any, formulas: Any) -> None:
    """Raise AssertionError where the replaced forward is not the original one."""
    new = norms.replacement(cls, formulas, told=lambda: None)
    for formula in formulas:
        for shape in ((3, 7, _SIZE), (2, 1, 3, _SIZE), (11, _SIZE)):
            instance = _instance(cls, formula, torch.float64)
            _compare(new, forward_of(cls), instance, torch.float64, shape)
        dtypes = (torch.bfloat16, torch.float32) if formula.is_mixed else (torch.bfloat16,)
        for dtype in dtypes:
            instance = _instance(cls, formula, dtype)
            _compare(new, forward_of(cls), instance, torch.bfloat16, (64, _SIZE))


def _instance(cls: Any, formula: Any, dtype: torch.dtype) -> Any:
    """An instance for which the formula holds, with weights of that dtype."""
    for arguments in ({}, *flips(cls)):
        try:
            candidate = Candidate(cls, arguments)
        except NotRecognised:  # its forward cannot do with such an instance
            continue
        kind = candidate.flags | candidate.numbers
        if all(kind.get(name, "") == value for name, value in formula.flags):
            instance = candidate.make(_SIZE)
            generator = torch.Generator().manual_seed(77)
            for name in candidate.tensors:
                vector = (torch.rand(_SIZE, generator=generator) * 3 - 1).to(dtype)
                instance._parameters[name] = torch.nn.Parameter(vector)
            if isinstance(formula.eps, str):
                setattr(instance, formula.eps, 0.01)
            return instance
    raise AssertionError(f"no instance has {formula.flags}")


def _compare(new: Any, original: Any, instance: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape, generator=torch.Generator().manual_seed(78)) * 1.7 + 0.4).to(dtype).requires_grad_()
    leaves = [x, *(p for p in instance._parameters.values() if p is not None)]
    before = _calls()
    y = new(instance, x)
    assert _calls() == before + 1, "the op was not called"
    if dtype == torch.float64:
        with InFloat64():
            z = original(instance, x)
        _same(y, z, leaves)
    else:
        _rounded_alike(y, original(instance, x))


def _calls() -> int:
    return sum(binding.calls for d in dispatchers.values() for binding in d.bindings.values())


def _same(y: torch.Tensor, z: torch.Tensor, leaves: list[torch.Tensor]) -> None:
    """Results and gradients, to float64."""
    assert (y.dtype, y.shape) == (z.dtype, z.shape), f"{y.dtype} {tuple(y.shape)}, not {z.dtype} {tuple(z.shape)}"
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(79), dtype=torch.float64)
    found, expected = [y, *torch.autograd.grad(y, leaves, dy)], [z]
    with InFloat64():
        expected += torch.autograd.grad(z, leaves, dy)
    for a, b in zip(found, expected, strict=True):
        error = float((a - b).detach().abs().max() / b.detach().abs().max().clamp(min=1e-30))
        assert error < _EXACT, f"differs by {error:.1e} in float64"


def _rounded_alike(y: torch.Tensor, z: torch.Tensor) -> None:
    apart = share_apart(y.detach(), z.detach())
    assert apart <= _APART, f"{apart:.0%} of the elements are rounded otherwise"


# -- rotary functions ---------------------------------------------------------------------------------------------


def verify_rotary(original: Any, rotation: Any) -> None:
    """Raise AssertionError where the replaced function is not the original one, in any kind of call."""
    new = rotary.replacement(original, rotation, told=lambda: None)
    for call, layout in rotation.layouts:
        for head in _HEAD_SIZES:
            for rotated in (head, head // 2) if rotation.is_partial else (head,):
                width = rotated // 2 if rotation.columns == "one for each pair" else rotated
                for batch in (1, 3) if call.table == 3 else (3,):
                    shapes = {"bhsd": (3, 4, 7, head), "bshd": (3, 7, 4, head), "thd": (7, 4, head)}
                    tables = (batch, 7, width) if call.table == 3 else (7, width)
                    _compare_rotations(new, original, rotation, shapes[layout], tables, call.unsqueeze_dim)


def _compare_rotations(
    new: Any, original: Any, rotation: Any, shape: tuple[int, ...], tables: tuple[int, ...], axis: int | None
) -> None:
    generator = torch.Generator().manual_seed(80)
    count = len(rotation.tensors)
    more = {} if axis is None else {"unsqueeze_dim": axis}

    def call(function: Any, x: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor) -> list[torch.Tensor]:
        result = function(**dict(zip(rotation.tensors, x, strict=True)), cos=cos, sin=sin, **more)
        return [result] if count == 1 else list(result)

    x = [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(count)]
    cos, sin = (torch.randn(tables, generator=generator, dtype=torch.float64) for _ in range(2))
    if rotation.same:
        before = _calls()
        found = call(new, x, cos, sin)
        assert _calls() == before + count, "the op was not called"
        with InFloat64():
            expected = call(original, x, cos, sin)
        for y, z, leaf in zip(found, expected, x, strict=True):
            _same(y, z, [leaf])
    for compute, dtype in ((rotation.same, torch.bfloat16), (rotation.mixed, torch.float32)):
        if compute:
            narrow, wide = [t.detach().bfloat16() for t in x], [t.to(dtype) for t in (cos, sin)]
            before = _calls()
            found = call(new, narrow, *wide)
            assert _calls() == before + count, "the op was not called"
            for y, z in zip(found, call(original, narrow, *wide), strict=True):
                _rounded_alike(y, z)


# -- the page -----------------------------------------------------------------------------------------------------


def everything() -> tuple[list[Finding], dict[str, str]]:
    """All findings, and why modules could not be imported."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    findings: list[Finding] = []
    absent: dict[str, str] = {}
    for name in modules():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            absent[name.rpartition(".modeling_")[2]] = str(error)
        else:
            findings += survey(module)
    return findings, absent


def page(findings: list[Finding], absent: dict[str, str]) -> str:
    """The page."""
    import transformers

    lines = [
        "# Norms and rotary functions of transformers",
        "",
        "Written by `python scripts/transformers_census.py`; not by hand. It imports every modeling file and tries",
        "each class and function that looks like a norm or a rotary function, as `patch()` does when a model is",
        "imported. What is recognised is served by `rms_norm`, `layer_norm` or `rope`; the rest keeps its own code.",
        "Each that is recognised was then compared with its original in float64 on other shapes and numbers: results,",
        "gradients, and its roundings in bfloat16.",
        "",
        f"transformers {transformers.__version__}, torch {torch.__version__}.",
        "",
        "| | looked at | recognised | recognised wrongly | left as they are |",
        "|---|---|---|---|---|",
    ]
    for kind in ("RMSNorm", "other norm", "rotary"):
        mine = [one for one in findings if one.kind == kind]
        served = [one for one in mine if one.family]
        wrong = sum(bool(one.problem) for one in served)
        lines.append(f"| {kind} | {len(mine)} | {len(served)} | {wrong} | {len(mine) - len(served)} |")
    problems = [one for one in findings if one.problem]
    if problems:
        lines += ["", "## Recognised wrongly", ""]
        lines += [f"- {one.module}: {one.name}: {one.family}: {one.problem}" for one in problems]
    lines += ["", "## Families", ""]
    families = {(one.kind == "rotary", one.family) for one in findings if one.family}
    for is_rotary, family in sorted(families, key=lambda key: (key[0], -_count(findings, *key), key[1])):
        names = [f"{one.module}.{one.name}" for one in _of(findings, is_rotary, family)]
        op = "rope: " if is_rotary else ""
        lines += [f"**{op}{family}** ({len(names)}): {', '.join(names)}", ""]
    lines += ["## Left as they are", "", "| module | name | why |", "|---|---|---|"]
    lines += [f"| {one.module} | {one.name} | {_cell(one.reason)} |" for one in findings if one.reason]
    if absent:
        lines += ["", "## Not imported", "", *(f"- {name}: {_cell(reason)}" for name, reason in absent.items())]
    return "\n".join(lines) + "\n"


def _of(findings: list[Finding], is_rotary: bool, family: str) -> list[Finding]:
    return [one for one in findings if one.family == family and (one.kind == "rotary") == is_rotary]


def _count(findings: list[Finding], is_rotary: bool, family: str) -> int:
    return len(_of(findings, is_rotary, family))


def _cell(text: str) -> str:
    return " ".join(text.split())[:160].replace("|", "\\|")


def main() -> int:
    """Write or check the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the page is out of date")
    args = parser.parse_args()
    findings, absent = everything()
    text = page(findings, absent)
    problems = [f"{one.module}.{one.name}: {one.problem}" for one in findings if one.problem]
    if not args.check:
        PAGE.write_text(text, encoding="utf-8")
    elif not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != text:
        problems.append(f"{PAGE.relative_to(ROOT)} is out of date. Run: python scripts/transformers_census.py")
    counts = text.split("|---|---|---|---|---|\n", 1)[1].split("\n\n", 1)[0]
    print(counts)
    print("\n".join(problems), file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main())
