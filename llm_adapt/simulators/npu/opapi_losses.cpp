// aclnnCrossEntropyLoss and its gradient.
//
// Logits [N, C], targets [N]. Source: op-plugin document of npu_cross_entropy_loss, CANN ops-nn documents of the aclnn
// functions. A target equal to ignore_index counts nothing, also where that is negative (ops-nn; op-plugin's document
// says that a negative ignore_index ignores nothing, for targets in [0, C)). z-loss is not supported.
#include <ATen/core/Reduction.h>

#include "opapi_legacy.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;

namespace {

constexpr int64_t kMostRows = 200000;

int64_t reduction_of(const std::string& reduction) {
  if (reduction == "none") return at::Reduction::None;
  if (reduction == "mean") return at::Reduction::Mean;
  check(reduction == "sum", "reduction must be mean, sum or none, not ", reduction);
  return at::Reduction::Sum;
}

void check_rows(const Tensor& logits, const Tensor& target, const Tensor& weight) {
  check_family({Family::kA2, Family::kA3, Family::kA5}, "Atlas A2, A3 and Ascend 950");
  check_floating(logits, "input");
  check_rank(logits, "input", 2, 2);
  const int64_t rows = logits.size(0);
  check(0 < rows && rows <= kMostRows && logits.size(1) > 0, "input [N, C] must have N of 1 to ", kMostRows,
        " and C above 0, not ", logits.sizes());
  check(target.scalar_type() == at::kLong, "target must be int64, not ", target.scalar_type());
  check(target.dim() == 1 && target.size(0) == rows, "target must have the shape [", rows, "], not ", target.sizes());
  if (!weight.defined()) return;
  check(weight.scalar_type() == at::kFloat && weight.dim() == 1 && weight.size(0) == logits.size(1),
        "weight must be float32 [C], not ", weight.scalar_type(), " ", weight.sizes());
}

void cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& weight, const std::string& reduction,
                   int64_t ignore_index, double smoothing, double, bool, const Tensor& loss, const Tensor& log_prob,
                   const Tensor&, const Tensor&) {
  const Tensor wide_logits = wide(logits);
  const Tensor result =
      at::cross_entropy_loss(wide_logits, target, weight, reduction_of(reduction), ignore_index, smoothing);
  store(loss, result.reshape(loss.sizes()));
  store(log_prob, at::log_softmax(wide_logits, -1));
}

void check_cross_entropy(const Tensor& logits, const Tensor& target, const Tensor& weight,
                         const std::string& reduction, int64_t ignore_index, double smoothing, double zloss_scale,
                         bool with_zloss, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_rows(logits, target, weight);
  reduction_of(reduction);
  check(ignore_index < logits.size(1), "ignore_index must be below C = ", logits.size(1), ", not ", ignore_index);
  check(0 <= smoothing && smoothing < 1, "label_smoothing must be in [0, 1), not ", smoothing);
  check(zloss_scale == 0 && !with_zloss, "z-loss is not supported");
}

void cross_entropy_grad(const Tensor& d_loss, const Tensor& log_prob, const Tensor& target, const Tensor& weight,
                        const Tensor&, const Tensor&, const std::string& reduction, int64_t ignore_index, double,
                        double, const Tensor& d_logits) {
  const Tensor counted = target.ne(ignore_index);
  const Tensor chosen = at::where(counted, target, at::zeros_like(target));
  Tensor row = weight.defined() ? weight.index({chosen}) : at::ones({target.size(0)}, at::kFloat);
  row = row * counted;
  if (reduction == "mean") row = row / row.sum();
  row = row * wide(d_loss);
  const Tensor hit = at::one_hot(chosen, log_prob.size(1));
  store(d_logits, (wide(log_prob).exp() - hit) * row.unsqueeze(-1));
}

void check_cross_entropy_grad(const Tensor& d_loss, const Tensor& log_prob, const Tensor& target, const Tensor& weight,
                              const Tensor&, const Tensor&, const std::string& reduction, int64_t ignore_index,
                              double smoothing, double zloss_scale, const Tensor&) {
  check_rows(log_prob, target, weight);
  check_same_dtype(log_prob, "log_prob", d_loss, "the gradient of the loss");
  const bool mean = reduction_of(reduction) == at::Reduction::Mean;
  check(!mean || (!weight.defined() && ignore_index == -100),
        "the gradient of the mean is supported with the defaults of weight and ignore_index alone");
  check(smoothing == 0, "the gradient is supported with label_smoothing 0 alone, not ", smoothing);
  check(zloss_scale == 0, "z-loss is not supported");
}

// npu_softmax_cross_entropy_with_logits: labels are a distribution over the classes, of each row.
const LegacyOperator with_logits("SoftmaxCrossEntropyWithLogits", [](const LegacyArguments& given) {
  const Tensor &logits = given.inputs[0], &labels = given.inputs[1];
  check_floating(logits, "features");
  check_same_shape(logits, "features", labels, "labels");
  const Tensor log_prob = at::log_softmax(wide(logits), -1);
  store(given.outputs[0], -(log_prob * wide(labels)).sum(-1));
  store(given.outputs[1], log_prob.exp() * wide(labels).sum(-1, true) - wide(labels));
});

}  // namespace

ACLNN_CHECKED(aclnnCrossEntropyLoss, check_cross_entropy, cross_entropy,
              (const aclTensor* logits, const aclTensor* target, const aclTensor* weight, char* reduction,
               int64_t ignore_index, double smoothing, double zloss_scale, bool with_zloss, const aclTensor* loss,
               const aclTensor* log_prob, const aclTensor* zloss, const aclTensor* lse),
              logits, target, weight, reduction, ignore_index, smoothing, zloss_scale, with_zloss, loss, log_prob,
              zloss, lse)
ACLNN_CHECKED(aclnnCrossEntropyLossGrad, check_cross_entropy_grad, cross_entropy_grad,
              (const aclTensor* d_loss, const aclTensor* log_prob, const aclTensor* target, const aclTensor* weight,
               const aclTensor* d_zloss, const aclTensor* lse, char* reduction, int64_t ignore_index, double smoothing,
               double zloss_scale, const aclTensor* d_logits),
              d_loss, log_prob, target, weight, d_zloss, lse, reduction, ignore_index, smoothing, zloss_scale,
              d_logits)
