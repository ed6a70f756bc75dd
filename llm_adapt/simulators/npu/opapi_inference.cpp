// The sequences of a request and their attention.
//
// Hidden scores are the lowest float, as in the device's kernels: a row in which every key is hidden becomes the mean
// of all values, or zero where rows without keys are handled (inner_precise 2 and 3, or sparse_mode 3 with more
// queries than keys); the log-sum-exp of such a row is plus infinity. Queries behind the length of their batch are
// zero.
#include "opapi_inference.h"

#include <limits>

namespace llm_adapt::opapi::inference {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

int64_t length_of(const Ints& lengths, int64_t batch, int64_t otherwise) {
  if (!lengths || lengths->empty()) return otherwise;
  return lengths->size() == 1 ? lengths->front() : (*lengths)[batch];
}

int64_t keys_of_batch(const Request& request) {
  return heads_first(request.key(), request.key_heads(), request.layout_in()).size(2);
}

std::vector<Sequence> packed_sequences(const Request& request) {
  std::vector<Sequence> all;
  Sequence next{0, 0, 0, 0, 0, 0};
  for (size_t i = 0; i < request.lengths_q->size(); ++i) {
    next.index = static_cast<int64_t>(i);
    next.rows = (*request.lengths_q)[i] - next.row;
    const int64_t keys = (*request.lengths_k)[i];
    next.keys = request.table.defined() ? keys : keys - next.key;
    all.push_back(next);
    next.row += next.rows;
    if (!request.table.defined()) next.key += next.keys;
  }
  return all;
}

bool handles_empty_rows(const Request& request, const Sequence& one) {
  if (request.inner_precise >= 2) return true;
  return request.sparse_mode == 3 && one.rows > one.keys && !is_decoding(request);
}

Tensor scores_of(const Request& request, const Sequence& one, const Tensor& query, const Tensor& rope,
                 int64_t share) {
  const Tensor key = cached(request, request.key(), one).repeat_interleave(share, 0);
  Tensor scores = query.matmul(key.transpose(1, 2));
  if (rope.defined()) {
    const Tensor key_rope = cached(request, request.key_rope, one).repeat_interleave(share, 0);
    scores = scores + rope.matmul(key_rope.transpose(1, 2));
  }
  scores = scores * request.scale;
  if (!request.pse.defined()) return scores;
  const Tensor pse = request.pse[request.pse.size(0) > 1 ? one.batch : 0];
  return scores + wide(pse.slice(1, 0, one.rows).slice(2, 0, one.keys));
}

Tensor place(const Request& request, const Tensor& whole, const std::string& layout, const Sequence& one) {
  return heads_first(whole, request.heads, layout)[one.batch].narrow(1, one.row, one.rows);
}

Tensor lse_of(const Request& request, const Sequence& one) {  // a view [N, S, 1]
  if (request.is_packed()) return request.lse.narrow(0, one.row, one.rows).transpose(0, 1);
  return request.lse[one.batch].narrow(1, 0, one.rows);
}

void run_one(const Request& request, const Sequence& one) {
  const Tensor out = place(request, request.out, request.layout_out(), one);
  if (one.keys == 0) {
    if (request.wants_lse) lse_of(request, one).fill_(kInfinity);
    return;
  }
  const int64_t share = request.heads / request.key_heads();
  const Tensor query = wide(place(request, request.query, request.layout_in(), one));
  Tensor rope;
  if (request.query_rope.defined()) rope = wide(place(request, request.query_rope, request.layout_in(), one));
  Tensor scores = scores_of(request, one, query, rope, share);
  const Tensor mask = hidden(request, one);
  if (mask.defined()) scores = scores.masked_fill(mask, kLowest);
  Tensor top = scores.amax({-1}, true);
  if (request.sink.defined()) top = at::maximum(top, wide(request.sink).view({-1, 1, 1}));
  const Tensor weights = (scores - top).exp();
  Tensor total = weights.sum({-1}, true);
  if (request.sink.defined()) total = total + (wide(request.sink).view({-1, 1, 1}) - top).exp();
  Tensor lse = top + total.log();
  Tensor result = (weights / total).matmul(cached(request, request.value(), one).repeat_interleave(share, 0));
  if (handles_empty_rows(request, one)) {
    const Tensor is_empty = top.eq(kLowest);
    result = result.masked_fill(is_empty, 0.0);
    lse = lse.masked_fill(is_empty, kInfinity);
  }
  out.copy_(result);
  if (request.wants_lse) lse_of(request, one).copy_(lse);
}

}  // namespace

Tensor heads_first(const Tensor& tensor, int64_t heads, const std::string& layout) {
  if (layout == "BNSD") return tensor;
  if (layout == "BSND") return tensor.transpose(1, 2);
  if (layout == "NBSD") return tensor.transpose(0, 1);
  if (layout == "TND") return tensor.transpose(0, 1).unsqueeze(0);
  if (layout == "NTD") return tensor.unsqueeze(0);
  return tensor.unflatten(2, {heads, tensor.size(2) / heads}).transpose(1, 2);
}

int64_t queries(const Request& request) {
  return heads_first(request.query, request.heads, request.layout_in()).size(2);
}

bool is_decoding(const Request& request) { return !request.is_packed() && queries(request) == 1; }

std::vector<Sequence> sequences(const Request& request) {
  if (request.is_packed()) return packed_sequences(request);
  const int64_t rows = queries(request);
  const bool is_whole = is_decoding(request);  // the lengths of queries are ignored then
  std::vector<Sequence> all;
  for (int64_t batch = 0; batch < request.query.size(0); ++batch) {
    const int64_t keys = request.table.defined() ? 0 : keys_of_batch(request);
    all.push_back({batch, batch, 0, is_whole ? rows : length_of(request.lengths_q, batch, rows), 0,
                   length_of(request.lengths_k, batch, keys)});
  }
  return all;
}

void run(const Request& request) {
  request.out.zero_();
  if (request.lse.defined() && request.lse.numel() > 0) request.lse.zero_();
  for (const Sequence& one : sequences(request)) {
    if (one.rows > 0) run_one(request, one);
  }
}

}  // namespace llm_adapt::opapi::inference
