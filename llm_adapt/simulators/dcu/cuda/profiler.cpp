// What torch's profiler asks of a device: the time at which work was done, which here is the time of the call.
#include <torch/csrc/profiler/stubs/base.h>

#include <chrono>

#include "devices.h"

namespace llm_adapt::dcu {

namespace {

using torch::profiler::impl::ProfilerVoidEventStub;
using Clock = std::chrono::steady_clock;

class HostStubs final : public torch::profiler::impl::ProfilerStubs {
 public:
  void record(c10::DeviceIndex* device, ProfilerVoidEventStub* event, int64_t* cpu_ns) const override {
    if (device != nullptr) {
      *device = current_device();
    }
    const Clock::time_point now = Clock::now();
    *event = std::make_shared<Clock::time_point>(now);
    if (cpu_ns != nullptr) {
      *cpu_ns = std::chrono::duration_cast<std::chrono::nanoseconds>(now.time_since_epoch()).count();
    }
  }

  // In microseconds.
  float elapsed(const ProfilerVoidEventStub* first, const ProfilerVoidEventStub* second) const override {
    const auto& start = *static_cast<const Clock::time_point*>(first->get());
    const auto& end = *static_cast<const Clock::time_point*>(second->get());
    return std::chrono::duration<float, std::micro>(end - start).count();
  }

  void mark(const char* /*name*/) const override {}
  void rangePush(const char* /*name*/) const override {}
  void rangePop() const override {}

  bool enabled() const override {
    return true;
  }

  void onEachDevice(std::function<void(int)> act) const override {
    const c10::DeviceIndex before = current_device();
    for (c10::DeviceIndex device = 0; device < fleet().count; ++device) {
      guard().setDevice({kCuda, device});
      act(device);
    }
    guard().setDevice({kCuda, before});
  }

  void synchronize() const override {}
};

const bool g_registered = [] {
  torch::profiler::impl::registerCUDAMethods(new HostStubs());
  return true;
}();

}  // namespace
}  // namespace llm_adapt::dcu
