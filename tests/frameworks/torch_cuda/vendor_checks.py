"""Checks of the facade on a vendor's device, run by test_vendor_translation.py in a process with a fake plug-in.

python vendor_checks.py npu     prints one JSON object: name of the check -> "" or the traceback
"""

from __future__ import annotations

import json
import pickle
import sys
import traceback
from types import ModuleType
from typing import Any

import llm_adapt

CHECKS: dict[str, Any] = {}
BACKENDS = {"npu": "hccl", "mlu": "cncl"}


def check(function: Any) -> Any:
    """Register a check; its docstring is the sentence of the specification."""
    CHECKS[function.__name__] = function
    return function


def raises(kind: type[BaseException], text: str, act: Any) -> None:
    """The act raises that kind of error, with that text in it."""
    try:
        act()
    except kind as error:
        assert text in str(error), f"{text!r} is not in {error}"  # noqa: PT017 - this file runs without pytest
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


@check
def devices(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """torch.device and integers name the vendor's ordinals, and an ordinal beyond the last is refused."""
    here = torch.device(vendor, 5)
    assert [torch.device(*args) for args in (("cuda:5",), ("cuda", 5), (5,), (f"{vendor}:5",))] == [here] * 4
    assert torch.device("cuda") == torch.device(vendor)
    assert isinstance(here, torch.device)
    assert pickle.loads(pickle.dumps(torch.device("cuda:1"))) == torch.device(vendor, 1)
    assert torch.get_device_module("cuda") is torch.cuda
    raises(llm_adapt.errors.DeviceError, "8 exist(s)", lambda: torch.device("cuda:8"))


@check
def factories(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """Factories, Tensor.to and Module.to ask for the vendor's device; the CPU stays the CPU, and does not copy."""
    for act in (
        lambda: torch.zeros(1, device="cuda"),
        lambda: torch.zeros(1, device=0),
        lambda: torch.ones(1).new_zeros(1, device="cuda:1"),
        lambda: torch.ones(1).to("cuda"),
        lambda: torch.ones(1).to(device="cuda:1", dtype=torch.float16),
        lambda: torch.ones(1).to(0),
        lambda: torch.ones(1).cuda(),
        lambda: torch.nn.Linear(1, 1).to("cuda"),
        lambda: torch.nn.Linear(1, 1, device="cuda"),
    ):
        raises((NotImplementedError, RuntimeError), vendor, act)
    x = torch.ones(1)
    assert x.to("cpu") is x
    assert x.cpu() is x
    assert not x.is_cuda
    assert x.type() == "torch.FloatTensor"
    assert x.get_device() == -1


@check
def selection(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """Functions of torch.cuda are the vendor's, with CUDA devices translated, however they are handed over."""
    place = torch.device(vendor, 2)
    torch.cuda.set_device("cuda:2")
    torch.cuda.synchronize(device=2)
    torch.cuda.memory.memory_allocated(torch.device("cuda:2"))
    torch.cuda.set_device(-1)
    torch.cuda.can_device_access_peer("cuda:2", peer_device=2)
    assert plugin.calls == [
        ("set_device", place),
        ("synchronize", place),
        ("memory_allocated", place),
        ("set_device", -1),
        ("can_device_access_peer", place, place),
    ]
    assert torch.cuda.device_count() == 8
    assert torch.cuda.current_device() == 3
    assert torch.cuda.get_device_capability(0) == llm_adapt.current_adapter().cuda_capability
    assert torch.cuda.cudart().cudaMemGetInfo(0) == (1, 2)


@check
def classes(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """Streams and device contexts are the vendor's own, made with translated devices."""
    stream = torch.cuda.Stream(device="cuda:2", priority=-1)
    assert type(stream) is plugin.Stream
    assert (stream.device, stream.priority) == (torch.device(vendor, 2), -1)
    assert isinstance(stream, torch.cuda.Stream)
    assert torch.cuda.Event is plugin.Event
    with torch.cuda.device(1):
        assert plugin.calls[-1] == ("device", torch.device(vendor, 1))
    assert type(torch.cuda.CUDAGraph()) is plugin.Graph


@check
def subclasses(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """torch.cuda.Stream is a subclass of what the vendor's is, and a script's subclass of it makes its own objects."""

    class Mine(torch.cuda.Stream):  # type: ignore[misc]
        pass

    assert issubclass(torch.cuda.Stream, plugin.Stream)
    assert issubclass(Mine, torch.cuda.Stream)
    assert type(Mine()) is Mine
    assert isinstance(Mine(), torch.cuda.Stream)
    assert not isinstance(torch.cuda.Stream(), Mine)
    assert {torch.cuda.Stream: 1}[plugin.Stream] == 1
    assert Mine not in {plugin.Stream: 1}


@check
def stream_handles(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A stream's cuda_stream is the vendor's handle, and a stream is found again by it."""
    assert torch.cuda.Stream().cuda_stream == 77
    assert torch.cuda.get_stream_from_external(5).cuda_stream == 5
    assert torch.cuda.get_stream_from_external(5, "cuda:2").device == torch.device(vendor, 2)


@check
def generic_queues(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """torch.Stream and torch.Event of cuda ask for the vendor's device; they stay types that code can derive from."""
    raises((NotImplementedError, RuntimeError), vendor, lambda: torch.Stream("cuda"))
    raises((NotImplementedError, RuntimeError), vendor, lambda: torch.Stream(device="cuda:1"))
    raises((NotImplementedError, RuntimeError), vendor, lambda: torch.Event("cuda"))
    raises((NotImplementedError, RuntimeError), vendor, lambda: torch.Event(device="cuda:1"))
    assert issubclass(type("Mine", (torch.Event,), {}), torch.Event)


@check
def default_generators(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """The default generators start the device when they are looked into, also under a name imported before."""
    from torch.cuda import default_generators as early

    plugin.module.default_generators = ()
    assert plugin.calls == []
    assert early[3].initial_seed() == plugin.module.default_generators[3].initial_seed()
    assert plugin.calls == [("start",)]
    assert len(early) == len(torch.cuda.default_generators) == 8
    assert list(early) == list(plugin.module.default_generators)
    assert plugin.calls == [("start",)]


@check
def properties(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """The properties have the adapter's capability, and a field that the vendor leaves empty is missing, not None."""
    found = torch.cuda.get_device_properties("cuda:2")
    assert plugin.calls == [("get_device_properties", torch.device(vendor, 2))]
    assert (found.major, found.minor) == torch.cuda.get_device_capability()
    assert (found.name, found.multi_processor_count) == ("Fake", 20)
    assert not hasattr(found, "warp_size")
    raises(AttributeError, "warp_size was asked; Fake has none", lambda: found.warp_size)
    if vendor == "npu":
        assert torch.cuda.is_tf32_supported() is False


@check
def refusals(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A name of torch.cuda that the vendor lacks is refused with the way out; nothing is left to CUDA."""
    raises(NotImplementedError, "torch.cuda.MemPool was asked", lambda: torch.cuda.MemPool())
    raises(NotImplementedError, f"it is not in torch.{vendor}", lambda: torch.cuda.memory_summary())
    raises(NotImplementedError, "use torch.distributed", lambda: torch.cuda.nccl.version())
    raises(NotImplementedError, "it is not in torch", lambda: torch.cuda.stream(None))
    torch.cuda.memory._record_memory_history(max_entries=3)
    assert plugin.calls[-1] == ("history", ())


@check
def ranges(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """NVTX ranges are the vendor's where it has them, and accepted without effect where it has none."""
    assert torch.cuda.nvtx.range_start("a") == 5
    assert plugin.calls[-1] == ("range_start", "a")
    assert torch.cuda.nvtx.range_push("b") == 0


@check
def autocast(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """GradScaler and the functions of autocast's state name the vendor's device."""
    assert torch.amp.GradScaler("cuda", enabled=False)._device == vendor
    torch.set_autocast_enabled("cuda", True)
    assert torch.is_autocast_enabled(vendor)
    assert torch.is_autocast_enabled()
    torch.set_autocast_enabled(False)
    assert not torch.is_autocast_enabled(vendor)
    assert torch.cuda.amp.common.amp_definitely_not_available() is False


@check
def backends(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """nccl is the vendor's library, alone and in "cpu:gloo,cuda:nccl"; explicit other backends stay."""
    from llm_adapt.parallel.backends import translate_backend

    adapter, own = llm_adapt.current_adapter(), BACKENDS[vendor]
    assert translate_backend("nccl", adapter) == own
    assert translate_backend("cpu:gloo,cuda:nccl", adapter) == f"cpu:gloo,{vendor}:{own}"
    assert translate_backend("cuda:nccl,cpu:gloo", adapter) == f"cpu:gloo,{vendor}:{own}"
    assert translate_backend("gloo", adapter) == "gloo"
    assert translate_backend(None, adapter) is None
    assert torch.distributed.is_nccl_available()
    options = torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    options.config.max_ctas = 4


@check
def loading(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A checkpoint tagged by CUDA is brought to the vendor's ordinal of that number."""
    from torch.serialization import default_restore_location

    class Storage:
        def to(self, device: Any) -> Any:
            return device

    assert default_restore_location(Storage(), "cuda:2") == torch.device(vendor, 2)
    assert default_restore_location(Storage(), "cuda") == torch.device(vendor)


@check
def map_locations(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """map_location of CUDA code serves files that the vendor's device wrote: keys and functions know its tags."""
    import io

    from torch import serialization

    file, seen = io.BytesIO(), []
    original = serialization.location_tag
    serialization.location_tag = lambda storage: f"{vendor}:1"
    try:
        torch.save(torch.ones(2), file)
    finally:
        serialization.location_tag = original

    def place(storage: Any, tag: str) -> Any:
        seen.append(tag)
        return storage

    def load(location: Any) -> Any:
        file.seek(0)
        return torch.load(file, map_location=location)

    assert load(place).tolist() == load({"cuda:1": "cpu"}).tolist() == load({f"{vendor}:1": "cpu"}).tolist() == [1, 1]
    assert seen == ["cuda:1"]
    place.__module__ = "transformers.loading"  # a library that knows the device is told the truth
    load(place)
    assert seen == ["cuda:1", f"{vendor}:1"]


@check
def pinning(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """pin_memory and is_pinned translate the device that they are given."""
    for act in (lambda: torch.ones(1).pin_memory("cuda"), lambda: torch.ones(1).is_pinned(device="cuda")):
        try:
            act()
        except (NotImplementedError, RuntimeError) as error:
            assert "CUDA" not in str(error), error  # noqa: PT017 - this file runs without pytest


@check
def storages(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A storage in host memory is not on cuda, and the answer is the facade's."""
    assert not torch.ones(1).untyped_storage().is_cuda
    assert not torch.ones(1)._typed_storage().is_cuda


@check
def custom_ops(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A custom op whose kernel is registered for cuda has one for the vendor's device."""

    def double(x: Any) -> Any:
        return x * 2

    made = torch.library.custom_op(
        "llm_adapt_checks::twice", mutates_args=(), device_types="cuda", schema="(Tensor x) -> Tensor"
    )
    twice = made(double)
    assert list(twice._backend_fns) == [vendor]
    twice.register_kernel(["cpu", "cuda"])(double)
    assert set(twice._backend_fns) == {"cpu", vendor}
    assert twice(torch.ones(1)).item() == 2


@check
def backend_names(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """get_backend says nccl for the vendor's library, to code that knows only CUDA; gloo stays gloo."""
    import torch.distributed as dist

    def ask(module: str) -> str:
        return str(eval("dist.get_backend()", {"__name__": module, "dist": dist}))

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    assert ask("__main__") == "gloo"
    kept = dist.distributed_c10d._world.pg_map
    group = dist.group.WORLD
    store, kept[group] = kept[group], (BACKENDS[vendor], kept[group][1])
    assert ask("__main__") == ask("megatron.core") == dist.Backend.NCCL
    assert ask("torch.distributed.fsdp") == ask("deepspeed.comm") == BACKENDS[vendor]
    kept[group] = store
    dist.destroy_process_group()


@check
def told(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A script is told that CUDA is here; a library is told the truth exactly where it knows this vendor's device."""
    from llm_adapt.frameworks.torch_cuda.availability import native_packages

    def ask(module: str) -> Any:
        return eval("torch.cuda.is_available(), torch.cuda.device_count()", {"__name__": module, "torch": torch})

    assert ask("__main__") == ask("megatron.training") == ask("adam_mini") == (True, 8)
    native = native_packages(vendor)
    assert {"torch", f"torch_{vendor}", "accelerate", "deepspeed", "mmengine", "peft", "transformers"} <= native
    assert ("liger_kernel" in native) == (vendor == "npu")
    assert [name for name in native if ask(f"{name}.utils.device") != (False, 0)] == []


@check
def meshes(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """A device mesh of cuda is one of the vendor's device, over whatever backend the job runs."""
    import torch.distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    mesh = dist.init_device_mesh("cuda", (1,))
    assert mesh.device_type == vendor
    dist.destroy_process_group()


@check
def real_libraries(vendor: str, plugin: ModuleType, torch: Any) -> None:
    """accelerate, peft and transformers, where they are installed, choose the vendor's device."""
    try:
        import accelerate
        import peft
        import transformers
    except ModuleNotFoundError as error:
        raise SkipCheck(str(error)) from error
    assert accelerate.PartialState().device.type == vendor
    assert peft.utils.infer_device() == vendor
    assert not eval("torch.cuda.is_available()", {"__name__": transformers.__name__, "torch": torch})
    assert transformers.TrainingArguments(output_dir="unused", report_to=[]).device.type == vendor


class SkipCheck(Exception):
    """The check cannot be made here."""


def main(vendor: str, *names: str) -> None:
    """Patch for the vendor, run the checks, print their outcomes."""
    llm_adapt.patch(device=vendor, strict=True)
    import torch

    plugin = __import__(f"torch_{vendor}")
    outcomes: dict[str, str] = {}
    for name in names or CHECKS:
        plugin.calls.clear()
        try:
            CHECKS[name](vendor, plugin, torch)
            outcomes[name] = ""
        except SkipCheck as reason:
            outcomes[name] = f"skip: {reason}"
        except BaseException:  # noqa: BLE001 - the text of the failure is the outcome
            outcomes[name] = traceback.format_exc()
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main(*sys.argv[1:])
