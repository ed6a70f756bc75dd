// A simulated device's generator: a seed and a Philox offset, with CUDA's state of 16 bytes.
#pragma once
#include <ATen/Functions.h>
#include <ATen/core/Generator.h>
#include <c10/core/GeneratorImpl.h>

#include <cstring>

#include "fleet.h"

namespace llm_adapt::host {

class PhiloxGenerator final : public c10::GeneratorImpl {
 public:
  PhiloxGenerator(c10::DeviceType type, c10::DeviceIndex index)
      : GeneratorImpl(
            c10::Device(type, index),
            c10::DispatchKeySet(c10::computeDispatchKey(std::nullopt, std::nullopt, type))) {}

  void set_current_seed(uint64_t seed) override {
    seed_ = seed;
    offset_ = 0;
  }
  void set_offset(uint64_t offset) override {
    TORCH_CHECK(offset % 4 == 0, "A Philox offset is a multiple of 4; ", offset, " was asked.");
    offset_ = offset;
  }
  uint64_t get_offset() const override { return offset_; }
  uint64_t current_seed() const override { return seed_; }
  uint64_t seed() override {
    set_current_seed(c10::detail::getNonDeterministicRandom());
    return seed_;
  }

  void set_state(const c10::TensorImpl& state) override {
    at::detail::check_rng_state(state);
    TORCH_CHECK(
        state.numel() == kStateBytes, "RNG state is wrong size: expected ", kStateBytes, " bytes, found ",
        state.numel());
    const auto* bytes = static_cast<const uint8_t*>(state.data());
    uint64_t seed = 0;
    uint64_t offset = 0;
    std::memcpy(&seed, bytes, sizeof(seed));
    std::memcpy(&offset, bytes + sizeof(seed), sizeof(offset));
    set_current_seed(seed);
    set_offset(offset);
  }

  c10::intrusive_ptr<c10::TensorImpl> get_state() const override {
    at::Tensor state = at::empty({kStateBytes}, at::TensorOptions().dtype(at::kByte).device(at::kCPU));
    auto* bytes = state.mutable_data_ptr<uint8_t>();
    std::memcpy(bytes, &seed_, sizeof(seed_));
    std::memcpy(bytes + sizeof(seed_), &offset_, sizeof(offset_));
    return state.getIntrusivePtr();
  }

 private:
  static constexpr int64_t kStateBytes = 16;

  PhiloxGenerator* clone_impl() const override {
    auto* copy = new PhiloxGenerator(device().type(), device().index());
    copy->set_current_seed(seed_);
    copy->set_offset(offset_);
    return copy;
  }

  uint64_t seed_ = c10::default_rng_seed_val;
  uint64_t offset_ = 0;
};

}  // namespace llm_adapt::host
