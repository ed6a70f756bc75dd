// aclnn RMS norms: aclnnRmsNorm and its gradient, and those that add first, add one to gamma or also cast.
//
// Sources of the limits: op-plugin documents of npu_rms_norm, npu_add_rms_norm, npu_gemma_rms_norm,
// npu_add_rms_norm_cast; CANN ops-nn documents of the aclnn functions.
#include "opapi_legacy.h"
#include "opapi_norms.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;
using llm_adapt::family;

namespace {

void rms_norm(const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& y, const Tensor& rstd) {
  const Tensor x_wide = wide(x);
  const Tensor inverse = rms_rstd(x_wide, gamma, epsilon);
  store(y, x_wide * inverse * wide(gamma));
  store(rstd, inverse.reshape(rstd.sizes()));
}

// gamma of the dtype of x, or of float32 on chips with bfloat16.
void check_types(const Tensor& x, const Tensor& gamma) {
  check_floating(x, "x");
  const bool same = gamma.scalar_type() == x.scalar_type();
  const bool wider = gamma.scalar_type() == at::kFloat && !is_older_chip();
  check(same || wider, "gamma of ", gamma.scalar_type(), " does not go with x of ", x.scalar_type(), " on ",
        llm_adapt::soc_name());
}

void check_rms_norm(const Tensor& x, const Tensor& gamma, double, const Tensor& y, const Tensor&) {
  check_types(x, gamma);
  check_rank(x, "x", 2, 8);
  check_gamma_shape(x, gamma);
  check_last_axis_of_310p(x, "x");
  check_same_dtype(x, "x", y, "y");
}

void rms_norm_grad(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& gamma, const Tensor& dx,
                   const Tensor& dgamma) {
  const Tensor inverse = as_statistic(rstd, x, gamma);
  const Tensor normed = wide(x) * inverse;
  const Tensor dy_wide = wide(dy);
  const Tensor scaled = dy_wide * wide(gamma);
  store(dx, inverse * (scaled - normed * (scaled * normed).mean(normed_axes(gamma), true)));
  store(dgamma, sum_to(gamma, dy_wide * normed));
}

void check_rms_norm_grad(const Tensor& dy, const Tensor& x, const Tensor& rstd, const Tensor& gamma, const Tensor&,
                         const Tensor&) {
  check_types(x, gamma);
  check_same_dtype(x, "x", dy, "dy");
  check_same_shape(x, "x", dy, "dy");
  check_gamma_shape(x, gamma);
  check_last_axis_of_310p(x, "x");
  check(rstd.scalar_type() == at::kFloat, "rstd must be float32, not ", rstd.scalar_type());
}

// The same on chips with jit_compile.
const LegacyOperator legacy_rms_norm("RmsNorm", [](const LegacyArguments& given) {
  const Tensors &in = given.inputs, &out = given.outputs;
  const double epsilon = given.attribute<double>("epsilon");
  check_rms_norm(in[0], in[1], epsilon, out[0], out[1]);
  rms_norm(in[0], in[1], epsilon, out[0], out[1]);
});
const LegacyOperator legacy_rms_norm_grad("RmsNormGrad", [](const LegacyArguments& given) {
  const Tensors &in = given.inputs, &out = given.outputs;
  check_rms_norm_grad(in[0], in[1], in[2], in[3], out[0], out[1]);
  rms_norm_grad(in[0], in[1], in[2], in[3], out[0], out[1]);
});

// The sum is normed before it is rounded to the dtype of x.
struct Sum {
  Tensor x, rstd, y;
};
Sum add_and_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon) {
  const Tensor x = wide(x1) + wide(x2);
  const Tensor inverse = rms_rstd(x, gamma, epsilon);
  return {x, inverse, x * inverse * wide(gamma)};
}

// The 310P gives no valid rstd: whoever uses it there shall notice.
void store_rstd(const Tensor& rstd, const Tensor& inverse) {
  store(rstd, inverse.reshape(rstd.sizes()));
  if (family() == Family::k310P) rstd.fill_(std::numeric_limits<float>::quiet_NaN());
}

void add_rms_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon, const Tensor& y,
                  const Tensor& rstd, const Tensor& x) {
  const Sum sum = add_and_norm(x1, x2, gamma, epsilon);
  store(y, sum.y);
  store_rstd(rstd, sum.rstd);
  store(x, sum.x);
}

