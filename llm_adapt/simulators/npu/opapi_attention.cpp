// The sequences of a call and the forward computation.
//
// Hidden scores are the lowest float, not minus infinity, as in the device's kernels: a row in which every key is
// hidden becomes the mean of all values (the documents call it undefined), unless rows without keys are handled, by
// inner_precise 2 or because the operator knows of them (sparse_mode 3 with more queries than keys). Then the row is
// zero, its softmax_max the lowest and its softmax_sum the highest float.
#include "opapi_attention.h"

#include <limits>

namespace llm_adapt::opapi::attention {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr float kHighest = std::numeric_limits<float>::max();

std::vector<Sequence> packed_sequences(const Call& call) {
  std::vector<Sequence> all;
  Sequence next{0, 0, 0, 0, 0, 0, 0};
  size_t count = call.ends_q->size();
  while (count > 1 && (*call.ends_q)[count - 1] == 0) --count;  // zeros at the end: sequences left out
  for (size_t i = 0; i < count; ++i) {
    next.index = static_cast<int64_t>(i);
    next.rows = (*call.ends_q)[i] - next.row;
    next.keys = (*call.ends_k)[i] - next.key;
    all.push_back(next);
    next.row += next.rows;
    next.key += next.keys;
    next.drop_bit += call.heads * next.rows * next.keys;
  }
  return all;
}

Tensor part(const Tensor& tensor, int64_t heads, const Call& call, int64_t batch, int64_t start, int64_t length) {
  return heads_first(tensor, heads, call.layout)[batch].narrow(1, start, length);
}

Tensor repeated(const Tensor& tensor, const Call& call, const Sequence& one) {
  const int64_t groups = key_heads(call);
  const Tensor found = wide(part(tensor, groups, call, one.batch, one.key, one.keys));
  return groups == call.heads ? found : found.repeat_interleave(call.heads / groups, 0);
}

bool handles_empty_rows(const Call& call, const Sequence& one) {
  return call.inner_precise == 2 || (call.sparse_mode == 3 && one.rows > one.keys);
}

void mark_empty_rows(const Call& call, const Sequence& one, const Tensor& top, Tensor& total) {
  const Tensor is_empty = top.eq(kLowest);
  if (call.is_packed()) {
    check(!is_empty.any().item<bool>(), "packed sequences take no query that sees no key, and sequence ", one.index,
          " of ", one.rows, " queries and ", one.keys, " keys has one");
  }
  if (handles_empty_rows(call, one)) total = total.masked_fill(is_empty, kHighest);
}

void forward_one(const Call& call, const Sequence& one, int64_t last_index) {
  const Block given = block(call, one, last_index);
  Tensor top = given.scores.amax({-1}, true);
  Tensor sink;
  if (call.sink.defined()) {
    sink = call.sink.view({call.heads, 1, 1});
    top = at::maximum(top, sink);
  }
  Tensor total = (given.scores - top).exp().sum({-1}, true);
  if (sink.defined()) total = total + (sink - top).exp();
  mark_empty_rows(call, one, top, total);
  Tensor weights = probabilities(given.scores, top, total);
  const Tensor kept = dropout(call, one);
  if (kept.defined()) weights = weights * kept;
  part(call.out, call.heads, call, one.batch, one.row, one.rows).copy_(weights.matmul(given.v));
  statistics(call, call.softmax_max, one).copy_(top.expand({-1, -1, 8}));
  statistics(call, call.softmax_sum, one).copy_(total.expand({-1, -1, 8}));
}

}  // namespace

Tensor heads_first(const Tensor& tensor, int64_t heads, const std::string& layout) {
  if (layout == "BNSD") return tensor;
  if (layout == "BSND") return tensor.transpose(1, 2);
  if (layout == "TND") return tensor.transpose(0, 1).unsqueeze(0);
  const Tensor split = tensor.unflatten(2, {heads, tensor.size(2) / heads});
  return layout == "BSH" ? split.transpose(1, 2) : split.permute({1, 2, 0, 3});
}

int64_t key_heads(const Call& call) {
  if (call.layout == "BNSD" || call.layout == "TND") return call.key.size(1);
  if (call.layout == "BSND") return call.key.size(2);
  return call.key.size(2) / (call.query.size(2) / call.heads);
}

std::vector<Sequence> sequences(const Call& call) {
  if (call.is_packed()) return packed_sequences(call);
  const Tensor query = heads_first(call.query, call.heads, call.layout);
  const int64_t keys = heads_first(call.key, key_heads(call), call.layout).size(2);
  std::vector<Sequence> all;
  for (int64_t batch = 0; batch < query.size(0); ++batch) {
    all.push_back({batch, batch, 0, query.size(2), 0, keys, batch * call.heads * query.size(2) * keys});
  }
  return all;
}

Block block(const Call& call, const Sequence& one, int64_t last_index) {
  Block found;
  found.q = wide(part(call.query, call.heads, call, one.batch, one.row, one.rows));
  found.k = repeated(call.key, call, one);
  found.v = repeated(call.value, call, one);
  Tensor scores = found.q.matmul(found.k.transpose(1, 2));
  if (call.query_rope.defined()) {
    found.q_rope = wide(part(call.query_rope, call.heads, call, one.batch, one.row, one.rows));
    found.k_rope = repeated(call.key_rope, call, one);
    scores = scores + found.q_rope.matmul(found.k_rope.transpose(1, 2));
  }
  const Tensor added = bias(call, one);
  if (added.defined() && call.pse_type == 1) scores = scores + added;
  scores = scores * call.scale;
  if (added.defined() && call.pse_type != 1) scores = scores + added;
  const Tensor mask = hidden(call, one, last_index);
  found.scores = mask.defined() ? scores.masked_fill(mask, kLowest) : scores;
  return found;
}

Tensor probabilities(const Tensor& scores, const Tensor& top, const Tensor& total) {
  return ((scores - top).exp() / total).masked_fill(total.eq(kHighest), 0.0);
}

Tensor statistics(const Call& call, const Tensor& whole, const Sequence& one) {
  if (!call.is_packed()) return whole[one.batch];
  if (call.softmax_layout == "same_as_input") return whole.narrow(0, one.row, one.rows).transpose(0, 1);
  const int64_t heads = call.heads;
  return whole.view({-1, 8}).narrow(0, one.row * heads, one.rows * heads).view({heads, one.rows, 8});
}

void forward(const Call& call) {
  const std::vector<Sequence> all = sequences(call);
  const int64_t last_index = static_cast<int64_t>(all.size()) - 1;
  for (const Sequence& one : all) {
    if (one.rows > 0) forward_one(call, one, last_index);
  }
}

}  // namespace llm_adapt::opapi::attention
