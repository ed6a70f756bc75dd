// The simulated MLUs: how many of which model, their memory, their generators.
#pragma once
#include <ATen/core/Generator.h>

#include <string>
#include <vector>

#include "device.h"
#include "fleet.h"
#include "memory.h"

namespace llm_adapt::mlu {

constexpr auto kDevice = c10::DeviceType::PrivateUse1;

// Read once from MLU_SIM_DEVICES, MLU_SIM_MEMORY_GB and the variables that hide devices.
const host::Fleet& fleet();
host::Memory& memory();
host::HostDevice& device();

// First number of the compute capability (MLU_SIM_MAJOR).
int major_capability();

const at::Generator& default_generator(c10::DeviceIndex index);

}  // namespace llm_adapt::mlu
