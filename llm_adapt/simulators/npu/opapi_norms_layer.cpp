// aclnn layer norms of a sum: aclnnAddLayerNorm (x1 + x2) and aclnnDeepNorm (alpha x + gx), with their gradients.
//
// Sources: CANN ops-nn documents of the aclnn functions; op-plugin's tests of npu_add_layer_norm and npu_deep_norm.
#include "opapi_norms.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;

namespace {

struct Normed {
  Tensor mean, rstd, y;
};

Normed layer_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double epsilon) {
  const std::vector<int64_t> axes = normed_axes(gamma);
  const Tensor mean = x.mean(axes, true);
  const Tensor centered = x - mean;
  const Tensor rstd = at::rsqrt(centered.square().mean(axes, true) + epsilon);
  return {mean, rstd, centered * rstd * wide(gamma) + wide(beta)};
}

struct Gradients {
  Tensor dx, dgamma, dbeta;
};

Gradients layer_norm_grad(const Tensor& dy, const Tensor& x, const Tensor& mean, const Tensor& rstd,
                          const Tensor& gamma) {
  const std::vector<int64_t> axes = normed_axes(gamma);
  const Tensor inverse = as_statistic(rstd, x, gamma);
  const Tensor normed = (x - as_statistic(mean, x, gamma)) * inverse;
  const Tensor dy_wide = wide(dy);
  const Tensor scaled = dy_wide * wide(gamma);
  const Tensor along = scaled.mean(axes, true) + normed * (scaled * normed).mean(axes, true);
  return {inverse * (scaled - along), sum_to(gamma, dy_wide * normed), sum_to(gamma, dy_wide)};
}

void add_layer_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& beta, const Tensor& bias,
                    double epsilon, bool with_sum, const Tensor& y, const Tensor& mean, const Tensor& rstd,
                    const Tensor& x) {
  Tensor sum = wide(x1) + wide(x2);
  if (bias.defined()) sum = sum + wide(bias);
  const Normed normed = layer_norm(sum, gamma, beta, epsilon);
  store(y, normed.y);
  store(mean, normed.mean.reshape(mean.sizes()));
  store(rstd, normed.rstd.reshape(rstd.sizes()));
  if (with_sum) store(x, sum);
}

void check_add_layer_norm(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& beta, const Tensor&,
                          double, bool, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_floating(x1, "x1");
  check_floating(x2, "x2");
  check_same_shape(x1, "x1", x2, "x2");
  check_gamma_shape(x1, gamma);
  check_same_shape(gamma, "gamma", beta, "beta");
  check_same_dtype(gamma, "gamma", beta, "beta");
  check_last_axis_of_310p(x1, "x1");
  const at::ScalarType sum = x1.scalar_type() == x2.scalar_type() ? x1.scalar_type() : at::kFloat;
  const bool one_is_wide = sum != at::kFloat || x1.scalar_type() == at::kFloat || x2.scalar_type() == at::kFloat;
  check(one_is_wide, "x1 of ", x1.scalar_type(), " and x2 of ", x2.scalar_type(), " do not go together");
  const bool wider = gamma.scalar_type() == at::kFloat && !is_older_chip();
  check(gamma.scalar_type() == sum || wider, "gamma of ", gamma.scalar_type(), " does not go with a sum of ", sum);
}

void add_layer_norm_grad(const Tensor& dy, const Tensor& x1, const Tensor& x2, const Tensor& rstd, const Tensor& mean,
                         const Tensor& gamma, const Tensor& dsum, const Tensor& dx, const Tensor& dgamma,
                         const Tensor& dbeta) {
  const Gradients gradients = layer_norm_grad(dy, wide(x1) + wide(x2), mean, rstd, gamma);
  store(dx, dsum.defined() ? gradients.dx + wide(dsum) : gradients.dx);
  store(dgamma, gradients.dgamma);
  store(dbeta, gradients.dbeta);
}

void check_add_layer_norm_grad(const Tensor& dy, const Tensor& x1, const Tensor& x2, const Tensor&, const Tensor&,
                               const Tensor& gamma, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_floating(dy, "dy");
  check_same_shape(x1, "x1", dy, "dy");
  check_same_shape(x1, "x1", x2, "x2");
  check_gamma_shape(x1, gamma);
}

