// The gradient of attention, from the statistics and the output that it is given.
//
//     P = exp(scores - softmax_max) / softmax_sum        dV = dropout(P)^T dY         dP = dropout(dY V^T)
//     dS = P (dP - sum(dY * out))                        dQ = scale dS K              dK = scale dS^T Q
//     dsink = -sum over rows of exp(sink - softmax_max) / softmax_sum * sum(dY * out)
//
// The statistics may be those of more keys than are given, as in a ring of ranks: the parts add up to the whole then.
// The gradient of pse is a "reserved" output in the documents of every version; it holds not-a-number here, so that
// nobody trains on it.
#include <cmath>

#include "opapi_attention.h"

namespace llm_adapt::opapi::attention {
namespace {

Tensor rows_of(const Tensor& tensor, const Call& call, const Sequence& one) {
  return heads_first(tensor, call.heads, call.layout)[one.batch].narrow(1, one.row, one.rows);
}

Tensor keys_of(const Tensor& tensor, const Call& call, const Sequence& one) {
  return heads_first(tensor, key_heads(call), call.layout)[one.batch].narrow(1, one.key, one.keys);
}

// Sum over the query heads that share a key head.
Tensor shared(const Tensor& gradient, const Call& call) {
  const int64_t groups = key_heads(call);
  if (groups == call.heads) return gradient;
  return gradient.unflatten(0, {groups, call.heads / groups}).sum(1);
}

void backward_one(const Call& call, const Sequence& one, int64_t last_index) {
  const Block given = block(call, one, last_index);
  const Tensor top = statistics(call, call.softmax_max, one).narrow(2, 0, 1);
  const Tensor total = statistics(call, call.softmax_sum, one).narrow(2, 0, 1);
  const Tensor dy = wide(rows_of(call.dy, call, one));
  const Tensor inner = (dy * wide(rows_of(call.out, call, one))).sum({-1}, true);
  const Tensor weights = probabilities(given.scores, top, total);
  const Tensor kept = dropout(call, one);
  Tensor d_weights = dy.matmul(given.v.transpose(1, 2));
  if (kept.defined()) d_weights = d_weights * kept;
  const Tensor d_scores = weights * (d_weights - inner) * call.scale;
  const Tensor used = kept.defined() ? weights * kept : weights;
  rows_of(call.dq, call, one).copy_(d_scores.matmul(given.k));
  keys_of(call.dk, call, one).copy_(shared(d_scores.transpose(1, 2).matmul(given.q), call));
  keys_of(call.dv, call, one).copy_(shared(used.transpose(1, 2).matmul(dy), call));
  if (call.query_rope.defined()) {
    rows_of(call.dq_rope, call, one).copy_(d_scores.matmul(given.k_rope));
    keys_of(call.dk_rope, call, one).copy_(shared(d_scores.transpose(1, 2).matmul(given.q_rope), call));
  }
  if (call.sink.defined()) {
    const Tensor share = (call.sink.view({-1, 1, 1}) - top).exp() / total;
    call.dsink.sub_((share * inner).sum({1, 2}));
  }
}

}  // namespace

void backward(const Call& call) {
  for (const Tensor& gradient : {call.dq, call.dk, call.dv, call.dq_rope, call.dk_rope, call.dsink}) {
    if (gradient.defined()) gradient.zero_();  // sequences without queries or keys
  }
  if (call.pse.defined() && call.dpse.defined()) call.dpse.fill_(std::nan(""));
  const std::vector<Sequence> all = sequences(call);
  const int64_t last_index = static_cast<int64_t>(all.size()) - 1;
  for (const Sequence& one : all) {
    if (one.rows > 0) backward_one(call, one, last_index);
  }
}

}  // namespace llm_adapt::opapi::attention
