// Gradients of losses whose forward torch_npu leaves to the dispatcher: l1_loss, kl_div, and
// binary_cross_entropy_with_logits. Its autograd nodes call these past the dispatcher.
//
// Source: op-plugin 517f2e7d derivatives.yaml, op_plugin_functions.yaml; CANN ops-nn, aclnnL1LossBackward and
// aclnnBinaryCrossEntropyWithLogitsBackward.
#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

int64_t reduction_of(const std::string& name) {
  if (name == "none") return at::Reduction::None;
  if (name == "mean") return at::Reduction::Mean;
  check(name == "sum", "reduction must be none, mean or sum, not ", name);
  return at::Reduction::Sum;
}

// The gradient of the mean is that of the sum over the number of losses.
Tensor reduced(const Tensor& gradient, int64_t reduction) {
  return reduction == at::Reduction::Mean ? gradient / static_cast<double>(gradient.numel()) : gradient;
}

void check_loss(const Tensor& d_loss, const Tensor& input, const Tensor& target) {
  check_floating(d_loss, "the gradient of the loss");
  check_floating(input, "the input");
  check_floating(target, "the target");
}

// d|x - t|/dx = sign(x - t).
void l1_loss_gradient(const Tensor& d_loss, const Tensor& x, const Tensor& target, int64_t reduction,
                      const Tensor& d_x) {
  store(d_x, reduced(wide(d_loss) * at::sign(wide(x) - wide(target)), reduction));
}

void check_l1_loss(const Tensor& d_loss, const Tensor& x, const Tensor& target, int64_t, const Tensor&) {
  check_loss(d_loss, x, target);
}

const LegacyOperator legacy_l1_loss_gradient("L1LossGrad", [](const LegacyArguments& given) {
  const Tensor &d_loss = given.inputs[0], &x = given.inputs[1], &target = given.inputs[2];
  check_loss(d_loss, x, target);
  l1_loss_gradient(d_loss, x, target, reduction_of(given.attribute<std::string>("reduction")), given.outputs[0]);
});

// Of the loss t (log t - x), or exp(t) (t - x) where t is a logarithm.
void kl_div_target_gradient(const Tensor& d_loss, const Tensor& x, const Tensor& target, int64_t reduction,
                            bool is_log, const Tensor& d_target) {
  const Tensor t = wide(target);
  const Tensor slope = is_log ? t.exp() * (t + 1 - wide(x)) : t.log() + 1 - wide(x);
  store(d_target, reduced(wide(d_loss) * slope, reduction));
}

void check_kl_div_target(const Tensor& d_loss, const Tensor& x, const Tensor& target, int64_t, bool, const Tensor&) {
  check_loss(d_loss, x, target);
}

// -x t over exp(t) where the target is a logarithm.
void kl_div_gradient(const Tensor& d_loss, const Tensor& x, const Tensor& target, int64_t reduction, bool is_log,
                     const Tensor& d_x) {
  const Tensor t = is_log ? wide(target).exp() : wide(target);
  store(d_x, reduced((wide(d_loss) * -t).expand_as(x), reduction));
}

// weight ((pos_weight t + 1 - t) sigmoid(x) - pos_weight t).
void with_logits_gradient(const Tensor& d_loss, const Tensor& x, const Tensor& target, const Tensor& weight,
                          const Tensor& positive_weight, int64_t reduction, const Tensor& d_x) {
  const Tensor t = wide(target);
  const Tensor positive = positive_weight.defined() ? wide(positive_weight) * t : t;
  Tensor gradient = ((positive + 1 - t) * at::sigmoid(wide(x)) - positive) * wide(d_loss);
  if (weight.defined()) gradient = gradient * wide(weight);
  store(d_x, reduced(gradient, reduction));
}

void check_with_logits(const Tensor& d_loss, const Tensor& x, const Tensor& target, const Tensor&, const Tensor&,
                       int64_t, const Tensor&) {
  check_loss(d_loss, x, target);
  check_same_shape(x, "the input", target, "the target");
}

const LegacyOperator legacy_with_logits("SigmoidCrossEntropyWithLogitsGradV2", [](const LegacyArguments& given) {
  const Tensors& inputs = given.inputs;
  const int64_t reduction = reduction_of(given.attribute<std::string>("reduction"));
  check_with_logits(inputs[2], inputs[0], inputs[1], inputs[3], inputs[4], reduction, given.outputs[0]);
  with_logits_gradient(inputs[2], inputs[0], inputs[1], inputs[3], inputs[4], reduction, given.outputs[0]);
});

}  // namespace

ACLNN_CHECKED(aclnnL1LossBackward, check_l1_loss, l1_loss_gradient,
              (const aclTensor* d_loss, const aclTensor* x, const aclTensor* target, int64_t reduction,
               const aclTensor* d_x),
              d_loss, x, target, reduction, d_x)
ACLNN_CHECKED(aclnnKlDivBackward, check_kl_div_target, kl_div_gradient,
              (const aclTensor* d_loss, const aclTensor* x, const aclTensor* target, int64_t reduction, bool is_log,
               const aclTensor* d_x),
              d_loss, x, target, reduction, is_log, d_x)
ACLNN_CHECKED(aclnnKlDivTargetBackward, check_kl_div_target, kl_div_target_gradient,
              (const aclTensor* d_loss, const aclTensor* x, const aclTensor* target, int64_t reduction, bool is_log,
               const aclTensor* d_target),
              d_loss, x, target, reduction, is_log, d_target)
ACLNN_CHECKED(aclnnBinaryCrossEntropyWithLogitsBackward, check_with_logits, with_logits_gradient,
              (const aclTensor* d_loss, const aclTensor* x, const aclTensor* target, const aclTensor* weight,
               const aclTensor* positive_weight, int64_t reduction, const aclTensor* d_x),
              d_loss, x, target, weight, positive_weight, reduction, d_x)

}  // namespace llm_adapt::opapi
