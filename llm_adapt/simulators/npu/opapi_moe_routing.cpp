// Expansion of tokens for inference: aclnnMoeInitRouting (V2, V3), aclnnMoeFinalizeRoutingV2,
// aclnnMoeComputeExpertTokens, aclnnMoeReRouting.
//
// Limits: documents of torch_npu 2.13. Not modelled: quantisation while routing, drop_pad_mode 1.
#include <limits>

#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

Tensor sorted_pairs(const Tensor& experts) {
  return experts.reshape({-1}).argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
}

void check_expert_idx(const Tensor& x, const Tensor& expert_idx) {
  check_rank(x, "x", 2);
  check_rank(expert_idx, "expert_idx", 2);
  check_dtype(expert_idx, "expert_idx", {at::kInt});
  check(x.size(0) == expert_idx.size(0), "x ", x.sizes(), " and expert_idx ", expert_idx.sizes(), " differ in rows");
}

void check_init_routing(const Tensor& x, const Tensor& row_idx, const Tensor& expert_idx, int64_t, const Tensor&,
                        const Tensor&, const Tensor&) {
  check_expert_idx(x, expert_idx);
  check_floating(x, "x");
  check_dtype(row_idx, "row_idx", {at::kInt});
  check_same_shape(expert_idx, "expert_idx", row_idx, "row_idx");
}

void init_routing(const Tensor& x, const Tensor& row_idx, const Tensor& expert_idx, int64_t, const Tensor& expanded_x,
                  const Tensor& expanded_row_idx, const Tensor& expanded_expert_idx) {
  const Tensor order = sorted_pairs(expert_idx);
  const Tensor source = row_idx.reshape({-1}).index_select(0, order).to(at::kLong);
  store(expanded_expert_idx, expert_idx.reshape({-1}).index_select(0, order));
  store(expanded_row_idx, at::zeros_like(source).scatter(0, source, at::arange(source.size(0))));
  store(expanded_x, x.index_select(0, source.slice(0, 0, expanded_x.size(0)).remainder(x.size(0))));
}

// The pairs of the experts [first, end), sorted by expert; all pairs for all experts.
struct Routing {
  Tensor order;   // pairs, those of other experts last
  int64_t pairs;  // of the experts asked for
  Tensor counts;  // by expert, of those asked for

  Routing(const Tensor& expert_idx, int64_t first, int64_t end) {
    const Tensor expert = expert_idx.reshape({-1}).to(at::kLong);
    const Tensor other = at::logical_or(expert < first, expert >= end);
    order = sorted_pairs(expert.masked_fill(other, std::numeric_limits<int64_t>::max()));
    const Tensor asked = expert.masked_select(at::logical_not(other)) - first;
    pairs = asked.numel();
    counts = at::bincount(asked, {}, end - first);
  }

  // Where each pair goes; -1 for a pair of another expert.
  Tensor row_of_pair() const {
    return at::full({order.size(0)}, -1, at::kLong).scatter(0, order.slice(0, 0, pairs), at::arange(pairs));
  }
};

void expand(const Tensor& x, const Routing& routing, int64_t topk, const Tensor& expanded_x) {
  const int64_t rows = std::min(routing.pairs, expanded_x.size(0));
  expanded_x.slice(0, rows).fill_(x.is_floating_point() ? kNaN : 0);
  const Tensor token = at::floor_divide(routing.order.slice(0, 0, rows), topk);
  expanded_x.slice(0, 0, rows).copy_(x.index_select(0, token));
}

void check_init_routing_v2(const Tensor& x, const Tensor& expert_idx, int64_t, int64_t, int64_t experts,
                           int64_t drop_pad_mode, int64_t counts_mode, bool, const Tensor&, const Tensor&,
                           const Tensor&, const Tensor&) {
  check_expert_idx(x, expert_idx);
  check_floating(x, "x");
  check(drop_pad_mode == 0, "drop_pad_mode ", drop_pad_mode, " is not modelled, only 0");
  check(counts_mode >= 0 && counts_mode <= 2, "expert_tokens_count_or_cumsum_flag must be 0, 1 or 2, not ", counts_mode);
  check(experts > 0, "expert_num must be above 0, not ", experts);
}