void deep_norm(const Tensor& x, const Tensor& gx, const Tensor& beta, const Tensor& gamma, double alpha,
               double epsilon, const Tensor& mean, const Tensor& rstd, const Tensor& y) {
  const Normed normed = layer_norm(wide(x) * alpha + wide(gx), gamma, beta, epsilon);
  store(mean, normed.mean.reshape(mean.sizes()));
  store(rstd, normed.rstd.reshape(rstd.sizes()));
  store(y, normed.y);
}

void check_deep_inputs(const Tensor& x, const Tensor& gx, const Tensor& gamma) {
  check_floating(x, "x");
  check_rank(x, "x", 2, 8);
  check_same_dtype(x, "x", gx, "gx");
  check_same_shape(x, "x", gx, "gx");
  check_same_dtype(x, "x", gamma, "gamma");
  check_gamma_shape(x, gamma);
}

void check_deep_norm(const Tensor& x, const Tensor& gx, const Tensor& beta, const Tensor& gamma, double, double,
                     const Tensor&, const Tensor&, const Tensor&) {
  check_deep_inputs(x, gx, gamma);
  check_same_dtype(x, "x", beta, "beta");
  check_same_shape(gamma, "gamma", beta, "beta");
}

void deep_norm_grad(const Tensor& dy, const Tensor& x, const Tensor& gx, const Tensor& gamma, const Tensor& mean,
                    const Tensor& rstd, double alpha, const Tensor& dx, const Tensor& dgx, const Tensor& dbeta,
                    const Tensor& dgamma) {
  const Gradients gradients = layer_norm_grad(dy, wide(x) * alpha + wide(gx), mean, rstd, gamma);
  store(dx, gradients.dx * alpha);
  store(dgx, gradients.dx);
  store(dbeta, gradients.dbeta);
  store(dgamma, gradients.dgamma);
}

void check_deep_norm_grad(const Tensor& dy, const Tensor& x, const Tensor& gx, const Tensor& gamma, const Tensor&,
                          const Tensor&, double, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_deep_inputs(x, gx, gamma);
  check_same_dtype(x, "x", dy, "dy");
  check_same_shape(x, "x", dy, "dy");
}

}  // namespace

ACLNN_CHECKED(aclnnAddLayerNorm, check_add_layer_norm, add_layer_norm,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, const aclTensor* beta,
               const aclTensor* bias, double epsilon, bool with_sum, const aclTensor* y, const aclTensor* mean,
               const aclTensor* rstd, const aclTensor* x),
              x1, x2, gamma, beta, bias, epsilon, with_sum, y, mean, rstd, x)
ACLNN_CHECKED(aclnnAddLayerNormGrad, check_add_layer_norm_grad, add_layer_norm_grad,
              (const aclTensor* dy, const aclTensor* x1, const aclTensor* x2, const aclTensor* rstd,
               const aclTensor* mean, const aclTensor* gamma, const aclTensor* dsum, const aclTensor* dx,
               const aclTensor* dgamma, const aclTensor* dbeta),
              dy, x1, x2, rstd, mean, gamma, dsum, dx, dgamma, dbeta)
ACLNN_CHECKED(aclnnDeepNorm, check_deep_norm, deep_norm,
              (const aclTensor* x, const aclTensor* gx, const aclTensor* beta, const aclTensor* gamma, double alpha,
               double epsilon, const aclTensor* mean, const aclTensor* rstd, const aclTensor* y),
              x, gx, beta, gamma, alpha, epsilon, mean, rstd, y)
ACLNN_CHECKED(aclnnDeepNormGrad, check_deep_norm_grad, deep_norm_grad,
              (const aclTensor* dy, const aclTensor* x, const aclTensor* gx, const aclTensor* gamma,
               const aclTensor* mean, const aclTensor* rstd, double alpha, const aclTensor* dx, const aclTensor* dgx,
               const aclTensor* dbeta, const aclTensor* dgamma),
              dy, x, gx, gamma, mean, rstd, alpha, dx, dgx, dbeta, dgamma)
