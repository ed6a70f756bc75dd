// What the aclnn entry points of dense operators share.
#pragma once
#include <algorithm>

#include "opapi.h"

namespace llm_adapt::opapi {

// Write a result into the output that the caller allocated: rounds once, to the output's dtype, and never broadcasts.
inline void store(const Tensor& output, const Tensor& result) {
  TORCH_CHECK(output.sizes() == result.sizes(), "the caller gave an output of shape ", output.sizes(),
              " for a result of shape ", result.sizes());
  output.copy_(result);
}

inline void check_same_shape(const Tensor& first, const char* first_name, const Tensor& other, const char* name) {
  check(first.sizes() == other.sizes(), name, " must have the shape of ", first_name, ", ", first.sizes(), ", not ",
        other.sizes());
}

inline void check_same_dtype(const Tensor& first, const char* first_name, const Tensor& other, const char* name) {
  check(first.scalar_type() == other.scalar_type(), name, " must have the dtype of ", first_name, ", ",
        first.scalar_type(), ", not ", other.scalar_type());
}

inline void check_rank(const Tensor& tensor, const char* name, int64_t fewest, int64_t most) {
  check(fewest <= tensor.dim() && tensor.dim() <= most, name, " must have ", fewest, " to ", most, " axes, not ",
        tensor.dim());
}

inline bool is_one_of(at::ScalarType dtype, std::initializer_list<at::ScalarType> allowed) {
  return std::find(allowed.begin(), allowed.end(), dtype) != allowed.end();
}

// Atlas A1 and 310P: float16 and float32 alone.
inline bool is_older_chip() { return family() == Family::kA1 || family() == Family::k310P; }

inline void check_no_bfloat16_on_older_chip(const Tensor& tensor, const char* name) {
  check(!is_older_chip() || !tensor.defined() || tensor.scalar_type() != at::kBFloat16, name,
        " is bfloat16, which ", soc_name(), " does not support");
}

// float32, float16, and bfloat16 where the chip has it.
inline void check_floating(const Tensor& tensor, const char* name) {
  check(is_one_of(tensor.scalar_type(), {at::kFloat, at::kHalf, at::kBFloat16}), name,
        " must be float32, float16 or bfloat16, not ", tensor.scalar_type());
  check_no_bfloat16_on_older_chip(tensor, name);
}

inline void check_family(std::initializer_list<Family> allowed, const char* documented) {
  check(std::find(allowed.begin(), allowed.end(), family()) != allowed.end(), "is documented for ", documented,
        " alone; the simulated chip is ", soc_name());
}

// 310P: the last axis of what is normed has at least 32 bytes.
inline void check_last_axis_of_310p(const Tensor& tensor, const char* name) {
  if (family() != Family::k310P) return;
  const int64_t bytes = tensor.size(-1) * tensor.element_size();
  check(bytes >= 32, "the last axis of ", name, " must have at least 32 bytes on ", soc_name(), ", not ", bytes);
}

}  // namespace llm_adapt::opapi