void init_routing_v2(const Tensor& x, const Tensor& expert_idx, int64_t, int64_t, int64_t experts, int64_t,
                     int64_t counts_mode, bool, const Tensor& expanded_x, const Tensor& expanded_row_idx,
                     const Tensor& counts, const Tensor&) {
  const Routing routing(expert_idx, 0, experts);
  expand(x, routing, expert_idx.size(1), expanded_x);
  store(expanded_row_idx, routing.row_of_pair());
  if (counts_mode == 1) store(counts, routing.counts.cumsum(0));
  if (counts_mode == 2) store(counts, routing.counts);
}

enum CountsType { kCumulative = 0, kCounts = 1, kKeyValue = 2 };

void check_init_routing_v3(const Tensor& x, const Tensor& expert_idx, const Tensor& scale, const Tensor& offset, int64_t,
                           int64_t, int64_t experts, int64_t drop_pad_mode, int64_t counts_type, bool,
                           int64_t quant_mode, const Ints& range, int64_t row_idx_type, const Tensor&, const Tensor&,
                           const Tensor&, const Tensor&) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check_expert_idx(x, expert_idx);
  check_dtype(x, "x", {at::kFloat, at::kHalf, at::kBFloat16, at::kChar});
  check(quant_mode == -1, "quant_mode ", quant_mode, " is not modelled, only -1");
  check(drop_pad_mode == 0, "drop_pad_mode ", drop_pad_mode, " is not modelled, only 0");
  check(!offset.defined(), "offset must be absent without quantisation");
  check(!scale.defined() || scale.dim() == 1, "scale must be [T] without quantisation");
  check(counts_type >= kCumulative && counts_type <= kKeyValue, "expert_tokens_num_type must be 0, 1 or 2, not ", counts_type);
  check(experts >= 0 && experts <= (counts_type == kKeyValue ? 5120 : 10240), "expert_num ", experts, " is out of range");
  check(row_idx_type == 0 || row_idx_type == 1, "row_idx_type must be 0 or 1, not ", row_idx_type);
  if (!range || range->empty()) return;
  check(range->size() == 2 && (*range)[0] >= 0 && (*range)[1] <= experts && (*range)[0] <= (*range)[1],
        "active_expert_range must be [start, end) within the ", experts, " experts");
}

void store_counts(const Routing& routing, int64_t first, int64_t type, const Tensor& output) {
  if (type == kCounts) return store(output, routing.counts);
  if (type == kCumulative) return store(output, routing.counts.cumsum(0));
  const Tensor present = routing.counts.nonzero().squeeze(1);
  const Tensor table = at::stack({present + first, routing.counts.index_select(0, present)}, 1);
  output.zero_();
  output.slice(0, 0, table.size(0)).copy_(table);
}

// What is beyond the pairs of the range is not written: NaN and the lowest integer expose a reader.
void init_routing_v3(const Tensor& x, const Tensor& expert_idx, const Tensor& scale, const Tensor&, int64_t, int64_t,
                     int64_t experts, int64_t, int64_t counts_type, bool with_counts, int64_t, const Ints& range,
                     int64_t row_idx_type, const Tensor& expanded_x, const Tensor& expanded_row_idx,
                     const Tensor& counts, const Tensor& expanded_scale) {
  const bool all = !range || range->empty();
  const int64_t first = all ? 0 : (*range)[0];
  const Routing routing(expert_idx, first, all ? experts : (*range)[1]);
  const int64_t topk = expert_idx.size(1);
  expand(x, routing, topk, expanded_x);
  store(expanded_row_idx, row_idx_type == 0 ? routing.row_of_pair() : routing.order);
  if (row_idx_type == 1) expanded_row_idx.slice(0, routing.pairs).fill_(std::numeric_limits<int32_t>::min());
  if (with_counts) store_counts(routing, first, counts_type, counts);
  if (scale.defined()) expand(scale, routing, topk, expanded_scale);
}

