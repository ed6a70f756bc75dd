// What the norms of libopapi.so share: y = x rstd gamma, rstd = 1 / sqrt(mean(x^2) + epsilon).
#pragma once
#include "opapi_dense.h"

namespace llm_adapt::opapi {

// The axes that gamma covers: the last ones.
inline std::vector<int64_t> normed_axes(const Tensor& gamma) {
  std::vector<int64_t> axes;
  for (int64_t axis = -gamma.dim(); axis < 0; ++axis) axes.push_back(axis);
  return axes;
}

// A statistic with the normed axes kept as 1, whatever rank it was stored with.
inline Tensor as_statistic(const Tensor& statistic, const Tensor& x, const Tensor& gamma) {
  std::vector<int64_t> sizes = x.sizes().vec();
  for (int64_t axis : normed_axes(gamma)) sizes[sizes.size() + axis] = 1;
  return wide(statistic).reshape(sizes);
}

// Sum over the axes that gamma does not cover.
inline Tensor sum_to(const Tensor& gamma, const Tensor& tensor) { return at::sum_to(tensor, gamma.sizes()); }

inline Tensor rms_rstd(const Tensor& wide_x, const Tensor& gamma, double epsilon) {
  return at::rsqrt(wide_x.square().mean(normed_axes(gamma), true) + epsilon);
}

inline void check_gamma_shape(const Tensor& x, const Tensor& gamma, const char* name = "gamma") {
  check(gamma.dim() >= 1 && gamma.dim() <= x.dim() && gamma.sizes() == x.sizes().slice(x.dim() - gamma.dim()), name,
        " must have the trailing axes of x ", x.sizes(), ", not the shape ", gamma.sizes());
}

}  // namespace llm_adapt::opapi
