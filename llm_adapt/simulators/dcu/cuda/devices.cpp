// Registration of the cuda device with c10: guard, memory and generators.
#include "devices.h"

#include <algorithm>
#include <vector>

#include "generator.h"

namespace llm_adapt::dcu {

namespace {

host::Fleet& writable_fleet() {
  static auto* const one = new host::Fleet{kCuda, "cuda", "HIP", "HIP error: "};
  return *one;
}

class PriorityGuard final : public host::Guard {
 public:
  using host::Guard::Guard;

  // The last bit of a stream's number is its priority; the default stream is 0.
  c10::Stream getNewStream(c10::Device device, int priority) const override {
    const c10::Stream made = host::Guard::getNewStream(device, priority);
    const int is_high = -std::clamp(priority, -1, 0);
    return c10::Stream(c10::Stream::UNSAFE, made.device(), made.id() * 2 + is_high);
  }
};

}  // namespace

const host::Fleet& fleet() {
  return writable_fleet();
}

const host::Guard& guard() {
  static const auto* const one = new PriorityGuard(fleet());
  return *one;
}

host::Memory& memory() {
  static auto* const one = new host::Memory(fleet());
  return *one;
}

c10::DeviceIndex current_device() {
  return guard().getDevice().index();
}

c10::Device whole(c10::Device device) {
  return whole(device.index());
}

c10::Device whole(c10::DeviceIndex index) {
  const c10::DeviceIndex found = index < 0 ? current_device() : index;
  fleet().check_index(found);
  return {kCuda, found};
}

at::Generator new_generator(c10::DeviceIndex index) {
  return at::make_generator<host::PhiloxGenerator>(kCuda, whole(index).index());
}

const at::Generator& default_generator(c10::DeviceIndex index) {
  static const auto* const all = [] {
    auto* const made = new std::vector<at::Generator>();
    for (c10::DeviceIndex each = 0; each < fleet().count; ++each) {
      made->push_back(new_generator(each));
    }
    return made;
  }();
  return all->at(whole(index).index());
}

int stream_priority(c10::StreamId id) {
  return -static_cast<int>(id & 1);
}

}  // namespace llm_adapt::dcu

// Called by Python once the library is loaded, before torch._C is: ATen keeps the answers to its first questions.
extern "C" __attribute__((visibility("default"))) void llm_adapt_dcu_register(int devices, double bytes_each) {
  using namespace llm_adapt::dcu;
  writable_fleet().count = static_cast<c10::DeviceIndex>(devices);
  writable_fleet().bytes_each = static_cast<size_t>(bytes_each);
  c10::impl::registerDeviceGuard(kCuda, &guard());
  c10::SetAllocator(kCuda, &memory());
}
