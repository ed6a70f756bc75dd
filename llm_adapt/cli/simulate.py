"""llm-adapt simulate: list, build and try the devices that need no hardware."""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
from typing import Any

from llm_adapt import simulators
from llm_adapt.simulators.build import cache_folder

__all__ = ["add_parser"]

_EXAMPLES = """examples:
  llm-adapt simulate list                     the simulated devices, their chips, and what nobody can know of them
  llm-adapt simulate build npu                fetch torch_npu into a cache of its own, compile the emulated CANN
  llm-adapt simulate try npu:Ascend310P3      one training step on it, in a process of its own
  llm-adapt simulate clean                    remove everything that was built and fetched
  llm-adapt run --simulate npu --nproc 2 pretrain.py     your script on two of them

A green run here is no evidence that real hardware would give it: docs/simulators.md says what it is evidence of.
"""

_TRIAL = """
import sys, llm_adapt
report = llm_adapt.patch(simulate=sys.argv[1])
import torch
torch.manual_seed(0)
model = torch.nn.Linear(64, 64).cuda()
loss = model(torch.randn(8, 64, device="cuda")).square().mean()
loss.backward()
print(report.to_text().splitlines()[0])
name, kind = torch.cuda.get_device_name(0), model.weight.device
print(f"one step on {name} ({kind}): loss {loss.item():.6f}, gradient {model.weight.grad.norm().item():.6f}")
"""


def add_parser(subparsers: Any) -> None:
    """Add the `simulate` command."""
    parser = subparsers.add_parser(
        "simulate",
        help="build and try the simulated npu, mlu and dcu",
        description="Devices on host memory: list them, build them, try them, remove what was built.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    acts = parser.add_subparsers(dest="act", required=True, metavar="act")
    acts.add_parser("list", help="the simulated devices and their chips").set_defaults(func=_list)
    for act, function, text in (
        ("build", _build, "build one now instead of on first use"),
        ("try", _try, "one training step on it"),
    ):
        one = acts.add_parser(act, help=text)
        one.add_argument("name", help="npu, mlu or dcu, with :MODEL if you like")
        one.set_defaults(func=function)
    acts.add_parser("clean", help="remove what was built and fetched").set_defaults(func=_clean)


def _list(args: argparse.Namespace) -> int:
    for name in simulators.SIMULATORS:
        simulator = simulators.parse(name).simulator
        print(f"{name}: {simulator.title}")
        for model, meaning in simulator.models.items():
            default = " (default)" if model == simulator.default_model else ""
            print(f"    {model:<18}{meaning}{default}")
        for line in simulator.unknown:
            print(f"    unknown: {line}")
    return 0


def _build(args: argparse.Namespace) -> int:
    print(simulators.prepare(args.name))
    return 0


def _try(args: argparse.Namespace) -> int:
    simulators.prepare(args.name)
    return subprocess.run([sys.executable, "-c", _TRIAL, args.name], check=False).returncode


def _clean(args: argparse.Namespace) -> int:
    folder = cache_folder()
    if folder.is_dir():
        shutil.rmtree(folder)
    print(f"{folder} is gone")
    return 0
