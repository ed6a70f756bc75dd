// What is added to the scores (pse), and the dropout of the probabilities.
//
// pse_type 0 and 1: a tensor of the dtype of q, [B, N, S, K], [B, N, 1, K] or [1, N, S, K]; or compressed, the last
// 1024 rows of a bias that depends on the distance to the key only, [B or 1, N, 1024, K]. pse_type 2 and 3: slopes in
// float32, [N] or [B, N], of which the kernel makes -slope |j - i| or -slope sqrt(|j - i|).
#include "opapi_attention.h"

namespace llm_adapt::opapi::attention {
namespace {

bool is_compressed(const Call& call, const Sequence& one) {
  return call.pse.size(2) == kCompressedPse && (call.is_packed() || one.rows > kCompressedPse);
}

int64_t first(const Ints& values) { return values && !values->empty() ? values->front() : 0; }

Tensor distances(const Sequence& one, int64_t shift) {  // j - i, [S, K]
  return at::arange(one.keys, at::kLong).unsqueeze(0) - at::arange(one.rows, at::kLong).unsqueeze(1) + shift;
}

Tensor from_slopes(const Call& call, const Sequence& one) {
  Tensor distance = distances(one, first(call.start_k) - first(call.start_q)).abs().to(at::kFloat);
  if (call.pse_type == 3) distance = distance.sqrt();
  const Tensor slopes = call.pse.dim() == 2 ? call.pse[call.is_packed() ? one.index : one.batch] : call.pse;
  return slopes.view({-1, 1, 1}) * -distance;
}

// Row i of the whole stands in row i % 1024, shifted to the keys of the same distance; the last 1024 rows are given.
Tensor decompressed(const Tensor& given, const Sequence& one) {  // [N, 1024, K] -> [N, S, K]
  const int64_t last = one.rows - kCompressedPse;
  const Tensor row = at::arange(one.rows, at::kLong).unsqueeze(1);
  const Tensor source = at::where(row >= last, row - last, row.remainder(kCompressedPse));
  const Tensor shift = last + source - row;  // by how much the given row is further down
  const Tensor column = at::arange(one.keys, at::kLong).unsqueeze(0) + shift;
  const Tensor index = source * given.size(2) + column.clamp_max(given.size(2) - 1);
  return given.flatten(1).index_select(1, index.flatten()).view({given.size(0), one.rows, one.keys});
}

// Packed: the place in the given rows that has the same distance to its key.
Tensor decompressed_packed(const Tensor& given, const Sequence& one) {
  const Tensor down = -distances(one, given.size(2) - kCompressedPse);
  const Tensor index = down.clamp_min(0) * given.size(2) + (-down).clamp(0, given.size(2) - 1);
  return given.flatten(1).index_select(1, index.flatten()).view({given.size(0), one.rows, one.keys});
}

void check_slopes(const Call& call, const std::vector<Sequence>& all) {
  const auto sizes = call.pse.sizes();
  check(call.pse.scalar_type() == at::kFloat, "pse_type ", call.pse_type, " takes slopes in float32");
  const bool fits = (sizes.size() == 1 && sizes[0] == call.heads) ||
                    (sizes.size() == 2 && sizes[0] == static_cast<int64_t>(all.size()) && sizes[1] == call.heads);
  check(fits, "pse_type ", call.pse_type, " takes slopes [N] or [B, N], not ", sizes);
  for (const Sequence& one : all) {
    check(one.rows == one.keys, "pse_type ", call.pse_type, " takes as many queries as keys, not ", one.rows, " and ",
          one.keys);
  }
}

void check_compressed(const Call& call, const std::vector<Sequence>& all) {
  const int64_t mode = call.sparse_mode;
  check(call.mask.defined() && (mode == 0 || mode == 2 || mode == 3),
        "a compressed pse takes a causal mask, sparse_mode "
        "0, 2 or 3");
  for (const Sequence& one : all) {
    check(one.rows == one.keys, "a compressed pse takes as many queries as keys, not ", one.rows, " and ", one.keys);
    check(one.rows <= call.pse.size(3), "a compressed pse of ", call.pse.size(3), " keys is too short for ",
          one.rows);
  }
}

}  // namespace

void check_pse(const Call& call, const std::vector<Sequence>& all) {
  check(call.pse_type >= 0 && call.pse_type <= 3, "pse_type is 0, 1, 2 or 3, not ", call.pse_type);
  if (!call.pse.defined()) {
    check(call.pse_type < 2, "pse_type ", call.pse_type, " takes slopes, and pse is missing");
    return;
  }
  check(call.sparse_mode != 7 && call.sparse_mode != 8, "sparse_mode ", call.sparse_mode, " takes no pse");
  for (const Sequence& one : all) {
    check(one.rows > 0 && one.keys > 0, "with pse no sequence may be empty, and sequence ", one.index, " is");
  }
  if (call.pse_type >= 2) return check_slopes(call, all);
  const auto sizes = call.pse.sizes();
  check(call.pse.scalar_type() == call.query.scalar_type(), "pse has the dtype of q, ", call.query.scalar_type(),
        ", not ", call.pse.scalar_type());
  check(sizes.size() == 4 && sizes[1] == call.heads, "pse has shape ", sizes,
        " and takes [B, N, S, K], [B, N, 1, K] or "
        "[1, N, S, K]");
  const auto batch = static_cast<int64_t>(all.size());
  check(sizes[0] == batch || sizes[0] == 1, "pse has shape ", sizes, ", and there are ", batch, " batches");
  if (call.is_packed()) {
    check(sizes[2] == kCompressedPse,
          "pse of packed sequences is modelled compressed only, [B or 1, N, 1024, K], not ", sizes);
    return check_compressed(call, all);
  }
  const Sequence& one = all.front();
  if (is_compressed(call, one)) return check_compressed(call, all);
  const bool is_row = sizes[2] == 1 && sizes[0] == batch;
  check((sizes[2] == one.rows || is_row) && sizes[3] == one.keys, "pse has shape ", sizes,
        " and takes [B, N, S, K], "
        "[B, N, 1, K] or [1, N, S, K] with ",
        one.rows, " queries and ", one.keys, " keys");
}

Tensor bias(const Call& call, const Sequence& one) {
  if (!call.pse.defined()) return Tensor();
  if (call.pse_type >= 2) return from_slopes(call, one);
  const int64_t place = call.is_packed() ? one.index : one.batch;
  const Tensor given = wide(call.pse[call.pse.size(0) > 1 ? place : 0]);
  if (!is_compressed(call, one)) return given;
  return call.is_packed() ? decompressed_packed(given, one) : decompressed(given, one);
}

Tensor dropout(const Call& call, const Sequence& one) {
  if (call.keep_prob == 1.0) return Tensor();
  Tensor bits = call.drop_mask;
  if (!bits.defined()) {  // the kernel of Ascend950 makes the mask itself
    int64_t count = 0;
    for (const Sequence& each : sequences(call)) count += call.heads * each.rows * each.keys;
    bits = at::zeros({(count + 7) / 8}, at::kByte);
    generate_keep_bits(bits, count, 1 - call.keep_prob, call.seed, call.offset);
  }
  const Tensor kept = keep_bits(bits, one.drop_bit, call.heads * one.rows * one.keys);
  return kept.view({call.heads, one.rows, one.keys}).to(at::kFloat) / call.keep_prob;
}

}  // namespace llm_adapt::opapi::attention