void check_sum(const Tensor& x1, const Tensor& x2, const Tensor& gamma) {
  check_family({Family::k310P, Family::kA2, Family::kA3, Family::kA5}, "Atlas 310P, A2, A3 and Ascend 950");
  check_floating(x1, "x1");
  check_same_dtype(x1, "x1", x2, "x2");
  check_same_dtype(x1, "x1", gamma, "gamma");
  check_same_shape(x1, "x1", x2, "x2");
  check_rank(x1, "x1", 1, 8);
  check_gamma_shape(x1, gamma);
  check(x1.numel() > 0, "empty tensors are not supported, x1 has the shape ", x1.sizes());
}

void check_add_rms_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double, const Tensor&, const Tensor&,
                        const Tensor&) {
  check_sum(x1, x2, gamma);
}

const LegacyOperator legacy_add_rms_norm("AddRmsNorm", [](const LegacyArguments& given) {
  const Tensors &in = given.inputs, &out = given.outputs;
  const double epsilon = given.attribute<double>("epsilon");
  check_add_rms_norm(in[0], in[1], in[2], epsilon, out[0], out[1], out[2]);
  add_rms_norm(in[0], in[1], in[2], epsilon, out[0], out[1], out[2]);
});

// x1 becomes y, x2 becomes the sum.
void add_rms_norm_inplace(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon, const Tensor& rstd) {
  add_rms_norm(x1, x2, gamma, epsilon, x1, rstd, x2);
}

void check_add_rms_norm_inplace(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double, const Tensor&) {
  check_sum(x1, x2, gamma);
  check(x1.is_contiguous() && x2.is_contiguous(), "x1 and x2 must be contiguous");
}

void add_rms_norm_cast(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double epsilon, const Tensor& y_float,
                       const Tensor& y, const Tensor& rstd, const Tensor& x) {
  const Sum sum = add_and_norm(x1, x2, gamma, epsilon);
  store(y_float, sum.y);
  store(y, sum.y);
  store(rstd, sum.rstd.reshape(rstd.sizes()));
  store(x, sum.x);
}

void check_add_rms_norm_cast(const Tensor& x1, const Tensor& x2, const Tensor& gamma, double, const Tensor&,
                             const Tensor&, const Tensor&, const Tensor&) {
  check_sum(x1, x2, gamma);
  check(is_one_of(x1.scalar_type(), {at::kHalf, at::kBFloat16}), "x1 must be float16 or bfloat16, not ",
        x1.scalar_type());
  check_family({Family::kA2, Family::kA3, Family::kA5}, "Atlas A2, A3 and Ascend 950");
}

void gemma_rms_norm(const Tensor& x, const Tensor& gamma, double epsilon, const Tensor& y, const Tensor& rstd) {
  rms_norm(x, wide(gamma) + 1, epsilon, y, rstd);
}

void check_gemma_rms_norm(const Tensor& x, const Tensor& gamma, double, const Tensor&, const Tensor&) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  check_floating(x, "x");
  check_same_dtype(x, "x", gamma, "gamma");
  check_rank(x, "x", 1, 8);
  check_gamma_shape(x, gamma);
}

}  // namespace

ACLNN_CHECKED(aclnnRmsNorm, check_rms_norm, rms_norm,
              (const aclTensor* x, const aclTensor* gamma, double epsilon, const aclTensor* y, const aclTensor* rstd),
              x, gamma, epsilon, y, rstd)
ACLNN_CHECKED(aclnnRmsNormGrad, check_rms_norm_grad, rms_norm_grad,
              (const aclTensor* dy, const aclTensor* x, const aclTensor* rstd, const aclTensor* gamma,
               const aclTensor* dx, const aclTensor* dgamma),
              dy, x, rstd, gamma, dx, dgamma)
ACLNN_CHECKED(aclnnAddRmsNorm, check_add_rms_norm, add_rms_norm,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, double epsilon, const aclTensor* y,
               const aclTensor* rstd, const aclTensor* x),
              x1, x2, gamma, epsilon, y, rstd, x)
ACLNN_CHECKED(aclnnInplaceAddRmsNorm, check_add_rms_norm_inplace, add_rms_norm_inplace,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, double epsilon, const aclTensor* rstd),
              x1, x2, gamma, epsilon, rstd)
ACLNN_CHECKED(aclnnAddRmsNormCast, check_add_rms_norm_cast, add_rms_norm_cast,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, double epsilon,
               const aclTensor* y_float, const aclTensor* y, const aclTensor* rstd, const aclTensor* x),
              x1, x2, gamma, epsilon, y_float, y, rstd, x)
ACLNN_CHECKED(aclnnGemmaRmsNorm, check_gemma_rms_norm, gemma_rms_norm,
              (const aclTensor* x, const aclTensor* gamma, double epsilon, const aclTensor* y, const aclTensor* rstd),
              x, gamma, epsilon, y, rstd)
