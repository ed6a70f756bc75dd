// aclnn gated units: one half of x along an axis, activated, times the other half.
//
// Sources: op-plugin documents of npu_swiglu, npu_geglu, npu_gelu_mul and npu_clipped_swiglu, CANN ops-nn documents
// of the aclnn functions.
#include "opapi_dense.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;
using llm_adapt::family;

namespace {

void check_halves(const Tensor& x, int64_t dim) {
  check_floating(x, "x");
  check_rank(x, "x", 1, 8);
  check(-x.dim() <= dim && dim < x.dim(), "dim ", dim, " is not an axis of x ", x.sizes());
  check(x.size(dim) % 2 == 0, "axis ", dim, " of x must be even, it is ", x.size(dim));
}

void check_gradient(const Tensor& dy, const Tensor& x, int64_t dim) {
  check_halves(x, dim);
  check_same_dtype(x, "x", dy, "dy");
  std::vector<int64_t> expected = x.sizes().vec();
  expected[dim < 0 ? dim + x.dim() : dim] /= 2;
  check(dy.sizes() == at::IntArrayRef(expected), "dy must have the shape ", at::IntArrayRef(expected), ", not ",
        dy.sizes());
}

// silu(first half) second half.
void swiglu(const Tensor& x, int64_t dim, const Tensor& y) {
  const std::vector<Tensor> halves = wide(x).chunk(2, dim);
  store(y, at::silu(halves[0]) * halves[1]);
}

void check_swiglu(const Tensor& x, int64_t dim, const Tensor&) {
  check_halves(x, dim);
  check(x.is_contiguous(), "x must be contiguous; its strides are ", x.strides());
}

void swiglu_grad(const Tensor& dy, const Tensor& x, int64_t dim, const Tensor& dx) {
  const std::vector<Tensor> halves = wide(x).chunk(2, dim);
  const Tensor dy_wide = wide(dy);
  const Tensor gate = at::sigmoid(halves[0]);
  const Tensor slope = gate * (1 + halves[0] * (1 - gate));
  store(dx, at::cat({dy_wide * slope * halves[1], dy_wide * gate * halves[0]}, dim));
}

void check_swiglu_grad(const Tensor& dy, const Tensor& x, int64_t dim, const Tensor&) { check_gradient(dy, x, dim); }

const char* form_of(int64_t approximate) { return approximate == 1 ? "tanh" : "none"; }

// Which half is activated: the first with activate_left, else the second.
void geglu(const Tensor& x, int64_t dim, int64_t approximate, bool activate_left, const Tensor& y,
           const Tensor& activated) {
  const std::vector<Tensor> halves = wide(x).chunk(2, dim);
  const Tensor gelu = at::gelu(halves[activate_left ? 0 : 1], form_of(approximate));
  store(y, gelu * halves[activate_left ? 1 : 0]);
  store(activated, gelu);
}

void check_geglu(const Tensor& x, int64_t dim, int64_t approximate, bool, const Tensor&, const Tensor&) {
  check_halves(x, dim);
  check(approximate == 0 || approximate == 1, "approximate must be 0 (erf) or 1 (tanh), not ", approximate);
}

void geglu_grad(const Tensor& dy, const Tensor& x, const Tensor& activated, int64_t dim, int64_t approximate,
                bool activate_left, const Tensor& dx) {
  const std::vector<Tensor> halves = wide(x).chunk(2, dim);
  const Tensor& gate = halves[activate_left ? 0 : 1];
  const Tensor& linear = halves[activate_left ? 1 : 0];
  const Tensor dy_wide = wide(dy);
  const Tensor d_gate = at::gelu_backward(dy_wide * linear, gate, form_of(approximate));
  const Tensor d_linear = dy_wide * wide(activated);
  store(dx, activate_left ? at::cat({d_gate, d_linear}, dim) : at::cat({d_linear, d_gate}, dim));
}

void check_geglu_grad(const Tensor& dy, const Tensor& x, const Tensor&, int64_t dim, int64_t approximate, bool,
                      const Tensor&) {
  check_gradient(dy, x, dim);
  check(family() != Family::k310P || approximate == 1, "the gradient has the tanh form alone on ",
        llm_adapt::soc_name());
}

void gelu_mul(const Tensor& x, const std::string& approximate, const Tensor& y) {
  const std::vector<Tensor> halves = wide(x).chunk(2, -1);
  store(y, at::gelu(halves[0], approximate.empty() ? "none" : approximate) * halves[1]);
}

void check_gelu_mul(const Tensor& x, const std::string& approximate, const Tensor&) {
  constexpr int64_t kWidest = 1024, kMostRows = 200000;
  check_floating(x, "x");
  check_rank(x, "x", 2, 8);
  const int64_t width = x.size(-1);
  check(width % 2 == 0 && width <= kWidest, "the last axis must be even and at most ", kWidest, ", not ", width);
  const int64_t rows = width == 0 ? 0 : x.numel() / width;
  check(rows <= kMostRows, "the other axes must have a product of at most ", kMostRows, ", not ", rows);
  check(approximate.empty() || approximate == "none" || approximate == "tanh", "approximate must be none or tanh, not ",
        approximate);
}

// Axes up to `dim` are rows, `dim` and the axes after it columns; rows beyond the sum of the groups stay unwritten.
void clipped_swiglu(const Tensor& x, const Tensor& groups, int64_t dim, double alpha, double limit, double bias,
                    bool interleaved, const Tensor& y) {
  const int64_t axis = dim < 0 ? dim + x.dim() : dim;
  int64_t rows = 1;
  for (int64_t before = 0; before < axis; ++before) rows *= x.size(before);
  const int64_t used = groups.defined() ? std::min(rows, groups.sum().item<int64_t>()) : rows;
  const Tensor columns = wide(x).reshape({rows, -1}).slice(0, 0, used);
  const int64_t half = columns.size(1) / 2;
  Tensor gate = interleaved ? columns.slice(1, 0, std::nullopt, 2) : columns.slice(1, 0, half);
  Tensor linear = interleaved ? columns.slice(1, 1, std::nullopt, 2) : columns.slice(1, half);
  gate = gate.clamp_max(limit);
  linear = linear.clamp(-limit, limit);
  const Tensor result = gate * at::sigmoid(gate * alpha) * (linear + bias);
  store(y.view({rows, half}).slice(0, 0, used), result);
}

void check_clipped_swiglu(const Tensor& x, const Tensor& groups, int64_t dim, double, double limit, double, bool,
                          const Tensor&) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  check_halves(x, dim);
  check(x.is_contiguous(), "x must be contiguous; its strides are ", x.strides());
  check(limit > 0, "limit must be positive, not ", limit);
  if (!groups.defined()) return;
  check(groups.dim() == 1 && groups.scalar_type() == at::kLong, "group_index must be int64 of one axis");
}

}  // namespace

