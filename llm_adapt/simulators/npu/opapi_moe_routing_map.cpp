// Permutation of tokens by a map [T, E] of who goes where: aclnnMoeTokenPermuteWithRoutingMap and its reverse.
//
// Rows stand by expert, then by token; sorted_indices[i] is the row of pair i, pairs counted by token, then by expert.
// probs are [T, E]. Without drop_and_pad each token has the same number of experts. drop_and_pad is not modelled: the
// document orders the tokens of an expert by an argsort that is neither said to be descending nor stable.
// Limits: documents of torch_npu 2.13 and CANN 8.5.
#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr int64_t kMostExperts = 512;  // of one token: fewer when permuting, at most when reversing

void check_floats(const Tensor& tensor, const char* name) {
  check_dtype(tensor, name, {at::kFloat, at::kHalf, at::kBFloat16});
}

// probs have the dtype of the rows; float32 also goes with bfloat16 rows.
void check_probs(const Tensor& rows, const Tensor& probs, const Tensor& map) {
  if (!probs.defined()) return;
  check_floats(probs, "probs");
  const bool mixed = rows.scalar_type() == at::kBFloat16 && probs.scalar_type() == at::kFloat;
  check(mixed || probs.scalar_type() == rows.scalar_type(), "probs of ", probs.scalar_type(), " do not go with rows of ",
        rows.scalar_type(), ": give the same dtype, or float32 with bfloat16");
  check(map.defined(), "probs need routing_map");
  check_same_shape(map, "routing_map", probs, "probs");
}

void check_map(const Tensor& map) {
  check_rank(map, "routing_map", 2);
  check_dtype(map, "routing_map", {at::kBool, at::kChar});
}

void check_permute(const Tensor& tokens, const Tensor& map, const Tensor& probs, int64_t rows, bool padded,
                   const Tensor& permuted, const Tensor&, const Tensor&) {
  check_not_padded(padded, "drop_and_pad");
  check_rank(tokens, "tokens", 2);
  check_floats(tokens, "tokens");
  check_map(map);
  check_probs(tokens, probs, map);
  const int64_t count = tokens.size(0);
  check(map.size(0) == count, "routing_map ", map.sizes(), " and tokens ", tokens.sizes(), " differ in T");
  check(rows >= 0 && rows <= map.numel(), "num_out_tokens must be from 0 to T x E = ", map.numel(), ", not ", rows);
  check(rows < kExactInFloat && map.size(1) < kExactInFloat, "T x K and E must be below ", kExactInFloat);
  check(count == 0 || rows / count < kMostExperts, "topK = num_out_tokens / T must be below ", kMostExperts, ", not ",
        rows / std::max<int64_t>(count, 1));
  check(count == 0 || permuted.size(0) == rows / count * count, "permuted_tokens must have ", rows / std::max<int64_t>(count, 1) * count, " rows");
}

// The token of each row, rows by expert, then by token.
Tensor tokens_of_rows(const Tensor& map) { return map.to(at::kBool).t().nonzero().select(1, 1); }

void check_each_token(const Tensor& map, int64_t topk) {
  const bool same = (map.to(at::kBool).sum(1) == topk).all().item<bool>();
  check(same, "each row of routing_map must have exactly num_out_tokens / T = ", topk, " experts");
}

void permute(const Tensor& tokens, const Tensor& map, const Tensor& probs, int64_t rows, bool, const Tensor& permuted,
             const Tensor& permuted_probs, const Tensor& sorted_indices) {
  if (map.numel() == 0) return;
  check_each_token(map, rows / map.size(0));
  const Tensor token = tokens_of_rows(map);
  store(permuted, tokens.index_select(0, token));
  store(sorted_indices, token.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false));
  if (probs.defined()) store(permuted_probs, probs.t().masked_select(map.to(at::kBool).t()));
}

