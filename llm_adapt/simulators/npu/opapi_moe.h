// What the aclnn entry points of mixture-of-experts, grouped and quantised operators share.
//
// T tokens, H columns of a token, E experts, K experts of each token; a pair is a token and one of its experts,
// and pairs are counted by token: pair i belongs to token i / K.
#pragma once
#include <algorithm>

#include "opapi_dense.h"

namespace llm_adapt::opapi {

inline void check_rank(const Tensor& tensor, const char* name, int64_t rank) {
  check(tensor.dim() == rank, name, " must have ", rank, " dimensions, not shape ", tensor.sizes());
}

inline void check_dtype(const Tensor& tensor, const char* name, std::initializer_list<at::ScalarType> allowed) {
  std::ostringstream names;
  for (at::ScalarType one : allowed) names << (names.tellp() > 0 ? ", " : "") << one;
  check(is_one_of(tensor.scalar_type(), allowed), name, " must be ", names.str(), ", not ", tensor.scalar_type());
}

// Refuse a chip that the document of an operator does not list.
inline void check_chip(std::initializer_list<Family> documented) {
  const bool listed = std::find(documented.begin(), documented.end(), family()) != documented.end();
  check(listed, "is not supported on ", soc_name());
}

inline void check_not_padded(bool padded, const char* name) {
  check(!padded, name, "=True is not modelled: its order of tokens is not documented");
}

// Indices pass through float32 in the real kernels, which is exact below 2 ** 24 - 1.
constexpr int64_t kExactInFloat = 16777215;

// Each expert's rows are a range; the counts, or their cumulative sum, lie on the device.
inline std::vector<int64_t> group_ends(const Tensor& group_list, bool are_counts) {
  const Tensor ends = (are_counts ? group_list.cumsum(0) : group_list).to(at::kLong).contiguous();
  const int64_t* first = ends.const_data_ptr<int64_t>();
  std::vector<int64_t> found(first, first + ends.numel());
  int64_t previous = 0;
  for (int64_t end : found) {
    check(end >= previous, "group_list must not decrease: ", end, " comes after ", previous);
    previous = end;
  }
  return found;
}

}  // namespace llm_adapt::opapi
