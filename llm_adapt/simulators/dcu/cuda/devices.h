// The simulated cuda devices of this process, over the shared parts of all simulators.
#pragma once
#include <ATen/core/Generator.h>

#include "fleet.h"
#include "guard.h"
#include "memory.h"

namespace llm_adapt::dcu {

inline constexpr c10::DeviceType kCuda = c10::DeviceType::CUDA;

const host::Fleet& fleet();
const host::Guard& guard();
host::Memory& memory();

c10::DeviceIndex current_device();
// The device itself, or the current one where its index is open. Raises for an ordinal that does not exist.
c10::Device whole(c10::Device device);
c10::Device whole(c10::DeviceIndex index);

const at::Generator& default_generator(c10::DeviceIndex index);
at::Generator new_generator(c10::DeviceIndex index);

// Priority of a stream that the guard made: 0, or -1 for a high one; others are clamped.
int stream_priority(c10::StreamId id);

}  // namespace llm_adapt::dcu
