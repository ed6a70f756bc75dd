// Permutation of tokens by the experts of each, and its reverse: aclnnMoeTokenPermute, aclnnMoeTokenUnpermute.
//
// sorted_indices[i] is the row of pair i in the permuted tokens. It is not cut to num_out_tokens: a row beyond the
// permuted tokens belongs to a dropped pair, which the kernels pass over. Limits: documents of torch_npu 2.13 and of
// CANN 8.5; the first document of npu_moe_token_permute in torch_npu 2.13 said bfloat16 alone, its later one all three.
#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr int64_t kMostExperts = 512;  // of one token

void check_floats(const Tensor& tensor, const char* name) {
  check_dtype(tensor, name, {at::kFloat, at::kHalf, at::kBFloat16});
}

// The rows that pairs stand at, and which pairs were not dropped.
struct Pairs {
  Tensor row;
  Tensor kept;

  Pairs(const Tensor& sorted_indices, int64_t rows) {
    const Tensor all = sorted_indices.to(at::kLong);
    check(all.numel() == 0 || all.min().item<int64_t>() >= 0, "sorted_indices must not be negative");
    kept = all < rows;
    row = all.masked_fill(at::logical_not(kept), 0);
  }

  // For each pair what `rows` has at its row, 0 for a dropped pair.
  Tensor take(const Tensor& rows) const {
    if (rows.size(0) == 0) return at::zeros({row.size(0), rows.size(1)}, rows.options());
    return rows.index_select(0, row).masked_fill(at::logical_not(kept).unsqueeze(1), 0);
  }

  // The reverse: the values of pairs, put to their rows; 0 in rows of no pair.
  Tensor put(const Tensor& values, int64_t rows) const {
    const Tensor pairs = kept.nonzero().squeeze(1);
    return at::zeros({rows, values.size(1)}, values.options())
        .index_copy(0, row.index_select(0, pairs), values.index_select(0, pairs));
  }
};

void check_permute(const Tensor& tokens, const Tensor& indices, int64_t, bool padded, const Tensor& permuted,
                   const Tensor& sorted_indices) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check_not_padded(padded, "padded_mode");
  check_rank(tokens, "tokens", 2);
  check_floats(tokens, "tokens");
  check_dtype(indices, "indices", {at::kInt, at::kLong});
  check(indices.dim() == 1 || indices.dim() == 2, "indices must be [T, K] or [T], not ", indices.sizes());
  check(indices.size(0) == tokens.size(0), "indices ", indices.sizes(), " and tokens ", tokens.sizes(), " differ in T");
  check(indices.numel() < kExactInFloat, "indices must have fewer than ", kExactInFloat, " elements");
  check(indices.dim() == 1 || indices.size(1) <= kMostExperts, "topK must be at most ", kMostExperts, ", not ",
        indices.size(-1));
  check_same_dtype(tokens, "tokens", permuted, "permuted_tokens");
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
}

void permute(const Tensor& tokens, const Tensor& indices, int64_t, bool, const Tensor& permuted,
             const Tensor& sorted_indices) {
  const Tensor experts = indices.reshape({-1});
  if (experts.numel() == 0) return;
  const bool in_range = experts.min().item<int64_t>() >= 0 && experts.max().item<int64_t>() < kExactInFloat;
  check(in_range, "indices must be from 0 to ", kExactInFloat - 1);
  const Tensor order = experts.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  store(sorted_indices, order.argsort());
  const int64_t topk = indices.dim() == 1 ? 1 : indices.size(1);
  const Tensor kept = order.slice(0, 0, permuted.size(0));
  store(permuted, tokens.index_select(0, at::floor_divide(kept, topk)));
}

void check_permute_grad(const Tensor& gradient, const Tensor& sorted_indices, int64_t topk, bool padded,
                        const Tensor& output) {
  check_not_padded(padded, "padded_mode");
  check_rank(gradient, "grad_permuted_tokens", 2);
  check_floats(gradient, "grad_permuted_tokens");
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
  check(topk >= 1 && topk <= kMostExperts, "num_topK must be from 1 to ", kMostExperts, ", not ", topk);
  check(sorted_indices.numel() == output.size(0) * topk, "sorted_indices ", sorted_indices.sizes(), " are not T x K of ",
        output.size(0), " tokens and ", topk, " experts");
}