void check_permute_grad(const Tensor& gradient, const Tensor& of_probs, const Tensor& sorted_indices, const Tensor& map,
                        int64_t experts, int64_t tokens, bool padded, const Tensor&, const Tensor&) {
  check_not_padded(padded, "drop_and_pad");
  check_rank(gradient, "permuted_token_out_grad", 2);
  check_floats(gradient, "permuted_token_out_grad");
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
  check(experts > 0 && tokens > 0, "experts_num and tokens_num must be above 0, not ", experts, " and ", tokens);
  check(!of_probs.defined() || map.defined(), "the gradient of probs needs routing_map");
  if (map.defined()) check_map(map);
}

void permute_grad(const Tensor& gradient, const Tensor& of_permuted_probs, const Tensor& sorted_indices,
                  const Tensor& map, int64_t, int64_t tokens, bool, const Tensor& of_tokens, const Tensor& of_probs) {
  const Tensor of_pairs = wide(gradient).index_select(0, sorted_indices.to(at::kLong));
  store(of_tokens, of_pairs.reshape({tokens, -1, gradient.size(1)}).sum(1));
  if (!of_permuted_probs.defined() || !of_probs.defined()) return;
  const Tensor by_expert = at::zeros({map.size(1), map.size(0)}, of_permuted_probs.options());
  store(of_probs, by_expert.masked_scatter(map.to(at::kBool).t(), of_permuted_probs).t());
}

void check_unpermute(const Tensor& permuted, const Tensor& sorted_indices, const Tensor& map, const Tensor& probs,
                     bool padded, const Ints& shape, const Tensor& output, const Tensor&, const Tensor&, const Tensor&) {
  check_not_padded(padded, "drop_and_pad");
  check_rank(permuted, "permuted_tokens", 2);
  check_floats(permuted, "permuted_tokens");
  check_rank(sorted_indices, "sorted_indices", 1);
  check_dtype(sorted_indices, "sorted_indices", {at::kInt});
  if (map.defined()) check_map(map);
  check_probs(permuted, probs, map);
  check(shape && shape->size() == 2, "restore_shape must be [T, H]");
  const int64_t tokens = std::max<int64_t>(output.size(0), 1);
  check(sorted_indices.size(0) % tokens == 0, sorted_indices.size(0), " sorted_indices are not the same number for each of ",
        tokens, " tokens");
  check(sorted_indices.size(0) / tokens <= kMostExperts, "topK must be at most ", kMostExperts, ", not ",
        sorted_indices.size(0) / tokens);
}

// -1, which newer documents allow for an absent pair, is not modelled: which prob then is whose is not said.
Tensor rows_of_pairs(const Tensor& sorted_indices, int64_t rows) {
  const Tensor row = sorted_indices.to(at::kLong);
  const bool in_range = row.numel() == 0 || (row.min().item<int64_t>() >= 0 && row.max().item<int64_t>() < rows);
  check(in_range, "sorted_indices must be rows, from 0 to ", rows - 1);
  return row;
}

Tensor probs_of_pairs(const Tensor& probs, const Tensor& map, int64_t pairs) {
  check_each_token(map, pairs / map.size(0));
  return wide(probs).masked_select(map.to(at::kBool));
}

// out_index and permuted_token_id are outputs of drop_and_pad alone. Nothing else writes them; -1 exposes a reader.
void unpermute(const Tensor& permuted, const Tensor& sorted_indices, const Tensor& map, const Tensor& probs, bool,
               const Ints&, const Tensor& output, const Tensor& out_index, const Tensor& permuted_token_id,
               const Tensor& permuted_probs) {
  out_index.fill_(-1);
  permuted_token_id.fill_(-1);
  if (permuted.numel() == 0) return;
  const int64_t pairs = sorted_indices.size(0);
  Tensor picked = wide(permuted).index_select(0, rows_of_pairs(sorted_indices, permuted.size(0)));
  if (probs.defined()) {
    picked = picked * probs_of_pairs(probs, map, pairs).unsqueeze(1);
    store(permuted_probs, probs.t().masked_select(map.to(at::kBool).t()));
  }
  store(output, picked.reshape({output.size(0), pairs / output.size(0), output.size(1)}).sum(1));
}

