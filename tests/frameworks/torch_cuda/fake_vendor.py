"""A vendor's torch plug-in that computes nothing and records what it is asked; written out as a package.

It registers the vendor's device type with torch, so that devices, backends and names can be translated to it
without the vendor's software. Nothing can be computed on it: an op says so, with the device it was asked for.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["write_plugin"]

_SOURCE = '''
"""Written by tests/frameworks/torch_cuda/fake_vendor.py."""
import types
import torch

torch.utils.rename_privateuse1_backend("NAME")
calls = []
npu_fusion_attention = npu_rotary_mul = None  # transformers imports them by name


def _recorded(name, answer=None):
    def function(device=None, *args):
        calls.append((name, device, *args))
        return answer
    function.__name__ = name
    return function


class Stream:
    def __init__(self, device=None, priority=0):
        self.device, self.priority, self.NAME_stream = device, priority, 77

    NAME_stream = 77  # as the type of a C attribute shows it


class ExternalStream(Stream):
    def __init__(self, stream_ptr, device=None):
        super().__init__(device)
        self.NAME_stream = stream_ptr


class Event:
    def __init__(self, enable_timing=False):
        self.enable_timing = enable_timing


class device:
    def __init__(self, device):
        self.device = device

    def __enter__(self):
        calls.append(("device", self.device))

    def __exit__(self, *exc):
        return None


class Graph:
    pass


def mem_get_info(device=None):
    calls.append(("mem_get_info", device))
    return (1, 2)


def get_device_properties(device=None):
    calls.append(("get_device_properties", device))
    return types.SimpleNamespace(name="Fake", major=None, minor=None, warp_size=None, multi_processor_count=20)


def start():
    calls.append(("start",))
    module.default_generators = tuple(torch.Generator() for _ in range(8))


def range_start(message):
    calls.append(("range_start", message))
    return 5


def can_device_access_peer(device, peer_device):
    calls.append(("can_device_access_peer", device, peer_device))
    return True


module = types.ModuleType("torch.NAME")
module.is_available = lambda: True
module.device_count = lambda: 8
module.current_device = lambda: 3
module.is_initialized = lambda: True
module.is_bf16_supported = lambda: True
module._is_in_bad_fork = lambda: False
module.manual_seed_all = lambda seed: calls.append(("manual_seed_all", seed))
module.memory = types.ModuleType("torch.NAME.memory")
module.memory._record_memory_history = lambda *args, **kwargs: calls.append(("history", args))
module.RANGES = types.SimpleNamespace(range_start=range_start)
for name in ("set_device", "synchronize", "get_device_name", "memory_allocated", "get_rng_state"):
    setattr(module, name, _recorded(name, name))
module.default_generators = ()  # empty until the device starts, and another object then
module._lazy_init = start
for item in (Stream, ExternalStream, Event, device, mem_get_info, get_device_properties, can_device_access_peer):
    setattr(module, item.__name__, item)
module.GRAPH = Graph
torch._register_device_module("NAME", module)
'''
_NAMES = {"npu": ("mstx", "NPUGraph"), "mlu": ("cnpx", "MLUGraph")}


def write_plugin(vendor: str, folder: Path) -> None:
    """Write the package torch_npu or torch_mlu into a folder that goes onto PYTHONPATH."""
    ranges, graph = _NAMES[vendor]
    source = _SOURCE.replace("NAME", vendor).replace("RANGES", ranges).replace("GRAPH", graph)
    package = folder / f"torch_{vendor}"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(source, encoding="utf-8")
    metadata = folder / f"torch_{vendor}-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch_{vendor}\nVersion: 2.13.0\n")
