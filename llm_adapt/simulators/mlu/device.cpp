// Registration of the mlu device with torch: devices, memory, guard, hooks and generators.
#include "mlu.h"

#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <sstream>

#include "generator.h"
#include "guard.h"
#include "pinned.h"

namespace llm_adapt::mlu {
namespace {

constexpr int kMostDevices = 16;  // MLU_DEVICE_NUM_MAX of torch_mlu

double number(const char* variable, double otherwise) {
  const char* text = std::getenv(variable);
  if (text == nullptr || *text == '\0') {
    return otherwise;
  }
  char* end = nullptr;
  const double value = std::strtod(text, &end);
  TORCH_CHECK_VALUE(*end == '\0' && value >= 0, variable, " is a number, not '", text, "'.");
  return value;
}

// torch_mlu obeys the first of the three that is set.
const char* visible_devices() {
  for (const char* variable : {"CN_VISIBLE_DEVICES", "MLU_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES"}) {
    if (const char* mask = std::getenv(variable)) {
      return mask;
    }
  }
  return nullptr;
}

int count_visible(int there) {
  const char* mask = visible_devices();
  if (mask == nullptr) {
    return there;
  }
  int visible = 0;
  std::istringstream parts(mask);
  for (std::string part; std::getline(parts, part, ',');) {
    char* end = nullptr;
    const long index = std::strtol(part.c_str(), &end, 10);
    TORCH_CHECK_NOT_IMPLEMENTED(
        end != part.c_str() && *end == '\0', "The MLU simulator hides devices by number, not by '", part, "'.");
    if (index < 0 || index >= there) {
      break;
    }
    ++visible;
  }
  return visible;
}

host::Fleet read_fleet() {
  const double there = number("MLU_SIM_DEVICES", 8);
  TORCH_CHECK_VALUE(there <= kMostDevices, "torch_mlu has up to 16 devices; MLU_SIM_DEVICES asks for ", there, ".");
  const double gib = number("MLU_SIM_MEMORY_GB", 94.8);
  host::Fleet fleet{kDevice, "mlu", "MLU", "CNRT error: "};
  fleet.count = static_cast<c10::DeviceIndex>(count_visible(static_cast<int>(there)));
  fleet.bytes_each = static_cast<size_t>(gib * 1024 * 1024 * 1024);
  return fleet;
}

std::vector<at::Generator>& generators() {
  static auto* made = [] {
    auto* list = new std::vector<at::Generator>;
    for (c10::DeviceIndex index = 0; index < fleet().count; ++index) {
      list->push_back(at::make_generator<host::PhiloxGenerator>(kDevice, index));
    }
    return list;
  }();
  return *made;
}

class Hooks final : public at::PrivateUse1HooksInterface {
 public:
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return fleet().count > 0; }
  bool hasPrimaryContext(c10::DeviceIndex index) const override { return index >= 0 && index < fleet().count; }
  c10::DeviceIndex deviceCount() const override { return fleet().count; }
  c10::DeviceIndex getCurrentDevice() const override { return guard().getDevice().index(); }
  void setCurrentDevice(c10::DeviceIndex index) const override { guard().setDevice({kDevice, index}); }
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex index) const override {
    return guard().exchangeDevice({kDevice, index}).index();
  }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex index) const override { return exchangeDevice(index); }

  bool isPinnedPtr(const void* data) const override { return host::PinnedMemory::instance().owns(data); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &host::PinnedMemory::instance(); }
  c10::Device getDeviceFromPtr(void* data) const override {
    auto owner = memory().owner_of(data);
    TORCH_CHECK(owner.has_value(), "The address belongs to no MLU.");
    return {kDevice, *owner};
  }

  const at::Generator& getDefaultGenerator(c10::DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(c10::DeviceIndex index) const override {
    return at::make_generator<host::PhiloxGenerator>(kDevice, index < 0 ? getCurrentDevice() : index);
  }

  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    c10::OptionalDeviceGuard on(storage.device());
    c10::DataPtr fresh = memory().allocate(bytes);
    const size_t kept = std::min(bytes, storage.nbytes());
    if (kept > 0) {
      std::memcpy(fresh.get(), storage.data(), kept);
    }
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }

 private:
  static const c10::impl::DeviceGuardImplInterface& guard() { return *c10::impl::getDeviceGuardImpl(kDevice); }
};

}  // namespace

const host::Fleet& fleet() {
  static const auto* one = new host::Fleet(read_fleet());
  return *one;
}

host::Memory& memory() {
  static auto* one = new host::Memory(fleet());
  return *one;
}

int major_capability() {
  static const int major = static_cast<int>(number("MLU_SIM_MAJOR", 5));
  return major;
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  const c10::DeviceIndex which =
      index < 0 ? c10::impl::getDeviceGuardImpl(kDevice)->getDevice().index() : index;
  fleet().check_index(which);
  return generators()[which];
}

// Called once, by the extension module: a bad variable must raise there, not while libraries load.
void register_device() {
  static c10::impl::DeviceGuardImplRegistrar guard(kDevice, new host::Guard(fleet()));
  c10::SetAllocator(kDevice, &memory());
  at::RegisterPrivateUse1HooksInterface(new Hooks);
}

}  // namespace llm_adapt::mlu
