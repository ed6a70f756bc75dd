// Random numbers of a simulated device: the CPU's generator, seeded from the device's seed and Philox offset.
#pragma once
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>

#include <mutex>

#include "device.h"

namespace llm_adapt::host {

// One number of two: the CPU's generator keeps the low 32 bits of its seed.
inline uint64_t scramble(uint64_t seed, uint64_t offset) {
  uint64_t mixed = seed ^ (offset * 0xD6E8FEB86659FD93ull);
  for (int round = 0; round < 3; ++round) {
    mixed ^= mixed >> 32;
    mixed *= 0xD6E8FEB86659FD93ull;
  }
  return mixed ^ (mixed >> 32);
}

// Draw from the device's generator: a CPU generator that gives the same numbers for the same (seed, offset).
inline at::Generator draw(const HostDevice& device, const std::optional<at::Generator>& given, c10::Device where) {
  at::Generator generator =
      given && given->defined() ? *given : at::globalContext().defaultGenerator(where);
  TORCH_CHECK(
      generator.device().type() == device.type(), "Expected a '", device.name(),
      "' device type for generator but found '", generator.device().str(), "'");
  std::lock_guard<std::mutex> lock(generator.mutex());
  const uint64_t offset = generator.get_offset();
  generator.set_offset(offset + 4);  // a Philox offset is a multiple of 4
  return at::detail::createCPUGenerator(scramble(generator.current_seed(), offset));
}

// While it lives, operators without a generator argument take their numbers from `source`.
class DefaultGeneratorSwap {
 public:
  explicit DefaultGeneratorSwap(const at::Generator& source) : alone_(mutex()) {
    at::Generator target = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(target.mutex());
    saved_ = target.get_state();
    target.set_state(source.get_state());
  }

  ~DefaultGeneratorSwap() {
    at::Generator target = at::detail::getDefaultCPUGenerator();
    std::lock_guard<std::mutex> lock(target.mutex());
    target.set_state(saved_);
  }

 private:
  static std::recursive_mutex& mutex() {
    static std::recursive_mutex one;
    return one;
  }

  std::unique_lock<std::recursive_mutex> alone_;
  at::Tensor saved_;
};

}  // namespace llm_adapt::host
