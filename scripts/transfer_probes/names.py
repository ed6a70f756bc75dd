"""torch.cuda and its submodules: every name that training scripts call, with the kind of answer CUDA gives."""

# ruff: noqa: E501 - a line of a probe stays a line

from __future__ import annotations

from transfer_probes.probe import Raises, group

__all__ = ["PROBES"]

_X = "x = torch.ones(4, device='cuda')\n"
_NO_RUNTIME = "there is no CUDA runtime to call; what counts is that no answer is made up"

PROBES = [
    *group(
        "torch.cuda: the device",
        ("torch.cuda.is_available()",),
        ("torch.cuda.device_count() >= 1",),
        ("torch.cuda.is_initialized()", False),
        ("torch.cuda.init()\ntorch.cuda.is_initialized()",),
        ("torch.cuda.current_device()", 0),
        ("torch.cuda.set_device(0)\ntorch.cuda.current_device()", 0),
        ("torch.cuda.set_device('cuda:0')\ntorch.cuda.current_device()", 0),
        ("torch.cuda.set_device(torch.device('cuda', 0))\ntorch.cuda.current_device()", 0),
        ("torch.cuda.set_device(torch.device('cuda:0'))\ntorch.cuda.current_device()", 0),
        ("torch.cuda.synchronize()\ntorch.cuda.synchronize('cuda:0')\ntorch.cuda.synchronize(device=0)", None),
        ("isinstance(torch.cuda.get_device_name(), str)",),
        ("torch.cuda.get_device_name('cuda:0') == torch.cuda.get_device_name(0) != ''",),
        ("major, minor = torch.cuda.get_device_capability()\nmajor >= 7",),
        ("torch.cuda.get_device_capability('cuda:0')[0] >= 7",),
        ("torch.cuda.get_device_properties(0).total_memory > 2**30",),
        ("torch.cuda.get_device_properties('cuda:0').name == torch.cuda.get_device_name(0)",),
        ("torch.cuda.get_device_properties(torch.device('cuda')).multi_processor_count > 0",),
        ("p = torch.cuda.get_device_properties(0)\n(p.major, p.minor) == torch.cuda.get_device_capability(0)",),
        (
            "torch.cuda.get_device_properties().warp_size",
            32,
            "an NPU has no warps, and torch_npu leaves the field empty",
        ),
        ("with torch.cuda.device(0):\n    at = torch.cuda.current_device()\nat", 0),
        ("with torch.cuda.device('cuda:0'):\n    at = torch.cuda.current_device()\nat", 0),
        ("with torch.cuda.device(torch.device('cuda:0')):\n    at = torch.cuda.current_device()\nat", 0),
        ("with torch.cuda.device(-1):\n    at = torch.cuda.current_device()\nat", 0),
        (_X + "with torch.cuda.device_of(x):\n    at = torch.cuda.current_device()\nat", 0),
        ("torch.cuda.is_bf16_supported()",),
        ("torch.cuda.is_bf16_supported(including_emulation=False)",),
        ("isinstance(torch.cuda.is_tf32_supported(), bool)",),
        ("isinstance(torch.cuda.get_arch_list(), list)",),
        ("isinstance(torch.cuda.get_gencode_flags(), str)",),
        ("torch.cuda.can_device_access_peer(0, 0)", False),
        ("torch.cuda.has_half",),
        ("torch.cuda.get_sync_debug_mode()", 0),
        ("torch.cuda.ipc_collect()", None),
        ("torch.cuda._is_in_bad_fork()", False),
        ("seen = []\ntorch.cuda._lazy_call(lambda: seen.append(1))\ntorch.cuda.init()\nseen", [1]),
        (
            "isinstance(torch.version.cuda, str)",
            True,
            "torch itself reads it, and takes CUDA's paths where it is a string",
        ),
    ),
    *group(
        "torch.cuda: nothing is made up",
        ("torch.cuda.clock_rate()", Raises()),
        ("torch.cuda.power_draw()", Raises()),
        ("torch.cuda.list_gpu_processes()", Raises()),
        ("torch.cuda.temperature()", Raises()),
        ("torch.cuda.current_solver_handle()", Raises()),
        ("torch.cuda.cudart().cudaHostRegister(0, 0, 0)", Raises()),
        ("torch.cuda.nccl.version()", Raises()),
        ("torch.cuda.nccl.unique_id()", Raises()),
        ("torch.cuda.tunable.enable(True)", Raises()),
        (
            "torch.cuda.jiterator._create_jit_fn('template <typename T> T f(T x) { return x; }')(torch.ones(1).cuda())",
            Raises(),
        ),
        ("torch.cuda.memory.CUDAPluggableAllocator('./alloc.so', 'a', 'f')", Raises()),
        ("torch.cuda.set_device(9)", Raises()),
        ("torch.zeros(1, device='cuda:99')", Raises()),
        ("torch.device('cuda', -2)", Raises()),
    ),
    *group(
        "memory",
        (_X + "torch.cuda.memory_allocated() > 0",),
        (_X + "torch.cuda.memory_allocated('cuda:0') == torch.cuda.memory_allocated(0) > 0",),
        (_X + "torch.cuda.memory.memory_allocated() > 0",),
        (_X + "torch.cuda.memory.max_memory_allocated() > 0",),
        (_X + "torch.cuda.memory.memory_reserved() > 0",),
        (_X + "torch.cuda.max_memory_allocated(device='cuda') > 0",),
        (_X + "torch.cuda.max_memory_reserved() >= torch.cuda.memory_reserved() > 0",),
        (_X + "torch.cuda.max_memory_cached() > 0",),
        (_X + "del x\ntorch.cuda.empty_cache()\ntorch.cuda.memory_reserved()", 0),
        (_X + "del x\ntorch.cuda.memory.empty_cache()\ntorch.cuda.memory_reserved()", 0),
        ("free, total = torch.cuda.mem_get_info()\n0 < free <= total",),
        ("free, total = torch.cuda.memory.mem_get_info('cuda:0')\n0 < free <= total",),
        (_X + "torch.cuda.memory_stats()['allocated_bytes.all.current'] > 0",),
        (_X + "torch.cuda.memory.memory_stats(0)['allocated_bytes.all.peak'] > 0",),
        (_X + "'allocated' in torch.cuda.memory_summary().lower()",),
        (_X + "isinstance(torch.cuda.memory.memory_summary(device=None, abbreviated=False), str)",),
        (_X + "torch.cuda.memory_stats_as_nested_dict()['allocated_bytes']['all']['current'] > 0",),
        (_X + "len(torch.cuda.memory_snapshot()) > 0",),
        (_X + "'segments' in torch.cuda.memory._snapshot()",),
        ("torch.cuda.memory._record_memory_history(enabled=None)", None),
        (_X + "del x\ntorch.cuda.reset_peak_memory_stats()\ntorch.cuda.max_memory_allocated()", 0),
        (_X + "del x\ntorch.cuda.memory.reset_peak_memory_stats('cuda')\ntorch.cuda.max_memory_allocated()", 0),
        (_X + "torch.cuda.reset_max_memory_allocated()", None),
        ("torch.cuda.reset_accumulated_memory_stats()", None),
        ("torch.cuda.set_per_process_memory_fraction(0.5)\ntorch.cuda.get_per_process_memory_fraction()", 0.5),
        ("torch.cuda.memory.set_per_process_memory_fraction(0.5, 'cuda:0')", None),
        ("torch.cuda.get_allocator_backend()", "native"),
        (
            "with torch.cuda.memory.use_mem_pool(torch.cuda.MemPool()):\n    x = torch.ones(4, device='cuda')\nx.is_cuda",
        ),
        ("torch.cuda.host_memory_stats()['allocations.current'] >= 0",),
    ),
    *group(
        "streams, events, graphs",
        ("torch.cuda.Stream().query()",),
        ("torch.cuda.streams.Stream().query()",),
        ("torch.cuda.Stream(device='cuda:0', priority=-1).device.index", 0),
        ("torch.cuda.Stream(torch.device('cuda:0')).synchronize()", None),
        ("isinstance(torch.cuda.current_stream(), torch.cuda.Stream)",),
        ("torch.cuda.current_stream('cuda:0') == torch.cuda.default_stream(0)",),
        ("isinstance(torch.cuda.current_stream().cuda_stream, int)",),
        ("s = torch.cuda.Stream()\nwith torch.cuda.stream(s):\n    same = torch.cuda.current_stream() == s\nsame",),
        ("s = torch.cuda.Stream()\ntorch.cuda.set_stream(s)\ntorch.cuda.current_stream() == s",),
        ("s = torch.cuda.Stream()\ns.wait_stream(torch.cuda.current_stream())", None),
        (
            "s = torch.cuda.Stream()\nwith torch.cuda.StreamContext(s):\n    x = torch.ones(2, device='cuda')\nx.record_stream(s)",
            None,
        ),
        ("s = torch.cuda.Stream()\nwith s:\n    same = torch.cuda.current_stream() == s\nsame",),
        ("class Mine(torch.cuda.Stream):\n    pass\nisinstance(Mine(), Mine)",),
        (
            "a, b = (torch.cuda.Event(enable_timing=True) for _ in 'ab')\na.record()\nb.record()\n"
            "torch.cuda.synchronize()\na.elapsed_time(b) >= 0",
        ),
        ("e = torch.cuda.streams.Event()\ne.record(torch.cuda.current_stream())\ne.synchronize()\ne.query()",),
        ("e = torch.cuda.current_stream().record_event()\ntorch.cuda.Stream().wait_event(e)", None),
        ("isinstance(torch.cuda.Event(), torch.cuda.Event) and issubclass(torch.cuda.Stream, torch.Stream)",),
        ("torch.Event('cuda').query()",),
        ("torch.Event(device='cuda', enable_timing=True).query()",),
        ("torch.Stream('cuda').query()",),
        ("torch.Stream(device='cuda').device.index", 0),
        ("s = torch.cuda.Stream()\ntorch.cuda.get_stream_from_external(s.cuda_stream).cuda_stream == s.cuda_stream",),
        ("s = torch.cuda.Stream()\ntorch.cuda.ExternalStream(s.cuda_stream, 'cuda:0').cuda_stream == s.cuda_stream",),
        ("torch.cuda.is_current_stream_capturing()", False),
        ("torch.cuda.graphs.is_current_stream_capturing()", False),
        ("torch.cuda.graphs.CUDAGraph is torch.cuda.CUDAGraph",),
        ("torch.cuda.graphs.graph is torch.cuda.graph",),
        (
            "torch.accelerator.current_stream() == torch.cuda.current_stream()",
            True,
            "torch.npu.Stream never equals the same torch.Stream",
        ),
    ),
    *group(
        "random numbers",
        (
            "torch.cuda.manual_seed(1)\na = torch.rand(3, device='cuda')\ntorch.cuda.manual_seed_all(1)\n"
            "bool((a == torch.rand(3, device='cuda')).all())",
        ),
        (
            "torch.manual_seed(7)\na = torch.rand(3, device='cuda')\ntorch.manual_seed(7)\nbool((a == torch.rand(3, device='cuda')).all())",
        ),
        ("torch.cuda.manual_seed(5)\ntorch.cuda.initial_seed()", 5),
        (
            "s = torch.cuda.get_rng_state()\na = torch.rand(3, device='cuda')\ntorch.cuda.set_rng_state(s)\n"
            "bool((a == torch.rand(3, device='cuda')).all())",
        ),
        (
            "s = torch.cuda.random.get_rng_state('cuda')\na = torch.rand(3, device='cuda')\n"
            "torch.cuda.random.set_rng_state(s, 'cuda:0')\nbool((a == torch.rand(3, device='cuda')).all())",
        ),
        (
            "s = torch.cuda.get_rng_state(torch.device('cuda:0'))\ntorch.cuda.set_rng_state(s, device=torch.device('cuda', 0))",
            None,
        ),
        ("s = torch.cuda.get_rng_state_all()\ntorch.cuda.set_rng_state_all(s)\nlen(s) == torch.cuda.device_count()",),
        ("torch.cuda.get_rng_state(device=0).device.type", "cpu"),
        ("torch.cuda.get_rng_state().dtype == torch.uint8",),
        ("torch.cuda.init()\nlen(torch.cuda.default_generators) == torch.cuda.device_count()",),
        (
            "torch.cuda.init()\ntorch.cuda.default_generators[torch.cuda.current_device()].manual_seed(3).initial_seed()",
            3,
        ),
        ("from torch.cuda import default_generators\ntorch.cuda.init()\nlen(default_generators) > 0",),
        (
            "seen = []\ntorch.cuda._lazy_call(lambda: seen.append(torch.cuda.default_generators[0].get_state().numel()))\n"
            "torch.cuda.init()\nseen[0] > 0",
        ),
        ("torch.Generator(device='cuda').manual_seed(1).device.index", 0),
        ("torch.Generator('cuda').device == torch.device('cuda:0')",),
        (
            "g = torch.Generator('cuda:0').manual_seed(1)\nisinstance(g, torch.Generator) and torch.randn(2, device='cuda', generator=g).is_cuda",
        ),
        ("torch.randperm(4, device='cuda', generator=torch.Generator(device='cuda')).sum().item()", 6),
        ("import pickle\ng = torch.Generator('cuda').manual_seed(9)\ng.get_state().numel() > 0",),
        (
            "a = torch.cuda.get_rng_state()\nwith torch.random.fork_rng():\n    torch.rand(3, device='cuda')\nbool((a == torch.cuda.get_rng_state()).all())",
        ),
        (
            "a = torch.cuda.get_rng_state()\nwith torch.random.fork_rng(devices=[0], device_type='cuda'):\n    torch.rand(3, device='cuda')\n"
            "bool((a == torch.cuda.get_rng_state()).all())",
        ),
        (
            "a = torch.cuda.get_rng_state()\nwith torch.random.fork_rng(devices=['cuda:0']):\n    torch.rand(3, device='cuda')\n"
            "bool((a == torch.cuda.get_rng_state()).all())",
        ),
        ("torch.cuda.seed_all()\ntorch.cuda.seed()", None),
    ),
]
