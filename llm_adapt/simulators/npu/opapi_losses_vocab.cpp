// aclnn cross entropy of a vocabulary that is split over ranks, with the last linear layer in it.
//
// input [T, H], weight [V, H] of one rank, target [T]. Rank by rank: aclnnFusedLinearOnlineMaxSum gives the maxima and
// sums of the rank's logits; the caller reduces them over the ranks; aclnnFusedCrossEntropyLossWithMaxSum gives the
// loss; aclnnFusedLinearCrossEntropyLossGrad the gradients of this rank. Sources: op-plugin documents of the three.
// The first row of the packed target mask is the lowest bit, as CANN's own kernels read it.
#include "opapi_dense.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;

namespace {

constexpr int64_t kWidest = 65534, kFewestWords = 128;

Tensor bits_of_a_byte() { return at::bitwise_left_shift(at::ones({8}, at::kLong), at::arange(8, at::kLong)); }

// True = the target lies on another rank. Bits beyond the rows are 1.
Tensor packed(const Tensor& mask) {
  const int64_t bytes = (mask.numel() + 7) / 8;
  const Tensor padded = at::ones({bytes * 8}, at::kLong);
  padded.slice(0, 0, mask.numel()).copy_(mask);
  return (padded.view({bytes, 8}) * bits_of_a_byte()).sum(-1).to(at::kByte);
}

Tensor unpacked(const Tensor& bytes, int64_t rows) {
  const Tensor bits = at::bitwise_and(bytes.to(at::kLong).unsqueeze(-1), bits_of_a_byte()).ne(0);
  return bits.flatten().slice(0, 0, rows);
}

void check_linear(const Tensor& input, const Tensor& weight) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  check_rank(input, "input", 2, 2);
  check_rank(weight, "weight", 2, 2);
  check(is_one_of(input.scalar_type(), {at::kHalf, at::kBFloat16}), "input must be float16 or bfloat16, not ",
        input.scalar_type());
  check_same_dtype(input, "input", weight, "weight");
  check(input.size(1) == weight.size(1), "input [T, H] and weight [V, H] must have one H, they are ", input.sizes(),
        " and ", weight.sizes());
}

void online_max_sum(const Tensor& input, const Tensor& weight, const Tensor& target, int64_t start, int64_t end,
                    const Tensor& maxima, const Tensor& sums, const Tensor& predicted, const Tensor& mask,
                    const Tensor& local, const Tensor& logits) {
  const Tensor all = at::matmul(wide(input), wide(weight).t());
  const Tensor largest = all.amax(-1, true);
  const Tensor below = all - largest;
  const Tensor elsewhere = at::logical_or(target.lt(start), target.gt(end));
  const Tensor place = at::where(elsewhere, at::zeros_like(target), target - start).to(at::kLong);
  store(maxima, largest.squeeze(-1));
  store(sums, below.exp().sum(-1));
  store(predicted, below.gather(-1, place.unsqueeze(-1)).squeeze(-1).masked_fill(elsewhere, 0));
  store(mask, packed(elsewhere));
  store(local, place);
  if (logits.defined()) store(logits, all);
}

void check_online_max_sum(const Tensor& input, const Tensor& weight, const Tensor& target, int64_t start, int64_t end,
                          const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_linear(input, weight);
  check(input.size(1) <= kWidest, "H must be at most ", kWidest, ", not ", input.size(1));
  check(is_one_of(target.scalar_type(), {at::kInt, at::kLong}), "target must be int32 or int64, not ",
        target.scalar_type());
  check(target.dim() == 1 && target.size(0) == input.size(0), "target must have the shape [T], not ", target.sizes());
  check(0 <= start && start <= end, "0 <= vocab_start_index <= vocab_end_index must hold, they are ", start, " and ",
        end);
  check(end <= start + weight.size(0) - 1, "vocab_end_index ", end, " lies beyond the ", weight.size(0),
        " rows of weight");
}

void loss_with_max_sum(const Tensor& maxima, const Tensor& sums, const Tensor& predicted, double, const Tensor&,
                       const Tensor&, const Tensor& logits, const Tensor& loss, const Tensor& softmax) {
  store(loss, sums.log() - predicted);
  if (logits.defined()) store(softmax, (wide(logits) - maxima.unsqueeze(-1)).exp() / sums.unsqueeze(-1));
}