void check_finalize(const Tensor& rows, const Tensor& source, const Tensor& skip1, const Tensor& skip2, const Tensor& bias,
                    const Tensor& scales, const Tensor& expert, int64_t mode, const Tensor&) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check_floating(rows, "expanded_permuted_rows");
  check_dtype(source, "expanded_src_to_dst_row", {at::kInt});
  check_rank(source, "expanded_src_to_dst_row", 1);
  check(mode >= 0 && mode <= 3, "drop_pad_mode must be from 0 to 3, not ", mode);
  const int64_t rank = mode % 2 == 0 ? 2 : 3;
  check_rank(rows, "expanded_permuted_rows", rank);
  check(skip1.defined() || !skip2.defined(), "skip2 needs skip1");
  check(!bias.defined() || expert.defined(), "bias needs expert_for_source_row");
  for (const Tensor& one : {skip1, skip2, bias, scales}) {
    if (one.defined()) check_same_dtype(rows, "expanded_permuted_rows", one, "skip1, skip2, bias, scales");
  }
}

// out[t] = skip1 + skip2 + sum over k of scales[t, k] (rows[source of (t, k)] + bias[expert of (t, k)]); a source of -1
// was dropped. Sources stand by rank, then token (modes 0 and 1), or by token, then rank (modes 2 and 3).
void finalize(const Tensor& rows, const Tensor& source, const Tensor& skip1, const Tensor& skip2, const Tensor& bias,
              const Tensor& scales, const Tensor& expert, int64_t mode, const Tensor& output) {
  const int64_t tokens = output.size(0);
  const int64_t topk = scales.defined() ? scales.size(1) : source.size(0) / std::max<int64_t>(tokens, 1);
  const Tensor by_token = mode < 2 ? source.reshape({topk, tokens}).t() : source.reshape({tokens, topk});
  const Tensor row = by_token.reshape({-1}).to(at::kLong);
  Tensor values = wide(rows).reshape({-1, output.size(1)}).index_select(0, row.clamp_min(0));
  values = values.masked_fill((row < 0).unsqueeze(1), 0).reshape({tokens, topk, output.size(1)});
  if (bias.defined()) {
    const Tensor of_expert = wide(bias).index_select(0, expert.reshape({-1}).to(at::kLong));
    values = values + of_expert.reshape(values.sizes());
  }
  if (scales.defined()) values = values * wide(scales).unsqueeze(-1);
  Tensor sum = values.sum(1);
  if (skip1.defined()) sum = sum + wide(skip1);
  if (skip2.defined()) sum = sum + wide(skip2);
  store(output, sum);
}

void check_expert_tokens(const Tensor& sorted_experts, int64_t experts, const Tensor&) {
  check_chip({Family::kA2, Family::kA5});
  check_rank(sorted_experts, "sorted_expert_for_source_row", 1);
  check_dtype(sorted_experts, "sorted_expert_for_source_row", {at::kInt});
  check(sorted_experts.numel() < 1 << 24, "sorted_expert_for_source_row must have fewer than 2 ** 24 elements");
  check(experts > 0 && experts <= 2048, "num_expert must be from 1 to 2048, not ", experts);
}

// The end of each expert's rows.
void expert_tokens(const Tensor& sorted_experts, int64_t experts, const Tensor& output) {
  store(output, at::searchsorted(sorted_experts.to(at::kLong), at::arange(experts), /*out_int32=*/false, /*right=*/true));
}

void check_re_routing(const Tensor& tokens, const Tensor& counts, const Tensor& scales, int64_t counts_type,
                      int64_t idx_type, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_chip({Family::kA2, Family::kA3});
  check_rank(tokens, "tokens", 2);
  check_dtype(tokens, "tokens", {at::kHalf, at::kBFloat16, at::kChar});
  check(tokens.size(1) > 0 && tokens.size(1) < 16384, "tokens must have 1 to 16383 columns, not ", tokens.size(1));
  check_rank(counts, "expert_token_num_per_rank", 2);
  check_dtype(counts, "expert_token_num_per_rank", {at::kInt, at::kLong});
  if (scales.defined()) check_dtype(scales, "per_token_scales", {at::kFloat});
  check(counts_type == 1, "expert_token_num_type must be 1, not ", counts_type);
  check(idx_type == 0, "idx_type must be 0, not ", idx_type);
}

