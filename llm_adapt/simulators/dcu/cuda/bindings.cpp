// The Python module under torch._C._cuda_*: plain functions, without opinions of their own.
#include "devices.h"
#include "operators.h"
#include "rccl.h"

#include <torch/csrc/utils/pybind.h>

#include <string>

namespace llm_adapt::dcu {

namespace {

namespace py = pybind11;
using c10::CachingAllocator::Stat;
using c10::CachingAllocator::StatArray;

py::dict as_dict(const Stat& stat) {
  py::dict parts;
  parts["current"] = stat.current;
  parts["peak"] = stat.peak;
  parts["allocated"] = stat.allocated;
  parts["freed"] = stat.freed;
  return parts;
}

py::dict as_dict(const StatArray& stats) {
  py::dict pools;
  pools["all"] = as_dict(stats[0]);
  pools["small_pool"] = as_dict(stats[1]);
  pools["large_pool"] = as_dict(stats[2]);
  return pools;
}

py::dict memory_stats(c10::DeviceIndex device) {
  const auto stats = memory().getDeviceStats(device);
  py::dict found;
  found["num_alloc_retries"] = stats.num_alloc_retries;
  found["num_ooms"] = stats.num_ooms;
  found["num_sync_all_streams"] = stats.num_sync_all_streams;
  found["num_device_alloc"] = stats.num_device_alloc;
  found["num_device_free"] = stats.num_device_free;
  found["max_split_size"] = stats.max_split_size;
  found["allocation"] = as_dict(stats.allocation);
  found["segment"] = as_dict(stats.segment);
  found["active"] = as_dict(stats.active);
  found["inactive_split"] = as_dict(stats.inactive_split);
  found["allocated_bytes"] = as_dict(stats.allocated_bytes);
  found["reserved_bytes"] = as_dict(stats.reserved_bytes);
  found["active_bytes"] = as_dict(stats.active_bytes);
  found["inactive_split_bytes"] = as_dict(stats.inactive_split_bytes);
  found["requested_bytes"] = as_dict(stats.requested_bytes);
  found["oversize_allocations"] = as_dict(stats.oversize_allocations);
  found["oversize_segments"] = as_dict(stats.oversize_segments);
  return found;
}

// stream_id, device_index, device_type: what torch.cuda.Stream is made of.
py::tuple parts_of(const c10::Stream& stream) {
  return py::make_tuple(
      stream.id(), static_cast<int>(stream.device_index()), static_cast<int>(stream.device_type()));
}

void bind_devices(py::module_& module) {
  module.def("device_count", [] { return static_cast<int>(fleet().count); });
  module.def("current_device", [] { return static_cast<int>(current_device()); });
  module.def("set_device", [](c10::DeviceIndex device) { guard().setDevice({kCuda, device}); });
  // dynamo tells functions by identity, so that the second is one of its own.
  for (const char* name : {"exchange_device", "maybe_exchange_device"}) {
    module.def(name, [](c10::DeviceIndex device) {
      return device < 0 ? -1 : static_cast<int>(guard().exchangeDevice({kCuda, device}).index());
    });
  }
}

void bind_streams(py::module_& module) {
  module.def("current_stream", [](c10::DeviceIndex device) { return parts_of(guard().getStream(whole(device))); });
  module.def("default_stream", [](c10::DeviceIndex device) {
    return parts_of(guard().getDefaultStream(whole(device)));
  });
  module.def("new_stream", [](c10::DeviceIndex device, int priority) {
    return parts_of(guard().getNewStream(whole(device), priority));
  });
  // As THCPModule_setStream_wrap: the stream's device becomes the current one.
  module.def("set_stream", [](c10::StreamId id, c10::DeviceIndex device) {
    const c10::Device where = whole(device);
    guard().setDevice(where);
    guard().exchangeStream(c10::Stream(c10::Stream::UNSAFE, where, id));
  });
  module.def("stream_priority", &stream_priority);
  // An event's id is the address that the guard gave it; 0 before it is recorded.
  module.def("elapsed_ms", [](std::intptr_t start, std::intptr_t end) {
    return guard().elapsedTime(reinterpret_cast<void*>(start), reinterpret_cast<void*>(end), current_device());
  });
}

void bind_memory(py::module_& module) {
  module.def("memory_stats", &memory_stats);
  module.def("reset_peak", [](c10::DeviceIndex device) { memory().resetPeakStats(device); });
  module.def("reset_accumulated", [](c10::DeviceIndex device) { memory().resetAccumulatedStats(device); });
  module.def("empty_cache", [] { memory().emptyCache(); });
  module.def("memory_info", [](c10::DeviceIndex device) { return memory().getMemoryInfo(device); });
  module.def("set_memory_fraction", [](double fraction, c10::DeviceIndex device) {
    memory().set_fraction(device, fraction);
  });
}

void bind_kernels(py::module_& module) {
  module.def("set_limits", &set_limits);
  module.def("register_kernels", &register_kernels);
  module.def("resize_storage", [](const at::Tensor& whole, std::size_t bytes) {
    resize_storage(whole.storage(), bytes);
  });
}

void bind_random(py::module_& module) {
  module.def("default_generator", [](c10::DeviceIndex device) { return default_generator(device); });
}

}  // namespace

void bind(py::module_& module) {
  bind_devices(module);
  bind_streams(module);
  bind_memory(module);
  bind_random(module);
  bind_kernels(module);
  module.def("bind_rccl", [module]() mutable { bind_rccl(module); });
}

}  // namespace llm_adapt::dcu

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  llm_adapt::dcu::bind(module);
}
