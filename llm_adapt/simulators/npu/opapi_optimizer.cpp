// Optimisers: aclnnApplyAdamWV2, aclnnFusedAdam, aclnnApplyAdamW, aclnnApplyAdam.
//
// Computed in float32 and rounded once at the end. The first of them takes the number of steps done before this one
// (op-plugin subtracts 1 from what torch counts); of the powers of beta, aclnnApplyAdamW takes those of the step before,
// aclnnApplyAdam those of this step. op-plugin hands grad_scale and found_inf to aclnnFusedAdam, and drops them on the
// way to aclnnApplyAdamWV2. Limits: documents of CANN 8.5.
#include <cmath>

#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

// A parameter and its moments, written back together.
struct State {
  const Tensor& parameter;
  const Tensor& m;
  const Tensor& v;
};

struct Betas {
  double first, second;
};

// m and v after this gradient, in float32.
struct Moments {
  Tensor m, v;

  Moments(const State& state, const Tensor& gradient, Betas beta)
      : m(wide(state.m) * beta.first + gradient * (1 - beta.first)),
        v(wide(state.v) * beta.second + gradient * gradient * (1 - beta.second)) {}
};

// m / (1 - beta1 ** t) over sqrt(v / (1 - beta2 ** t)) + eps.
Tensor direction(const Tensor& m, const Tensor& v, Betas power, double eps) {
  return (m / (1 - power.first)) / ((v / (1 - power.second)).sqrt() + eps);
}

void check_state(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& largest, const Tensor& gradient,
                 bool amsgrad) {
  check_dtype(parameter, "the parameter", {at::kFloat, at::kHalf, at::kBFloat16});
  check(!amsgrad || largest.defined(), "amsgrad needs the largest second moment so far");
  for (const Tensor& one : {m, v, gradient, largest}) {
    if (!one.defined()) continue;
    check_same_shape(parameter, "the parameter", one, "gradient and moments");
    check_same_dtype(parameter, "the parameter", one, "gradient and moments");
  }
}

void check_step(const Tensor& step) {
  check_dtype(step, "step", {at::kLong, at::kFloat});
  check(step.numel() == 1, "step must have one element, not shape ", step.sizes());
}

void check_adamw_v2(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& largest,
                    const Tensor& gradient, const Tensor& step, float, float, float, float, float, bool amsgrad, bool) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check_state(parameter, m, v, largest, gradient, amsgrad);
  check_step(step);
}

void adamw_v2(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& largest, const Tensor& gradient,
              const Tensor& step, float lr, float beta1, float beta2, float weight_decay, float eps, bool amsgrad,
              bool maximize) {
  const double t = step.item<double>() + 1;
  const Moments moments({parameter, m, v}, maximize ? -wide(gradient) : wide(gradient), {beta1, beta2});
  const Tensor second = amsgrad ? at::maximum(wide(largest), moments.v) : moments.v;
  const Tensor step_of_all = direction(moments.m, second, {std::pow(beta1, t), std::pow(beta2, t)}, eps);
  store(parameter, wide(parameter) * (1 - lr * weight_decay) - step_of_all * lr);
  store(m, moments.m);
  store(v, moments.v);
  if (amsgrad) store(largest, second);
}

void check_fused_adam(const Tensors& parameters, const Tensors& gradients, const Tensors& ms, const Tensors& vs,
                      const Tensors& largest, const Tensors& steps, const Tensor&, const Tensor&, double, double, double,
                      double, double, bool amsgrad, bool) {
  check_chip({Family::kA5});
  const size_t count = parameters.size();
  const bool same = gradients.size() == count && ms.size() == count && vs.size() == count && steps.size() == count;
  check(same && (!amsgrad || largest.size() == count), "the lists must be equally long");
  for (size_t i = 0; i < count; ++i) {
    check_state(parameters[i], ms[i], vs[i], amsgrad ? largest[i] : Tensor(), gradients[i], amsgrad);
    check_dtype(steps[i], "state_steps", {at::kLong, at::kFloat});
    check(parameters[i].numel() > 0, "empty parameters are not supported");
  }
}

// grad_scale divides the gradients, which are written back; found_inf = 1 stops everything.
void fused_adam(const Tensors& parameters, const Tensors& gradients, const Tensors& ms, const Tensors& vs,
                const Tensors& largest, const Tensors& steps, const Tensor& grad_scale, const Tensor& found_inf, double lr,
                double beta1, double beta2, double weight_decay, double eps, bool amsgrad, bool maximize) {
  if (found_inf.defined() && found_inf.item<float>() == 1.0F) return;
  for (size_t i = 0; i < parameters.size(); ++i) {
    Tensor gradient = wide(gradients[i]);
    if (grad_scale.defined()) {
      gradient = gradient / grad_scale.item<float>();
      store(gradients[i], gradient);
    }
    const Tensor decayed = (maximize ? -gradient : gradient) + wide(parameters[i]) * weight_decay;
    const Moments moments({parameters[i], ms[i], vs[i]}, decayed, {beta1, beta2});
    const Tensor second = amsgrad ? at::maximum(wide(largest[i]), moments.v) : moments.v;
    const double t = steps[i].reshape({-1})[0].item<double>() + 1;
    const Tensor step = direction(moments.m, second, {std::pow(beta1, t), std::pow(beta2, t)}, eps);
    store(parameters[i], wide(parameters[i]) - step * lr);
    store(ms[i], moments.m);
    store(vs[i], moments.v);
    if (amsgrad) store(largest[i], second);
  }
}

