// Operators of the simulated devices, and what the facts on DTK say that they refuse.
#pragma once

#include "device.h"

namespace llm_adapt::dcu {

host::HostDevice& device();


// has_fp8_matmul: torch._scaled_mm, which gfx936 lacks. has_bfloat16: where nothing public says so, it is refused.
// has_flash_attn: the package that DTK's attention loads.
void set_limits(bool has_fp8_matmul, bool has_bfloat16, bool has_flash_attn);

// Gives every aten operator that has a CPU kernel the same kernel on the device. Once; returns how many.
int register_kernels();

void resize_storage(const c10::Storage& storage, std::size_t bytes);

}  // namespace llm_adapt::dcu
