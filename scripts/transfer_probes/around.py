"""Tools beside training: profilers, ranges, the CUDA runtime, errors, and the order of imports."""

# ruff: noqa: E501 - a line of a probe stays a line

from __future__ import annotations

from transfer_probes.probe import Probe, Raises, group

__all__ = ["PROBES"]

_X = "x = torch.ones(4, device='cuda')\n"


def _early(before: str, code: str, expected: object = True, limit: str = "") -> Probe:
    return Probe("import order", code, expected, before="import torch\n" + before, limit=limit)


_SNAPSHOT = """import torch, torch.distributed, torch.utils.data, torch.profiler
from torch.nn.parallel import DistributedDataParallel
places = (torch, torch.Tensor, torch.nn.Module, torch.cuda, torch.cuda.memory, torch.cuda.random, torch.cuda.streams,
          torch.cuda.graphs, torch.cuda.amp, torch.distributed, torch.distributed.distributed_c10d, torch.jit,
          torch.profiler, torch.amp, torch.autocast, DistributedDataParallel, torch.utils.data.DataLoader)
kept = [dict(vars(place)) for place in places]"""

PROBES = [
    *group(
        "profiler, nvtx, cudart",
        ("torch.cuda.nvtx.range_push('step')\ntorch.cuda.nvtx.range_pop()\ntorch.cuda.nvtx.mark('here')\nTrue",),
        ("with torch.cuda.nvtx.range('step'):\n    pass\nTrue",),
        ("torch.cuda.nvtx.range_end(torch.cuda.nvtx.range_start('step'))", None),
        ("with torch.autograd.profiler.emit_nvtx():\n    torch.ones(1, device='cuda') + 1\nTrue",),
        ("torch.cuda.cudart().cudaProfilerStart()\ntorch.cuda.cudart().cudaProfilerStop()\nTrue",),
        ("free, total = torch.cuda.cudart().cudaMemGetInfo(0)\n0 < free <= total",),
        ("torch.cuda.check_error(0)", None),
        ("torch.cuda.profiler.start()\ntorch.cuda.profiler.stop()\nTrue",),
        ("with torch.cuda.profiler.profile():\n    pass\nTrue",),
        (
            "from torch.profiler import profile, ProfilerActivity\n"
            "with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:\n    torch.ones(2, device='cuda') + 1\n"
            "'aten::add' in p.key_averages().table(sort_by='cpu_time_total')",
        ),
        (
            "from torch.profiler import profile, ProfilerActivity, schedule\nseen = []\n"
            "with profile(activities=[ProfilerActivity.CPU], schedule=schedule(wait=0, warmup=1, active=1, repeat=1),\n"
            "             on_trace_ready=lambda p: seen.append(len(p.events()))) as p:\n"
            "    for _ in range(3):\n        torch.ones(2, device='cuda') + 1\n        p.step()\nseen[0] > 0",
        ),
        (
            "from torch.profiler import profile, ProfilerActivity\n"
            "with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as p:\n    torch.ones(2, device='cuda') + 1\n"
            "p.export_chrome_trace('cuda_trace.json')\nos.path.getsize('cuda_trace.json') > 0",
        ),
        (
            "from torch.profiler import profile\nisinstance(profile, type) and issubclass(type('Mine', (profile,), {}), profile)",
        ),
        (
            "with torch.autograd.profiler.profile(use_device='cuda') as p:\n    torch.ones(2, device='cuda') + 1\nlen(p.function_events) > 0",
        ),
        ("with torch.profiler.record_function('cuda_step'):\n    y = torch.ones(2, device='cuda')\ny.is_cuda",),
    ),
    *group(
        "exceptions",
        ("issubclass(torch.cuda.OutOfMemoryError, RuntimeError)",),
        ("torch.cuda.OutOfMemoryError is torch.OutOfMemoryError",),
        ("torch.empty(2**50, device='cuda')", Raises("OutOfMemoryError")),
        (
            "try:\n    torch.empty(2**50, device='cuda')\nexcept torch.cuda.OutOfMemoryError:\n    torch.cuda.empty_cache()\n"
            "torch.ones(1, device='cuda').item()",
            1.0,
        ),
        ("torch.cuda.CudaError.__mro__[1] is RuntimeError",),
        ("torch.cuda.check_error(2)", Raises("RuntimeError")),
    ),
    *group(
        "data loading and processes",
        (
            "from torch.utils.data import DataLoader\n[b.cuda(non_blocking=True).sum().item() for b in DataLoader(torch.ones(4), 2, pin_memory=True)]",
            [2.0, 2.0],
        ),
        (
            "from torch.utils.data import DataLoader\n"
            "[b.cuda().sum().item() for b in DataLoader(torch.ones(4), 2, num_workers=1, pin_memory=True, pin_memory_device='cuda')]",
            [2.0, 2.0],
        ),
        (
            "from torch.utils.data import DataLoader\ng = torch.Generator('cpu').manual_seed(1)\n"
            "sorted(b.item() for b in DataLoader(torch.arange(3), shuffle=True, generator=g))",
            [0, 1, 2],
        ),
        (
            "import torch.multiprocessing as mp\ndef work(rank, path):\n    open(path, 'w').write(str(torch.ones(1, device='cuda').item()))\n"
            "c = mp.get_context('fork').Process(target=work, args=(0, 'cuda_child'))\nc.start()\nc.join()\nopen('cuda_child').read()",
            "1.0",
        ),
    ),
    _early("from torch.cuda import memory_allocated", "x = torch.ones(4, device='cuda')\nmemory_allocated() > 0"),
    _early("from torch.cuda import is_available", "is_available()"),
    _early("from torch.cuda import Stream", "Stream().query()"),
    _early(
        "from torch import zeros, device", "zeros(1, device='cuda').is_cuda and device('cuda') == torch.device('cuda')"
    ),
    _early("from torch import load, save", "save(torch.ones(1), 'm.pt')\nload('m.pt', map_location='cuda').is_cuda"),
    _early(
        "from torch.cuda.amp import autocast, GradScaler",
        "with autocast():\n    y = torch.ones(2, 2).cuda() @ torch.ones(2, 2).cuda()\ny.dtype == torch.float16",
    ),
    _early("from torch.distributed import init_process_group, is_nccl_available", "is_nccl_available()"),
    _early("from torch.cuda.random import get_rng_state", "get_rng_state('cuda').numel() > 0"),
    _early(
        "move = torch.Tensor.cuda",
        "move(torch.ones(1)).is_cuda",
        limit="a method of C taken from its class is not replaced",
    ),
    _early("class Model(torch.nn.Linear):\n    pass\nmodel = Model(1, 1)", "model.cuda().weight.is_cuda"),
    _early(
        "from torch.jit import script",
        "def f(x: torch.Tensor) -> torch.Tensor:\n    return x + 1\nscript(f)(torch.ones(1).cuda()).item()",
        2.0,
    ),
    _early(
        "from torch.cuda import empty_cache, synchronize, current_device",
        "synchronize()\nempty_cache()\ncurrent_device()",
        0,
    ),
    Probe("undo", "undo()\ntorch.cuda.is_available()", False),
    Probe("undo", "undo()\ntorch.zeros(1, device='cuda')", Raises("AssertionError")),
    Probe("undo", "undo()\ntorch.device('cuda').type", "cuda"),
    Probe("undo", "undo()\ntorch.ones(1, device='npu').is_cuda", False),
    Probe(
        "undo",
        "undo()\n[place.__name__ for place, names in zip(places, kept) if any(vars(place).get(n) is not v for n, v in names.items())]",
        [],
        before=_SNAPSHOT,
    ),
    Probe("undo", "undo()\nstart()\ntorch.zeros(1, device='cuda').is_cuda"),
    Probe("undo", "zeros = torch.zeros\nstart()\ntorch.zeros is zeros"),
    Probe("undo", "from torch.cuda import memory_allocated\nundo()\nimport torch.cuda as c\nc.memory_allocated()", 0),
    Probe("undo", "undo()\nhasattr(torch.distributed, 'ProcessGroupNCCL')", False),
]