void check_unpermute_grad(const Tensor& gradient, const Tensor& out_index, const Tensor&, const Tensor& map,
                          const Tensor& permuted, const Tensor& probs, bool padded, const Ints&, const Tensor&,
                          const Tensor&) {
  check_not_padded(padded, "drop_and_pad");
  check_rank(gradient, "unpermuted_tokens_grad", 2);
  check_floats(gradient, "unpermuted_tokens_grad");
  check_dtype(out_index, "out_index", {at::kInt});
  check(!probs.defined() || (permuted.defined() && map.defined()),
        "the gradient of probs needs permuted_tokens and routing_map");
}

// Without drop_and_pad the row of pair i is out_index[i], and its token i / K: permuted_token_id is not read.
void unpermute_grad(const Tensor& gradient, const Tensor& out_index, const Tensor&, const Tensor& map,
                    const Tensor& permuted, const Tensor& probs, bool, const Ints&, const Tensor& of_permuted,
                    const Tensor& of_probs) {
  const int64_t pairs = out_index.size(0);
  if (pairs == 0) return;
  const Tensor row = rows_of_pairs(out_index, pairs);
  Tensor of_pairs = wide(gradient).repeat_interleave(pairs / gradient.size(0), 0);
  if (probs.defined()) {
    const Tensor of_chosen = (of_pairs * wide(permuted).index_select(0, row)).sum(1);
    store(of_probs, at::zeros(map.sizes(), of_chosen.options()).masked_scatter(map.to(at::kBool), of_chosen));
    of_pairs = of_pairs * probs_of_pairs(probs, map, pairs).unsqueeze(1);
  }
  store(of_permuted, at::zeros(of_permuted.sizes(), of_pairs.options()).index_copy(0, row, of_pairs));
}

}  // namespace

ACLNN_CHECKED(aclnnMoeTokenPermuteWithRoutingMap, check_permute, permute,
              (const aclTensor* tokens, const aclTensor* map, const aclTensor* probs, int64_t rows, bool padded,
               const aclTensor* permuted, const aclTensor* permuted_probs, const aclTensor* sorted_indices),
              tokens, map, probs, rows, padded, permuted, permuted_probs, sorted_indices)
ACLNN_CHECKED(aclnnMoeTokenPermuteWithRoutingMapGrad, check_permute_grad, permute_grad,
              (const aclTensor* gradient, const aclTensor* of_permuted_probs, const aclTensor* sorted_indices,
               const aclTensor* map, int64_t experts, int64_t tokens, bool padded, const aclTensor* of_tokens,
               const aclTensor* of_probs),
              gradient, of_permuted_probs, sorted_indices, map, experts, tokens, padded, of_tokens, of_probs)
ACLNN_CHECKED(aclnnMoeTokenUnpermuteWithRoutingMap, check_unpermute, unpermute,
              (const aclTensor* permuted, const aclTensor* sorted_indices, const aclTensor* map, const aclTensor* probs,
               bool padded, const aclIntArray* shape, const aclTensor* output, const aclTensor* out_index,
               const aclTensor* permuted_token_id, const aclTensor* permuted_probs),
              permuted, sorted_indices, map, probs, padded, shape, output, out_index, permuted_token_id, permuted_probs)
ACLNN_CHECKED(aclnnMoeTokenUnpermuteWithRoutingMapGrad, check_unpermute_grad, unpermute_grad,
              (const aclTensor* gradient, const aclTensor* out_index, const aclTensor* permuted_token_id,
               const aclTensor* map, const aclTensor* permuted, const aclTensor* probs, bool padded,
               const aclIntArray* shape, const aclTensor* of_permuted, const aclTensor* of_probs),
              gradient, out_index, permuted_token_id, map, permuted, probs, padded, shape, of_permuted, of_probs)
