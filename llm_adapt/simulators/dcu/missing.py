"""Names of torch._C that a CUDA build has and the DCU simulator does not model: each raises, naming itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from llm_adapt.simulators.base import SimulatorError

__all__ = ["CLASSES", "FUNCTIONS", "class_that_raises", "function_that_raises"]

FUNCTIONS = (
    # streams and handles of other libraries
    "_cuda_getStreamFromExternal", "_cuda_getCurrentBlasHandle", "_cuda_getCurrentSolverHandle", "_cuda_sleep",
    "_cuda_getCublasWorkspaceSize", "_cuda_setCublasWorkspaceSize", "_cuda_getCublasLtWorkspaceSize",
    "_cuda_setCublasLtWorkspaceSize", "_cuda_resetCublasWorkspaceSize", "_cuda_resetCublasLtWorkspaceSize",
    # what is not public of the hardware and its software
    "_cuda_canDeviceAccessPeer", "_cuda_getCompiledVersion",
    # other processes
    "_cuda_ipc_collect",
    # memory: other allocators, pools, histories, statistics of pinned memory
    "_cuda_cudaHostAllocator", "_cuda_cudaCachingAllocator_raw_alloc", "_cuda_cudaCachingAllocator_raw_delete",
    "_cuda_cudaCachingAllocator_enable", "_cuda_beginAllocateToPool", "_cuda_beginAllocateCurrentThreadToPool",
    "_cuda_endAllocateToPool", "_cuda_beginAllocateCurrentStreamToPool", "_cuda_releasePool",
    "_cuda_checkPoolLiveAllocations", "_cuda_setCheckpointPoolState", "_cuda_getCheckpointState",
    "_cuda_hostMemoryStats", "_cuda_resetAccumulatedHostMemoryStats", "_cuda_resetPeakHostMemoryStats",
    "_cuda_memorySnapshot", "_cuda_setMemoryMetadata", "_cuda_getMemoryMetadata",
    "_cuda_record_memory_history_legacy", "_cuda_record_memory_history", "_cuda_allocationTraceback",
    "_cuda_attach_out_of_memory_observer", "_cuda_customAllocator", "_cuda_changeCurrentAllocator",
    "_cuda_getAllocator", "_cuda_getMemoryFraction", "_graph_pool_handle",
    # kernels compiled at run time, tuning of products
    "_cuda_jiterator_compile_and_launch_kernel", "_cuda_tunableop_enable", "_cuda_tunableop_tuning_enable",
    "_cuda_tunableop_tuning_is_enabled", "_cuda_tunableop_set_max_tuning_duration",
    "_cuda_tunableop_get_max_tuning_duration", "_cuda_tunableop_set_max_tuning_iterations",
    "_cuda_tunableop_get_max_tuning_iterations", "_cuda_tunableop_set_filename", "_cuda_tunableop_get_filename",
    "_cuda_tunableop_read_file", "_cuda_tunableop_get_results", "_cuda_tunableop_get_validators",
    "_cuda_tunableop_set_rotating_buffer_size", "_cuda_tunableop_get_rotating_buffer_size",
    "_cuda_tunableop_set_numerical_check_tolerances", "_cuda_record_untuned_enable",
    "_cuda_record_untuned_is_enabled",
    # collectives of one process over several devices
    "_nccl_unique_id", "_nccl_init_rank", "_nccl_reduce", "_nccl_all_reduce", "_nccl_broadcast", "_nccl_all_gather",
    "_nccl_reduce_scatter", "_broadcast", "_broadcast_out", "_broadcast_coalesced", "_scatter", "_scatter_out",
    "_gather", "_gather_out",
)  # fmt: skip

CLASSES = {
    "_CUDAGraph": "torch.cuda.CUDAGraph",
    "_MemPool": "torch.cuda.MemPool",
    "_cuda_CUDAAllocator": "torch.cuda.memory.CUDAPluggableAllocator",
    "_cuda_CUDAAllocator_AllocatorState": "a saved state of the allocator",
}


def function_that_raises(name: str, what: str = "") -> Callable[..., NoReturn]:
    """A function that raises SimulatorError with its own name."""
    asked = what or f"torch._C.{name}"

    def refuse(*arguments: Any, **keywords: Any) -> NoReturn:
        raise SimulatorError(f"{asked} was called; the DCU simulator does not model it.")

    refuse.__name__ = refuse.__qualname__ = name
    return refuse


def class_that_raises(name: str) -> type:
    """A class that can be derived from, and raises SimulatorError when it is made."""
    refuse = function_that_raises(name, CLASSES[name])
    return type(name, (), {"__new__": lambda cls, *arguments, **keywords: refuse()})
