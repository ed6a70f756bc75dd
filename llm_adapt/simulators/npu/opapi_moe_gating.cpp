// Choice of experts: aclnnMoeGatingTopKSoftmax, aclnnMoeGatingTopKSoftmaxV2, aclnnMoeGatingTopK and its gradient.
//
// Equal scores: the expert with the lower number first, as in the equivalent code of the documents. Limits: documents
// of torch_npu 2.13 and CANN 8.5.
#include <limits>

#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr int64_t kMostChosen = 1024;
constexpr int64_t kMostExperts = 2048;

struct Best {
  Tensor score;
  Tensor expert;
};

Best best(const Tensor& scores, int64_t k) {
  const auto [score, expert] = scores.sort(/*stable=*/true, /*dim=*/-1, /*descending=*/true);
  return {score.slice(-1, 0, k), expert.slice(-1, 0, k)};
}

// Rows that are finished get the number of experts in the place of an expert.
Tensor without_finished(const Tensor& expert, const Tensor& finished, int64_t experts) {
  return finished.defined() ? expert.masked_fill(finished.unsqueeze(-1), experts) : expert;
}

void check_gating(const Tensor& x, const Tensor& finished, int64_t k) {
  check(x.dim() == 2 || x.dim() == 3, "x must be [T, E] or [B, S, E], not ", x.sizes());
  check_floating(x, "x");
  check(k >= 1 && k <= kMostChosen && k <= x.size(-1), "k must be from 1 to ", std::min(kMostChosen, x.size(-1)), ", not ",
        k);
  if (finished.defined()) check_dtype(finished, "finished", {at::kBool});
}

void check_top_k_softmax(const Tensor& x, const Tensor& finished, int64_t k, const Tensor&, const Tensor&,
                         const Tensor&) {
  check_gating(x, finished, k);
}

// The third output counts pairs by rank: the pair of token t and its j-th expert has number j T + t.
void top_k_softmax(const Tensor& x, const Tensor& finished, int64_t k, const Tensor& y, const Tensor& expert,
                   const Tensor& row) {
  const Best chosen = best(wide(x).softmax(-1), k);
  store(y, chosen.score);
  store(expert, without_finished(chosen.expert, finished, x.size(-1)));
  const int64_t tokens = x.numel() / x.size(-1);
  store(row, at::arange(tokens * k).reshape({k, tokens}).t().reshape(row.sizes()));
}

void check_top_k_softmax_v2(const Tensor& x, const Tensor& finished, int64_t k, int64_t renorm, bool, const Tensor&,
                            const Tensor&, const Tensor&) {
  check_gating(x, finished, k);
  check(renorm == 0 || renorm == 1, "renorm must be 0 or 1, not ", renorm);
}

void top_k_softmax_v2(const Tensor& x, const Tensor& finished, int64_t k, int64_t renorm, bool with_softmax,
                      const Tensor& y, const Tensor& expert, const Tensor& softmax) {
  const Tensor scores = renorm == 0 ? wide(x).softmax(-1) : wide(x);
  const Best chosen = best(scores, k);
  store(y, renorm == 0 ? chosen.score : chosen.score.softmax(-1));
  store(expert, without_finished(chosen.expert, finished, x.size(-1)));
  if (with_softmax) store(softmax, scores);
}

enum NormType { kSoftmax = 0, kSigmoid = 1 };

void check_top_k(const Tensor& x, const Tensor& bias, int64_t k, int64_t chosen_groups, int64_t groups,
                 int64_t group_select_mode, int64_t renorm, int64_t norm_type, bool, double, double, const Tensor&,
                 const Tensor&, const Tensor&) {
  check_rank(x, "x", 2);
  check_floating(x, "x");
  const int64_t experts = x.size(1);
  check(experts <= kMostExperts, "x must have at most ", kMostExperts, " experts, not ", experts);
  check(renorm == 0, "renorm must be 0, not ", renorm);
  check(norm_type == kSoftmax || norm_type == kSigmoid, "norm_type must be 0 (softmax) or 1 (sigmoid), not ", norm_type);
  check(group_select_mode == 0 || group_select_mode == 1, "group_select_mode must be 0 or 1, not ", group_select_mode);
  check(groups > 0 && experts % groups == 0, "group_count ", groups, " must divide the ", experts, " experts");
  check(chosen_groups >= 1 && chosen_groups <= groups, "k_group must be from 1 to group_count ", groups, ", not ",
        chosen_groups);
  check(k >= 1 && k <= experts / groups * chosen_groups, "k must be from 1 to E / group_count x k_group = ",
        experts / groups * chosen_groups, ", not ", k);
  if (bias.defined()) check_same_dtype(x, "x", bias, "bias");
}