void permute_grad(const Tensor& gradient, const Tensor& sorted_indices, int64_t topk, bool, const Tensor& output) {
  const Tensor of_pairs = Pairs(sorted_indices, gradient.size(0)).take(wide(gradient));
  store(output, of_pairs.reshape({output.size(0), topk, gradient.size(1)}).sum(1));
}

void check_probs(const Tensor& probs, const Tensor& sorted_indices) {
  if (!probs.defined()) return;
  check_rank(probs, "probs", 2);
  check_floats(probs, "probs");
  check(probs.size(1) <= kMostExperts, "topK must be at most ", kMostExperts, ", not ", probs.size(1));
  check(probs.numel() == sorted_indices.numel(), "probs ", probs.sizes(), " are not one for each of ",
        sorted_indices.numel(), " pairs");
}

void check_unpermute(const Tensor& permuted, const Tensor& sorted_indices, const Tensor& probs, bool padded, const Ints&,
                     const Tensor&) {
  check_not_padded(padded, "padded_mode");
  check_rank(permuted, "permuted_tokens", 2);
  check_floats(permuted, "permuted_tokens");
  check_rank(sorted_indices, "sorted_indices", 1);
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
  check_probs(probs, sorted_indices);
}

void unpermute(const Tensor& permuted, const Tensor& sorted_indices, const Tensor& probs, bool, const Ints&,
               const Tensor& output) {
  Tensor of_pairs = Pairs(sorted_indices, permuted.size(0)).take(wide(permuted));
  if (!probs.defined()) return store(output, of_pairs);
  of_pairs = of_pairs * wide(probs).reshape({-1, 1});
  store(output, of_pairs.reshape({probs.size(0), probs.size(1), permuted.size(1)}).sum(1));
}

void check_unpermute_grad(const Tensor& permuted, const Tensor& gradient, const Tensor& sorted_indices,
                          const Tensor& probs, bool padded, const Ints&, const Tensor&, const Tensor&) {
  check_not_padded(padded, "padded_mode");
  check_rank(gradient, "grad_unpermuted_tokens", 2);
  check_floats(gradient, "grad_unpermuted_tokens");
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
  check_probs(probs, sorted_indices);
  check(!probs.defined() || permuted.defined(), "the gradient of probs needs permuted_tokens");
}

void unpermute_grad(const Tensor& permuted, const Tensor& gradient, const Tensor& sorted_indices, const Tensor& probs,
                    bool, const Ints&, const Tensor& of_permuted, const Tensor& of_probs) {
  const int64_t rows = of_permuted.size(0);
  const Pairs pairs(sorted_indices, rows);
  if (!probs.defined()) return store(of_permuted, pairs.put(wide(gradient), rows));
  const Tensor of_tokens = wide(gradient).repeat_interleave(probs.size(1), 0);
  store(of_permuted, pairs.put(of_tokens * wide(probs).reshape({-1, 1}), rows));
  store(of_probs, (of_tokens * pairs.take(wide(permuted))).sum(1).reshape(probs.sizes()));
}

}  // namespace

ACLNN_CHECKED(aclnnMoeTokenPermute, check_permute, permute,
              (const aclTensor* tokens, const aclTensor* indices, int64_t rows, bool padded, const aclTensor* permuted,
               const aclTensor* sorted_indices),
              tokens, indices, rows, padded, permuted, sorted_indices)
ACLNN_CHECKED(aclnnMoeTokenPermuteGrad, check_permute_grad, permute_grad,
              (const aclTensor* gradient, const aclTensor* sorted_indices, int64_t topk, bool padded,
               const aclTensor* output),
              gradient, sorted_indices, topk, padded, output)
ACLNN_CHECKED(aclnnMoeTokenUnpermute, check_unpermute, unpermute,
              (const aclTensor* permuted, const aclTensor* sorted_indices, const aclTensor* probs, bool padded,
               const aclIntArray* shape, const aclTensor* output),
              permuted, sorted_indices, probs, padded, shape, output)
ACLNN_CHECKED(aclnnMoeTokenUnpermuteGrad, check_unpermute_grad, unpermute_grad,
              (const aclTensor* permuted, const aclTensor* gradient, const aclTensor* sorted_indices,
               const aclTensor* probs, bool padded, const aclIntArray* shape, const aclTensor* of_permuted,
               const aclTensor* of_probs),
              permuted, gradient, sorted_indices, probs, padded, shape, of_permuted, of_probs)
