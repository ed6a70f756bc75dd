// What ATen asks a CUDA build for; answered as a ROCm build answers.
#include <ATen/detail/CUDAHooksInterface.h>

#include "devices.h"
#include "pinned.h"

namespace llm_adapt::dcu {

namespace {

// ATen looks for its hooks by this name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs /*unused*/) {}

  void init() const override {}

  bool isBuilt() const override {
    return true;
  }

  bool isAvailable() const override {
    return fleet().count > 0;
  }

  bool hasCUDA() const override {
    return fleet().count > 0;
  }

  bool hasCUDART() const override {
    return true;
  }

  bool hasROCM() const override {
    return true;
  }

  bool hasPrimaryContext(c10::DeviceIndex device) const override {
    return device >= 0 && device < fleet().count;
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex device) const override {
    return default_generator(device);
  }

  at::Generator getNewGenerator(c10::DeviceIndex device) const override {
    return new_generator(device);
  }

  c10::Device getDeviceFromPtr(void* data) const override {
    const auto owner = memory().owner_of(data);
    TORCH_CHECK(owner.has_value(), "The address belongs to no simulated device.");
    return {kCuda, *owner};
  }

  bool isPinnedPtr(const void* data) const override {
    return host::PinnedMemory::instance().owns(data);
  }

  c10::Allocator* getPinnedMemoryAllocator() const override {
    return &host::PinnedMemory::instance();
  }

  c10::Allocator* getCUDADeviceAllocator() const override {
    return &memory();
  }

  c10::DeviceIndex current_device() const override {
    return dcu::current_device();
  }

  c10::DeviceIndex deviceCount() const override {
    return fleet().count;
  }

  int getNumGPUs() const override {
    return fleet().count;
  }

  c10::DeviceIndex getCurrentDevice() const override {
    return dcu::current_device();
  }

  void setCurrentDevice(c10::DeviceIndex device) const override {
    guard().setDevice({kCuda, device});
  }

  c10::DeviceIndex exchangeDevice(c10::DeviceIndex device) const override {
    return device < 0 ? -1 : guard().exchangeDevice({kCuda, device}).index();
  }

  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex device) const override {
    return exchangeDevice(device);
  }

  void deviceSynchronize(c10::DeviceIndex /*device*/) const override {}

  std::string showConfig() const override {
    return "  - Hygon DCU simulator of llm_adapt, on host memory\n";
  }
};

using at::CUDAHooksArgs;
using at::CUDAHooksInterface;
using at::CUDAHooksRegistry;
using at::RegistererCUDAHooksRegistry;
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, CUDAHooks)

}  // namespace
}  // namespace llm_adapt::dcu
