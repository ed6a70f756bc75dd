"""llm-adapt ops and explain: who serves an op on this machine, and why the others do not."""

from __future__ import annotations

import argparse
import contextlib
import json
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llm_adapt.cli import render
from llm_adapt.errors import KernelError, SettingsError
from llm_adapt.report import Report
from llm_adapt.session import current_adapter, patched
from llm_adapt.session import report as current_report

if TYPE_CHECKING:
    import torch

    from llm_adapt.ops.dispatch.registry import FusedOp

__all__ = ["add_parsers", "here", "parse_dtype", "run_explain", "run_ops"]

_DTYPES = {
    "fp32": "float32", "f32": "float32", "bf16": "bfloat16", "fp16": "float16", "half": "float16", "fp64": "float64"
}  # fmt: skip
_OPS_EXAMPLES = """examples:
  llm-adapt ops                                  who serves each op here, in float32 and bfloat16, and why
  llm-adapt ops --ops "attention=reference"      the same under a policy
  llm-adapt ops --dtype fp16 --json              for a script
"""
_EXPLAIN_EXAMPLES = """examples:
  llm-adapt explain rms_norm --shape 8,1024,4096 --dtype bf16
  llm-adapt explain attention --shape 1,2048,32,128 --option causal=bottom_right --option window_left=256
  llm-adapt explain rms_norm --option form=one_plus --inference
"""


NOTHING = "nothing"  # serves: the policy chose a library that cannot, and the call would raise