void check_numbers(std::initializer_list<Tensor> numbers) {
  for (const Tensor& one : numbers) check(one.numel() == 1, "numbers must have one element each, not shape ", one.sizes());
}

void check_adamw(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& power1, const Tensor& power2,
                 const Tensor& lr, const Tensor& weight_decay, const Tensor& beta1, const Tensor& beta2, const Tensor& eps,
                 const Tensor& gradient, const Tensor& largest, bool amsgrad, bool) {
  check_chip({Family::kA5});
  check_state(parameter, m, v, largest, gradient, amsgrad);
  check_numbers({power1, power2, lr, weight_decay, beta1, beta2, eps});
}

// power1 and power2 are beta ** (t - 1). With amsgrad the larger second moment is written to v.
void adamw(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& power1, const Tensor& power2,
           const Tensor& lr, const Tensor& weight_decay, const Tensor& beta1, const Tensor& beta2, const Tensor& eps,
           const Tensor& gradient, const Tensor& largest, bool amsgrad, bool maximize) {
  const Betas beta{beta1.item<double>(), beta2.item<double>()};
  const Betas power{power1.item<double>() * beta.first, power2.item<double>() * beta.second};
  const Moments moments({parameter, m, v}, maximize ? -wide(gradient) : wide(gradient), beta);
  const Tensor second = amsgrad ? at::maximum(wide(largest), moments.v) : moments.v;
  const double rate = lr.item<double>();
  const Tensor step = direction(moments.m, second, power, eps.item<double>());
  store(parameter, wide(parameter) * (1 - rate * weight_decay.item<double>()) - step * rate);
  store(m, moments.m);
  store(v, second);
}

void check_adam(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& power1, const Tensor& power2,
                const Tensor& lr, const Tensor& beta1, const Tensor& beta2, const Tensor& eps, const Tensor& gradient,
                bool, bool) {
  check_chip({Family::kA5});
  check_state(parameter, m, v, Tensor(), gradient, false);
  check_numbers({power1, power2, lr, beta1, beta2, eps});
  for (const Tensor& one : {power1, power2, lr, beta1, beta2, eps}) check_dtype(one, "numbers", {at::kFloat});
}

// power1 and power2 are beta ** t; eps is added to sqrt(v), before the correction of bias.
void adam(const Tensor& parameter, const Tensor& m, const Tensor& v, const Tensor& power1, const Tensor& power2,
          const Tensor& lr, const Tensor& beta1, const Tensor& beta2, const Tensor& eps, const Tensor& gradient, bool,
          bool nesterov) {
  const Betas beta{beta1.item<double>(), beta2.item<double>()};
  const double rate = lr.item<double>() * std::sqrt(1 - power2.item<double>()) / (1 - power1.item<double>());
  const Moments moments({parameter, m, v}, wide(gradient), beta);
  const Tensor ahead = moments.m * beta.first + wide(gradient) * (1 - beta.first);
  const Tensor step = (nesterov ? ahead : moments.m) / (moments.v.sqrt() + eps.item<double>());
  store(parameter, wide(parameter) - step * rate);
  store(m, moments.m);
  store(v, moments.v);
}

}  // namespace

ACLNN_CHECKED(aclnnApplyAdamWV2, check_adamw_v2, adamw_v2,
              (const aclTensor* parameter, const aclTensor* m, const aclTensor* v, const aclTensor* largest,
               const aclTensor* gradient, const aclTensor* step, float lr, float beta1, float beta2, float weight_decay,
               float eps, bool amsgrad, bool maximize),
              parameter, m, v, largest, gradient, step, lr, beta1, beta2, weight_decay, eps, amsgrad, maximize)
ACLNN_CHECKED(aclnnFusedAdam, check_fused_adam, fused_adam,
              (const aclTensorList* parameters, const aclTensorList* gradients, const aclTensorList* ms,
               const aclTensorList* vs, const aclTensorList* largest, const aclTensorList* steps,
               const aclTensor* grad_scale, const aclTensor* found_inf, double lr, double beta1, double beta2,
               double weight_decay, double eps, bool amsgrad, bool maximize),
              parameters, gradients, ms, vs, largest, steps, grad_scale, found_inf, lr, beta1, beta2, weight_decay, eps,
              amsgrad, maximize)
ACLNN_CHECKED(aclnnApplyAdamW, check_adamw, adamw,
              (const aclTensor* parameter, const aclTensor* m, const aclTensor* v, const aclTensor* power1,
               const aclTensor* power2, const aclTensor* lr, const aclTensor* weight_decay, const aclTensor* beta1,
               const aclTensor* beta2, const aclTensor* eps, const aclTensor* gradient, const aclTensor* largest,
               bool amsgrad, bool maximize),
              parameter, m, v, power1, power2, lr, weight_decay, beta1, beta2, eps, gradient, largest, amsgrad, maximize)
ACLNN_CHECKED(aclnnApplyAdam, check_adam, adam,
              (const aclTensor* parameter, const aclTensor* m, const aclTensor* v, const aclTensor* power1,
               const aclTensor* power2, const aclTensor* lr, const aclTensor* beta1, const aclTensor* beta2,
               const aclTensor* eps, const aclTensor* gradient, bool locking, bool nesterov),
              parameter, m, v, power1, power2, lr, beta1, beta2, eps, gradient, locking, nesterov)