// Scores outside the best groups become -inf. A group's score is its best expert's, or the sum of its best two.
Tensor within_best_groups(const Tensor& scores, int64_t groups, int64_t chosen_groups, int64_t group_select_mode) {
  const Tensor grouped = scores.reshape({scores.size(0), groups, -1});
  const Tensor group_score = group_select_mode == 0 ? grouped.amax(-1) : best(grouped, 2).score.sum(-1);
  const Tensor chosen = at::zeros(group_score.sizes(), at::kBool).scatter(1, best(group_score, chosen_groups).expert, true);
  const double nothing = -std::numeric_limits<double>::infinity();
  return grouped.masked_fill(chosen.logical_not().unsqueeze(-1), nothing).reshape(scores.sizes());
}

// The bias decides who is chosen, not how much each counts. norm_out is written with out_flag alone: NaN exposes a
// reader, and the gradient is one, so it needs out_flag=True.
void top_k(const Tensor& x, const Tensor& bias, int64_t k, int64_t chosen_groups, int64_t groups,
           int64_t group_select_mode, int64_t, int64_t norm_type, bool out_flag, double factor, double eps,
           const Tensor& y, const Tensor& expert, const Tensor& norm_out) {
  const Tensor normed = norm_type == kSoftmax ? wide(x).softmax(-1) : wide(x).sigmoid();
  Tensor scores = bias.defined() ? normed + wide(bias) : normed;
  if (groups > 1) scores = within_best_groups(scores, groups, chosen_groups, group_select_mode);
  const Tensor chosen = best(scores, k).expert;
  Tensor weights = normed.gather(1, chosen);
  if (norm_type == kSigmoid) weights = weights / (weights.sum(-1, /*keepdim=*/true) + eps);
  store(y, weights * factor);
  store(expert, chosen);
  if (out_flag) {
    store(norm_out, normed);
  } else {
    norm_out.fill_(std::numeric_limits<float>::quiet_NaN());
  }
}

void check_top_k_backward(const Tensor& norm_out, const Tensor& gradient, const Tensor& expert, int64_t, int64_t norm_type,
                          double, double, const Tensor&) {
  check_chip({Family::kA2, Family::kA3});
  check(norm_type == kSigmoid, "norm_type must be 1 (sigmoid): the gradient of softmax is not supported");
  check_rank(norm_out, "x_norm", 2);
  check_dtype(norm_out, "x_norm", {at::kFloat});
  check_dtype(expert, "expertIdx", {at::kInt});
  check_same_shape(gradient, "grad_y", expert, "expertIdx");
}

void top_k_backward(const Tensor& norm_out, const Tensor& gradient, const Tensor& expert, int64_t, int64_t,
                    double factor, double eps, const Tensor& output) {
  const Tensor chosen = expert.to(at::kLong);
  const Tensor scores = norm_out.gather(1, chosen);
  const Tensor sum = scores.sum(1, /*keepdim=*/true) + eps;
  const Tensor scaled = wide(gradient) * factor;
  const Tensor of_scores = (scaled - (scores / sum * scaled).sum(1, /*keepdim=*/true)) / sum;
  const Tensor of_normed = at::zeros_like(norm_out).scatter_add(1, chosen, of_scores);
  store(output, of_normed * norm_out * (1 - norm_out));
}

}  // namespace

ACLNN_CHECKED(aclnnMoeGatingTopKSoftmax, check_top_k_softmax, top_k_softmax,
              (const aclTensor* x, const aclTensor* finished, int64_t k, const aclTensor* y, const aclTensor* expert,
               const aclTensor* row),
              x, finished, k, y, expert, row)
ACLNN_CHECKED(aclnnMoeGatingTopKSoftmaxV2, check_top_k_softmax_v2, top_k_softmax_v2,
              (const aclTensor* x, const aclTensor* finished, int64_t k, int64_t renorm, bool with_softmax,
               const aclTensor* y, const aclTensor* expert, const aclTensor* softmax),
              x, finished, k, renorm, with_softmax, y, expert, softmax)
ACLNN_CHECKED(aclnnMoeGatingTopK, check_top_k, top_k,
              (const aclTensor* x, const aclTensor* bias, int64_t k, int64_t chosen_groups, int64_t groups,
               int64_t group_select_mode, int64_t renorm, int64_t norm_type, bool out_flag, double factor, double eps,
               const aclTensor* y, const aclTensor* expert, const aclTensor* norm_out),
              x, bias, k, chosen_groups, groups, group_select_mode, renorm, norm_type, out_flag, factor, eps, y, expert,
              norm_out)
ACLNN_CHECKED(aclnnMoeGatingTopKBackward, check_top_k_backward, top_k_backward,
              (const aclTensor* norm_out, const aclTensor* gradient, const aclTensor* expert, int64_t renorm,
               int64_t norm_type, double factor, double eps, const aclTensor* output),
              norm_out, gradient, expert, renorm, norm_type, factor, eps, output)