def add_parsers(subparsers: Any) -> None:
    """Add both commands to the subparsers of `llm-adapt`."""
    ops = subparsers.add_parser(
        "ops",
        help="who serves each fused operator on this machine",
        description="For every operator: the kernel library that serves it on this machine, and why others do not.",
        epilog=_OPS_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ops.add_argument("--dtype", action="append", help="dtype of the calls, may be repeated (float32 and bfloat16)")
    ops.set_defaults(func=run_ops)
    explain = subparsers.add_parser(
        "explain",
        help="who would serve one call of an operator, and why the others would not",
        description="Make one call's tensors, ask every kernel library about it, and prove those that would serve it.",
        epilog=_EXPLAIN_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("op", help="name of the operator, see `llm-adapt ops`")
    explain.add_argument(
        "--shape", type=_shape, help="shape of the first tensor, comma-separated; others follow from it"
    )
    explain.add_argument("--dtype", default="float32", help="float32, bfloat16, float16, float64 (fp32, bf16, fp16)")
    explain.add_argument("--option", action="append", default=[], metavar="NAME=VALUE", help="option of the operator")
    explain.add_argument("--inference", action="store_true", help="as inside torch.inference_mode()")
    explain.set_defaults(func=run_explain)
    for parser in (ops, explain):
        parser.add_argument("--device", metavar="NAME", help="device instead of the detected one")
        parser.add_argument(
            "--ops", metavar="POLICY", dest="policy", help="which library serves which op (docs/ops.md)"
        )
        parser.add_argument("--json", action="store_true", help="print JSON")


def run_ops(args: argparse.Namespace) -> int:
    """Run the command: one row for each op and dtype."""
    dtypes = args.dtype or ["float32", "bfloat16"]
    rows = []
    with _session(args) as report:
        from llm_adapt.ops.dispatch.registry import all_ops

        for op in all_ops().values():
            for dtype in dtypes:
                found = _answer(op, next(_inputs(op, parse_dtype(dtype))))
                rows.append(found | {"dtype": str(parse_dtype(dtype)).removeprefix("torch.")})
    if args.json:
        print(json.dumps(rows, indent=2))
        return 0
    table = [(row["op"], row["dtype"], row["serves"], _others(row)) for row in rows]
    where = f"on {report.simulated}, SIMULATED" if report.simulated else "on this machine"
    render.table(f"Who serves each operator {where}", ("op", "dtype", "serves", "others"), table)
    return 0


def run_explain(args: argparse.Namespace) -> int:
    """Run the command: one row for each library."""
    with _session(args) as report:
        import torch  # here: a simulated device must come before it

        from llm_adapt.ops.dispatch.registry import find_op

        op = find_op(args.op)
        with torch.inference_mode(args.inference):
            row = _answer(op, _checked(op, _arguments(op, args)))
    if args.json:
        print(json.dumps(row, indent=2))
        return int(row["serves"] == NOTHING)
    simulated = f" on {report.simulated}, SIMULATED" if report.simulated else ""
    render.heading(f"{row['call']}: {row['serves']} serves{simulated}")
    asked = [(library, answer["answer"], answer["proof"]) for library, answer in row["libraries"].items()]
    render.table("", ("library", "answer", "proof: error as a share of what is allowed"), [*asked, _reference_row(row)])
    return int(row["serves"] == NOTHING)


def _answer(op: FusedOp, arguments: dict[str, Any]) -> dict[str, Any]:
    """Who serves one call, and what every library says to it, as plain data."""
    from llm_adapt.ops.dispatch.dispatcher import dispatchers
    from llm_adapt.ops.dispatch.in_force import policy_in_force

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a quarantine: it is an answer here
        call, answers = dispatchers[op.name].ask_all(arguments)
    chosen = policy_in_force().chosen(op.name)
    serves = chosen or next((library for library, (reason, _) in answers.items() if not reason), "reference")
    if answers.get(chosen, ("", None))[0]:  # an explicit choice never falls back
        serves = NOTHING
    libraries = {}
    for library, (reason, verdict) in answers.items():
        proof = "-" if verdict is None else ", ".join(f"{name} {error:.2g}" for name, error in verdict.errors.items())
        first = "serves" if library == serves else "would serve, comes later in the order"
        libraries[library] = {"answer": reason or first, "proof": proof or "-"}
    simulated = current_report().simulated
    return {
        **({"simulated": simulated} if simulated else {}),
        "op": op.name,
        "dtype": str(call.dtype).removeprefix("torch."),
        "call": str(call),
        "serves": serves,
        "libraries": libraries,
    }


def _others(row: dict[str, Any]) -> str:
    return (
        "; ".join(f"{name}: {one['answer']}" for name, one in row["libraries"].items() if name != row["serves"]) or "-"
    )


def _reference_row(row: dict[str, Any]) -> tuple[str, str, str]:
    answers = {"reference": "serves", NOTHING: "does not take the place of an explicit choice"}
    return "reference", answers.get(row["serves"], "serves where no library does"), "-"


@contextlib.contextmanager
def _session(args: argparse.Namespace) -> Iterator[Report]:
    with patched(device=args.device, ops=args.policy) as report:
        yield report


def _arguments(op: FusedOp, args: argparse.Namespace) -> dict[str, Any]:
    """Arguments of the call that was asked for, on this machine's device."""
    import torch

    dtype = parse_dtype(args.dtype)
    options = dict(_option(op, text) for text in args.option)
    if args.shape is None:
        return next(_inputs(op, dtype, options))
    if op.example is None:
        raise KernelError(
            f"explain {op.name} --shape was asked; {op.name} is explained on its own inputs: omit --shape."
        )
    try:
        made = op.example(torch.Generator().manual_seed(0), dtype, args.shape)
    except (ValueError, IndexError, RuntimeError) as error:  # RuntimeError: more memory than there is
        raise KernelError(f"explain {op.name} --shape {args.shape} was asked; it does not fit: {error}") from None
    return here(op.bind(**made | options))


def _checked(op: FusedOp, arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments, after the reference has seen them without their values: what it refuses, nobody serves."""
    from llm_adapt.ops.dispatch.proof import without_values

    try:
        op.reference(**{name: without_values(value) for name, value in arguments.items()})
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise KernelError(f"explain {op.name} was asked about a call that {op.name} does not take: {error}") from None
    except (RuntimeError, NotImplementedError):
        return arguments  # it needs the values
    return arguments


def _inputs(op: FusedOp, dtype: torch.dtype, options: dict[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """The op's own inputs on this machine's device, those with these options first."""
    import torch

    wanted = options or {}
    cases = [op.bind(**case) for case in op.inputs(torch.Generator().manual_seed(0), dtype)]
    cases.sort(key=lambda case: sum(case[name] != value for name, value in wanted.items()))
    for case in cases:
        yield here(case | wanted)


def here(arguments: dict[str, Any]) -> dict[str, Any]:
    """The arguments with their tensors on this session's device."""
    import torch

    device = current_adapter().device_type

    def move(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(move(item) for item in value)
        return value.to(torch.device(device)) if isinstance(value, torch.Tensor) else value

    return {name: move(value) for name, value in arguments.items()}


def _option(op: FusedOp, text: str) -> tuple[str, Any]:
    """NAME=VALUE, the value read as Python where it can be, else as text."""
    import ast

    name, equals, raw = text.partition("=")
    options = [name for name, kind in op.kinds.items() if kind == "option"]
    if not equals or name not in options:
        raise SettingsError(
            f"--option {text} was asked; {op.name} has the options {', '.join(options)}. Write NAME=VALUE."
        )
    try:
        return name, ast.literal_eval(raw)
    except (ValueError, SyntaxError):
        return name, raw


def parse_dtype(text: str) -> torch.dtype:
    """A floating-point dtype by its name or its short name. Raises SettingsError."""
    import torch

    found = getattr(torch, _DTYPES.get(text, text), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise SettingsError(f"--dtype {text} was asked; pass float32, bfloat16, float16 or float64.")
    return found


def _shape(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.replace("x", ",").split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of sizes such as 8,1024,4096")
    return sizes
