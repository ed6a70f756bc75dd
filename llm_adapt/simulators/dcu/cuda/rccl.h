// RCCL, the collectives of DTK, under the name that torch gives them on ROCm: nccl.
#pragma once
#include <torch/csrc/utils/pybind.h>

namespace llm_adapt::dcu {

// Adds ProcessGroupNCCL; torch._C._distributed_c10d must be there.
void bind_rccl(pybind11::module_& module);

}  // namespace llm_adapt::dcu
