// Element-wise reductions over the contributions of all ranks, in the order of the ranks.
#pragma once
#include <vector>

#include "hccl_call.h"

namespace llm_adapt::hccl {

// out[i] = in[0][i] op in[1][i] op ..., from the left: the same bits whichever rank computes it.
// 16-bit floats are accumulated in float32 and rounded once. A NaN wins in max and min. Integers wrap.
// `out` may be one of `in`.
void reduce(void* out, const std::vector<const char*>& in, size_t count, HcclDataType dtype, HcclReduceOp reduction);

}  // namespace llm_adapt::hccl
