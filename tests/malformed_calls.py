"""Malformed calls, one hundred and more: what is asked, and a pattern of what must be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from llm_adapt.adapters import adapters
from llm_adapt.patching import Entry, Loan, Patch

ABSENT = [name for name, adapter in adapters().items() if not adapter.probe().found and not adapter.probe().loadable]
TRAIN = "train.py"  # a script that is there and must never be started


def row(target: str, **fields: Any) -> Patch:
    """A row that would replace the target."""
    return Patch(target, lambda: None, "for the test", **fields)


# patch() arguments
ARGUMENTS: list[tuple[dict[str, Any], str]] = [
    ({"device": "gpu"}, r"patch\(device=\.\.\.\) asked for 'gpu', which is no device"),
    ({"device": "CUDA"}, "'CUDA', which is no device. Did you mean 'cuda'?"),
    ({"device": "nup"}, "Did you mean 'npu'?"),
    ({"device": "ascend"}, "'ascend', which is no device"),
    ({"device": "cuda:0"}, "'cuda:0', which is no device. Did you mean 'cuda'?"),
    ({"device": "cpu,cuda"}, "'cpu,cuda', which is no device"),
    ({"device": "../cpu"}, "'../cpu', which is no device"),
    ({"device": "цпу"}, "'цпу', which is no device"),
    ({"device": "[bold]cpu"}, "bold]cpu', which is no device"),
    ({"device": "cpu\ncpu"}, r"'cpu\\ncpu', which is no device"),
    ({"device": ""}, r"patch\(device=''\) was asked; accepted: cuda, npu, mlu, dcu, cpu"),
    ({"device": " "}, r"patch\(device=' '\)"),
    ({"device": " cpu "}, r"patch\(device=' cpu '\)"),
    ({"device": 0}, r"patch\(device=0\) was asked"),
    ({"device": True}, r"patch\(device=True\)"),
    ({"device": b"cpu"}, r"patch\(device=b'cpu'\)"),
    ({"device": ["cpu"]}, r"patch\(device=\['cpu'\]\)"),
    ({"device": torch.device("cpu")}, r"patch\(device=device\(type='cpu'\)\)"),
    ({"strict": "yes"}, r"patch\(strict='yes'\) was asked; accepted: 1 or 0"),
    ({"strict": 2}, r"patch\(strict=2\)"),
    ({"strict": 1}, r"patch\(strict=1\)"),
    ({"strict": []}, r"patch\(strict=\[\]\)"),
    ({"cpu_devices": 0}, r"patch\(cpu_devices=0\) was asked; accepted: 1 to 1024"),
    ({"cpu_devices": -1}, r"patch\(cpu_devices=-1\)"),
    ({"cpu_devices": 1025}, r"patch\(cpu_devices=1025\)"),
    ({"cpu_devices": 10**30}, r"patch\(cpu_devices=10000"),
    ({"cpu_devices": 2.0}, r"patch\(cpu_devices=2\.0\)"),
    ({"cpu_devices": "2"}, r"patch\(cpu_devices='2'\)"),
    ({"cpu_devices": True}, r"patch\(cpu_devices=True\)"),
    ({"cpu_devices": float("nan")}, r"patch\(cpu_devices=nan\)"),
    ({"out": ""}, r"patch\(out=''\) was asked; accepted: a folder"),
    ({"out": 3}, r"patch\(out=3\)"),
    ({"out": b"runs"}, r"patch\(out=b'runs'\)"),
    ({"ops": ""}, r"patch\(ops=''\) was asked; accepted: OP=LIBRARY"),
    ({"ops": 3}, r"patch\(ops=3\)"),
    ({"ops": "rms_norm"}, "ops='rms_norm' was asked; write OP=LIBRARY"),
    ({"ops": "rms_norm=trition"}, "kernel library 'trition' was asked; it is unknown. did you mean triton"),
    ({"ops": "nowhere.toml"}, "the file cannot be read"),
    ({"proof": "maybe"}, r"patch\(proof='maybe'\) was asked; accepted: off, first, strict or sample:N"),
    ({"proof": "sample:0"}, r"patch\(proof='sample:0'\)"),
    ({"proof": True}, r"patch\(proof=True\)"),
    *(({"device": name}, f"'{name}', which is not here: .*") for name in ABSENT),
]

# names and values of LLM_ADAPT_* variables
VARIABLES = [
    ("DEVICE", "gpu", "LLM_ADAPT_DEVICE asked for 'gpu', which is no device"),
    ("DEVICE", "", "LLM_ADAPT_DEVICE='' was set; accepted: cuda, npu, mlu, dcu, cpu. Correct or unset it"),
    ("DEVICE", "auto", "'auto', which is no device"),
    ("DEVICE", "none", "'none', which is no device"),
    ("DEVICE", "NPU", "Did you mean 'npu'?"),
    ("STRICT", "maybe", "LLM_ADAPT_STRICT='maybe' was set; accepted: 1 or 0"),
    ("STRICT", "", "LLM_ADAPT_STRICT=''"),
    ("STRICT", "2", "LLM_ADAPT_STRICT='2'"),
    ("CPU_DEVICES", "0", "LLM_ADAPT_CPU_DEVICES='0' was set; accepted: 1 to 1024"),
    ("CPU_DEVICES", "-3", "LLM_ADAPT_CPU_DEVICES='-3'"),
    ("CPU_DEVICES", "two", "LLM_ADAPT_CPU_DEVICES='two'"),
    ("CPU_DEVICES", "1.5", "LLM_ADAPT_CPU_DEVICES='1.5'"),
    ("CPU_DEVICES", "0x10", "LLM_ADAPT_CPU_DEVICES='0x10'"),
    ("CPU_DEVICES", "", "LLM_ADAPT_CPU_DEVICES=''"),
    ("OUT", "", "LLM_ADAPT_OUT='' was set; accepted: a folder"),
    ("STRCT", "1", "Unknown environment variable LLM_ADAPT_STRCT. Did you mean LLM_ADAPT_STRICT?"),
    ("DEVICES", "1", "Did you mean LLM_ADAPT_(CPU_DEVICES|DEVICE)?"),
    ("CPU_DEVICE", "2", "Did you mean LLM_ADAPT_CPU_DEVICES?"),
    ("device", "cpu", "Unknown environment variable LLM_ADAPT_device"),
    ("", "1", "Unknown environment variable LLM_ADAPT_. "),
    ("WHATEVER", "1", r"Known: LLM_ADAPT_CACHE, LLM_ADAPT_CPU_DEVICES, LLM_ADAPT_DEVICE, .*LLM_ADAPT_STRICT"),
]

# command lines that make no sense
USAGES = [
    ([], "the following arguments are required: command"),
    (["fly"], "invalid choice: 'fly'"),
    (["run"], "the following arguments are required: script"),
    (["run", "-m"], "the following arguments are required: script"),
    (["run", "--nproc"], "argument --nproc: expected one argument"),
    (["run", "--nproc", "0", TRAIN], "argument --nproc: '0' was given; a number from 1 to 1024 is needed"),
    (["run", "--nproc", "two", TRAIN], "'two' was given"),
    (["run", "--nproc", "1.5", TRAIN], r"'1\.5' was given"),
    (["run", "--nproc", "", TRAIN], "'' was given"),
    (["run", "--nproc", "²", TRAIN], "'²' was given"),
    (["run", "--nproc=-1", TRAIN], "'-1' was given"),
    (["run", "--nproc", "9" * 50, TRAIN], "9' was given"),
    (["run", "--nnodes", "0", TRAIN], "argument --nnodes: '0' was given"),
    (["run", "--nnodes", "1:4", TRAIN], "'1:4' was given"),
    (["run", "--node-rank=-1", TRAIN], "argument --node-rank: '-1' was given; a number from 0"),
    (["run", "--master-port", "0", TRAIN], "argument --master-port: '0' was given; a number from 1 to 65535"),
    (["run", "--master-port", "65536", TRAIN], "'65536' was given"),
    (["run", "--cpu-devices", "0", TRAIN], "argument --cpu-devices: '0' was given; a number from 1 to 1024"),
    (["run", "--devic", "cpu", TRAIN], "unrecognized arguments: --devic"),
    (["run", "--strict=maybe", TRAIN], "argument --strict: ignored explicit argument 'maybe'"),
    (["run", "--nproc-per-node", "2", TRAIN], "unrecognized arguments: --nproc-per-node"),
    (["doctor", "extra"], "unrecognized arguments: extra"),
]

# command lines of `llm-adapt run` that cannot be started, with variables of the environment
REFUSALS: list[tuple[list[str], dict[str, str], str]] = [
    (["absent.py"], {}, "ScriptError: Script 'absent.py' was asked; found nothing there"),
    (["absent/train.py"], {}, "'absent/train.py' was asked; found nothing there"),
    ([f"{TRAIN}/x.py"], {}, "found nothing there"),
    ([""], {}, "Script '' was asked; found nothing there"),
    (["a\0b.py"], {}, r"Script 'a\\x00b\.py' was asked; found nothing there"),
    (["x" * 300], {}, "found nothing there"),
    (["."], {}, r"Script '\.' was asked; it is a folder without a __main__\.py"),
    (["link.py"], {}, "Script 'link.py' was asked; found nothing there"),
    (["-m", "no_such_module"], {}, "Module 'no_such_module' was asked; it is not installed and not in"),
    (["-m", "no_such.module"], {}, "Module 'no_such.module' was asked"),
    (["-m", "absent.py"], {}, "Module 'absent.py' was asked; .* or drop -m to run a file"),
    (["-m", "./absent"], {}, "Module './absent' was asked"),
    (["-m", ""], {}, "Module '' was asked"),
    (["-m", ".relative"], {}, "Module '.relative' was asked"),
    (["--device", "gpu", TRAIN], {}, "DeviceError: --device asked for 'gpu', which is no device"),
    (["--device", "", TRAIN], {}, r"patch\(device=''\) was asked"),
    (["--device", ABSENT[0], TRAIN], {}, f"--device asked for '{ABSENT[0]}', which is not here"),
    (["--device", ABSENT[0], "--nproc", "2", TRAIN], {}, f"'{ABSENT[0]}', which is not here"),
    (["--out", "", TRAIN], {}, r"patch\(out=''\) was asked; accepted: a folder"),
    (["--out", TRAIN, TRAIN], {}, "SettingsError: --out or LLM_ADAPT_OUT asked for reports in 'train.py', which"),
    (["--out", f"{TRAIN}/out", TRAIN], {}, r"Not a directory"),
    (["--out", "a\0b", TRAIN], {}, r"reports in '.*a\\x00b', which cannot be: embedded null byte"),
    (["--nnodes", "2", TRAIN], {}, "CommError: --nnodes 2 was asked without --master-addr. Give the host of machine 0"),
    (["--node-rank", "1", TRAIN], {}, "--node-rank 1 was asked with --nnodes 1. Machines count from 0 to 0"),
    (["--nnodes", "2", "--node-rank", "2", "--master-addr", "a", TRAIN], {}, "Machines count from 0 to 1"),
    ([TRAIN], {"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2; a rank lies below the number of ranks"),
    ([TRAIN], {"RANK": "-1", "WORLD_SIZE": "2"}, "RANK='-1' was found; a rank or size is a number"),
    ([TRAIN], {"RANK": "zero", "WORLD_SIZE": "2"}, "RANK='zero' was found"),
    ([TRAIN], {"RANK": "0"}, "RANK=0 was found without WORLD_SIZE. Set both or none"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "2"}, "without LOCAL_RANK"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "3"}, "LOCAL_RANK=3 among 2 ranks here and 2 in all"),
    ([TRAIN], {"RANK": "0", "WORLD_SIZE": "1", "MASTER_PORT": "99999"}, "MASTER_PORT=99999 was found; a port"),
    (
        [TRAIN],
        {"RANK": "0", "WORLD_SIZE": "4", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
        "4 ranks, 2 of them here, without MASTER_ADDR",
    ),
    ([TRAIN], {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}, "Say `srun llm-adapt run ...`"),
    ([TRAIN], {"SLURM_PROCID": "x", "SLURM_NTASKS": "4"}, "SLURM_PROCID='x' was found"),
    ([TRAIN], {"SLURM_PROCID": "1", "SLURM_NTASKS": "4"}, "without SLURM_LOCALID"),
    ([TRAIN], {"OMPI_COMM_WORLD_RANK": "1"}, "OMPI_COMM_WORLD_RANK=1 was found without OMPI_COMM_WORLD_SIZE"),
    ([TRAIN], {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "two"}, "OMPI_COMM_WORLD_SIZE='two' was found"),
]

# patch() arguments in a process that is patched with device="cpu", cpu_devices=2
OTHERS: list[dict[str, Any]] = [{"device": ABSENT[0]}, {"strict": True}, {"cpu_devices": 3}, {"out": "runs"}]

# uses of an ordinal in such a process
CALLS: list[Callable[[], object]] = [
    lambda: torch.zeros(1, device="cuda:9"),
    lambda: torch.zeros(1, device=9),
    lambda: torch.ones(1).cuda(9),
    lambda: torch.ones(1).to("cuda:9"),
    lambda: torch.nn.Linear(1, 1).cuda(9),
    lambda: torch.cuda.set_device(9),
    lambda: torch.cuda.get_device_properties(9),
    lambda: torch.cuda.memory_allocated("cuda:9"),
    lambda: torch.Generator(device="cuda:9"),
    lambda: torch.set_default_device("cuda:9"),
    lambda: torch.load("absent.pt", map_location="cuda:9"),
]

# targets of rows
TARGETS = ["", ":", "module", "module.name", "module:", ":name", "a:b:c", "a::b"]

# rows for a module `toy` with a function `work`, a class `Thing` with a `method`, and a dict `table`
PLANS: list[tuple[list[Any], str]] = [
    ([row("toy:absent")], "toy:absent does not exist"),
    ([row("toy:wrok")], r"toy \(of unknown version\) has no 'wrok'; nearest names: work"),
    ([row("toy:Absent.method")], "toy:Absent.method does not exist: .* has no 'Absent'"),
    ([row("toy:Thing.absent.method")], "toy:Thing.absent.method does not exist: Thing"),
    ([row("toy:work"), row("toy:work")], "Two rows claim toy:work"),
    ([row("toy:Thing"), row("toy:Thing.method")], "Two rows claim toy:Thing and toy:Thing.method"),
    ([Entry("toy:work", 1, "for the test", key="k")], "toy:work was asked as a dict; found function"),
    ([Entry("toy:table", 1, "a", key="k"), Entry("toy:table", 2, "b", key="k")], "Two rows claim toy:table"),
    ([Loan("toy:a.b", dict, "for the test")], "toy:a.b was asked as a loan; lend a top-level package"),
    ([row("toy:work", fingerprints={"1.0": "another"}, on_mismatch="refuse")], "toy:work: its source has changed"),
]