void check_loss_with_max_sum(const Tensor& maxima, const Tensor& sums, const Tensor& predicted, double smoothing,
                             const Tensor& input, const Tensor& weight, const Tensor& logits, const Tensor&,
                             const Tensor&) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  for (const Tensor& row : {maxima, sums, predicted}) {
    check(row.scalar_type() == at::kFloat && row.dim() == 1, "logits_max, sum_exp_logits and predicted_logits must be ",
          "float32 of one axis, not ", row.scalar_type(), " ", row.sizes());
    check_same_shape(maxima, "logits_max", row, "sum_exp_logits and predicted_logits");
  }
  check(smoothing == 0, "label_smoothing must be 0, not ", smoothing);
  check(!input.defined() && !weight.defined(), "input and weight must be None");
  check(!logits.defined() || (logits.dim() == 2 && logits.size(0) == maxima.size(0)),
        "vocab_parallel_logits must be [T, V]");
}

void linear_loss_grad(const Tensor& d_loss, const Tensor& input, const Tensor& weight, const Tensor& mask,
                      const Tensor& local, double, const Tensor& maxima, const Tensor& sums, const Tensor& softmax,
                      const Tensor& d_input, const Tensor& d_weight) {
  Tensor p = softmax;
  if (!p.defined()) {
    const Tensor logits = at::matmul(wide(input), wide(weight).t());
    p = (logits - maxima.unsqueeze(-1)).exp() / sums.unsqueeze(-1);
  }
  const Tensor here = unpacked(mask, d_loss.numel()).logical_not();
  const Tensor hit = at::one_hot(local.to(at::kLong), weight.size(0)) * here.unsqueeze(-1);
  const Tensor d_logits = (p - hit) * d_loss.unsqueeze(-1);
  store(d_input, at::matmul(d_logits, wide(weight)));
  store(d_weight, at::matmul(d_logits.t(), wide(input)));
}

void check_linear_loss_grad(const Tensor& d_loss, const Tensor& input, const Tensor& weight, const Tensor& mask,
                            const Tensor& local, double smoothing, const Tensor& maxima, const Tensor& sums,
                            const Tensor& softmax, const Tensor&, const Tensor&) {
  check_linear(input, weight);
  check(weight.size(0) >= kFewestWords, "weight must have at least ", kFewestWords, " rows, not ", weight.size(0));
  check(d_loss.scalar_type() == at::kFloat && d_loss.dim() == 1 && d_loss.size(0) == input.size(0),
        "grad must be float32 [T], not ", d_loss.scalar_type(), " ", d_loss.sizes());
  check(mask.scalar_type() == at::kByte && mask.numel() * 8 >= d_loss.numel(), "target_mask must be uint8 with a bit ",
        "for each row");
  check_same_shape(d_loss, "grad", local, "masked_target");
  check(smoothing == 0, "label_smoothing must be 0, not ", smoothing);
  check(softmax.defined() || (maxima.defined() && sums.defined()),
        "logits_max and sum_exp_logits must be given where softmax is not");
}

}  // namespace

ACLNN_CHECKED(aclnnFusedLinearOnlineMaxSum, check_online_max_sum, online_max_sum,
              (const aclTensor* input, const aclTensor* weight, const aclTensor* target, int64_t start, int64_t end,
               const aclTensor* maxima, const aclTensor* sums, const aclTensor* predicted, const aclTensor* mask,
               const aclTensor* local, const aclTensor* logits),
              input, weight, target, start, end, maxima, sums, predicted, mask, local, logits)
// op-plugin passes label_smoothing as double, CANN's header says float: 0, the only value supported, is one in both.
ACLNN_CHECKED(aclnnFusedCrossEntropyLossWithMaxSum, check_loss_with_max_sum, loss_with_max_sum,
              (const aclTensor* maxima, const aclTensor* sums, const aclTensor* predicted, double smoothing,
               const aclTensor* input, const aclTensor* weight, const aclTensor* logits, const aclTensor* loss,
               const aclTensor* softmax),
              maxima, sums, predicted, smoothing, input, weight, logits, loss, softmax)
ACLNN_CHECKED(aclnnFusedLinearCrossEntropyLossGrad, check_linear_loss_grad, linear_loss_grad,
              (const aclTensor* d_loss, const aclTensor* input, const aclTensor* weight, const aclTensor* mask,
               const aclTensor* local, double smoothing, const aclTensor* maxima, const aclTensor* sums,
               const aclTensor* softmax, const aclTensor* d_input, const aclTensor* d_weight),
              d_loss, input, weight, mask, local, smoothing, maxima, sums, softmax, d_input, d_weight)