// Tokens stand by rank, then expert, [N, E] of them; they come to stand by expert, then rank.
void re_routing(const Tensor& tokens, const Tensor& counts, const Tensor& scales, int64_t, int64_t, const Tensor& permuted,
                const Tensor& permuted_scales, const Tensor& index, const Tensor& of_experts) {
  const Tensor flat = counts.to(at::kLong).reshape({-1});
  check(flat.sum().item<int64_t>() == tokens.size(0), "expert_token_num_per_rank must sum to the ", tokens.size(0), " tokens");
  const Tensor expert = at::arange(counts.size(1)).repeat({counts.size(0)}).repeat_interleave(flat);
  const Tensor order = expert.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/false);
  store(permuted, tokens.index_select(0, order));
  if (scales.defined()) store(permuted_scales, scales.index_select(0, order));
  store(index, order);
  store(of_experts, counts.sum(0));
}

}  // namespace

ACLNN_CHECKED(aclnnMoeInitRouting, check_init_routing, init_routing,
              (const aclTensor* x, const aclTensor* row_idx, const aclTensor* expert_idx, int64_t active,
               const aclTensor* expanded_x, const aclTensor* expanded_row_idx, const aclTensor* expanded_expert_idx),
              x, row_idx, expert_idx, active, expanded_x, expanded_row_idx, expanded_expert_idx)
ACLNN_CHECKED(aclnnMoeInitRoutingV2, check_init_routing_v2, init_routing_v2,
              (const aclTensor* x, const aclTensor* expert_idx, int64_t active, int64_t capacity, int64_t experts,
               int64_t drop_pad_mode, int64_t counts_mode, bool before_capacity, const aclTensor* expanded_x,
               const aclTensor* expanded_row_idx, const aclTensor* counts, const aclTensor* counts_before),
              x, expert_idx, active, capacity, experts, drop_pad_mode, counts_mode, before_capacity, expanded_x,
              expanded_row_idx, counts, counts_before)
ACLNN_CHECKED(aclnnMoeInitRoutingV3, check_init_routing_v3, init_routing_v3,
              (const aclTensor* x, const aclTensor* expert_idx, const aclTensor* scale, const aclTensor* offset,
               int64_t active, int64_t capacity, int64_t experts, int64_t drop_pad_mode, int64_t counts_type,
               bool with_counts, int64_t quant_mode, const aclIntArray* range, int64_t row_idx_type,
               const aclTensor* expanded_x, const aclTensor* expanded_row_idx, const aclTensor* counts,
               const aclTensor* expanded_scale),
              x, expert_idx, scale, offset, active, capacity, experts, drop_pad_mode, counts_type, with_counts,
              quant_mode, range, row_idx_type, expanded_x, expanded_row_idx, counts, expanded_scale)
ACLNN_CHECKED(aclnnMoeFinalizeRoutingV2, check_finalize, finalize,
              (const aclTensor* rows, const aclTensor* source, const aclTensor* skip1, const aclTensor* skip2,
               const aclTensor* bias, const aclTensor* scales, const aclTensor* expert, int64_t mode,
               const aclTensor* output),
              rows, source, skip1, skip2, bias, scales, expert, mode, output)
ACLNN_CHECKED(aclnnMoeComputeExpertTokens, check_expert_tokens, expert_tokens,
              (const aclTensor* sorted_experts, int64_t experts, const aclTensor* output), sorted_experts, experts, output)
ACLNN_CHECKED(aclnnMoeReRouting, check_re_routing, re_routing,
              (const aclTensor* tokens, const aclTensor* counts, const aclTensor* scales, int64_t counts_type,
               int64_t idx_type, const aclTensor* permuted, const aclTensor* permuted_scales, const aclTensor* index,
               const aclTensor* of_experts),
              tokens, counts, scales, counts_type, idx_type, permuted, permuted_scales, index, of_experts)