ACLNN_CHECKED(aclnnSwiGlu, check_swiglu, swiglu, (const aclTensor* x, int64_t dim, const aclTensor* y), x, dim, y)
ACLNN_CHECKED(aclnnSwiGluGrad, check_swiglu_grad, swiglu_grad,
              (const aclTensor* dy, const aclTensor* x, int64_t dim, const aclTensor* dx), dy, x, dim, dx)
ACLNN_CHECKED(aclnnGeGluV3, check_geglu, geglu,
              (const aclTensor* x, int64_t dim, int64_t approximate, bool activate_left, const aclTensor* y,
               const aclTensor* activated),
              x, dim, approximate, activate_left, y, activated)
ACLNN_CHECKED(aclnnGeGluV3Backward, check_geglu_grad, geglu_grad,
              (const aclTensor* dy, const aclTensor* x, const aclTensor* activated, int64_t dim, int64_t approximate,
               bool activate_left, const aclTensor* dx),
              dy, x, activated, dim, approximate, activate_left, dx)
ACLNN_CHECKED(aclnnGeluMul, check_gelu_mul, gelu_mul, (const aclTensor* x, char* approximate, const aclTensor* y), x,
              approximate, y)
ACLNN_CHECKED(aclnnClippedSwiglu, check_clipped_swiglu, clipped_swiglu,
              (const aclTensor* x, const aclTensor* groups, int64_t dim, double alpha, double limit, double bias,
               bool interleaved, const aclTensor* y),
              x, groups, dim, alpha, limit, bias, interleaved, y)
