// Which keys a query does not see, by sparse mode:
//
//     0 the given mask, which must keep nothing outside the band of pre and next tokens (counted from the top left)
//     1 the given mask                         5 the given mask: bottom-right causal and a prefix of every batch
//     2 causal, anchored at the top left       6 the same from a compressed mask
//     3 causal, anchored at the bottom right   7 packed: mode 3, and the last sequence as mode 4
//     4 a band, anchored at the bottom right   8 packed: mode 2, and the first sequence as mode 4
//
// Without a mask all keys are seen, whatever the mode says. The modes 2, 3, 4, 7 and 8 take one fixed mask of
// 2048 x 2048 for all lengths; wrong content there gives wrong results on a device, and is refused here.
#include "opapi_attention.h"

namespace llm_adapt::opapi::attention {
namespace {

bool is_compressed(int64_t mode) { return mode == 2 || mode == 3 || mode == 4 || mode == 7 || mode == 8; }

const Tensor& causal_mask() {
  static const Tensor mask = at::ones({kCompressed, kCompressed}, at::kBool).triu(1);
  return mask;
}

const Tensor& prefix_mask() {
  static const Tensor mask = [] {
    Tensor rectangle = at::zeros({kPrefixRows - kCompressed, kCompressed}, at::kBool);
    rectangle.slice(1, kCompressed / 2).fill_(true);
    return at::cat({causal_mask(), rectangle});
  }();
  return mask;
}

// Content is looked at when the kernel runs: before, the work that makes the mask may be outstanding.
void check_content(const Call& call) {
  const Tensor given = call.mask.to(at::kBool);
  if (is_compressed(call.sparse_mode)) {
    check(at::equal(given.view({kCompressed, kCompressed}), causal_mask()), "sparse_mode ", call.sparse_mode,
          " takes the mask triu(ones(2048, 2048), 1), and the given mask is another one");
  }
  if (call.sparse_mode == 6) {
    check(at::equal(given, prefix_mask()),
          "sparse_mode 6 takes the mask of 3072 x 2048: triu(ones(2048, 2048), 1), and "
          "below it 1024 rows of 0 in their left half and 1 in their right half; the given mask is another one");
  }
}

Tensor given_mask(const Call& call, const Sequence& one) {
  Tensor mask = call.mask.to(at::kBool);
  if (mask.dim() == 2) return mask.slice(0, 0, one.rows).slice(1, 0, one.keys).unsqueeze(0);
  return mask[mask.size(0) > 1 ? one.batch : 0];
}

struct Places {
  Tensor row;     // [S, 1]
  Tensor column;  // [1, K]
};

Places places(const Sequence& one) {
  return {at::arange(one.rows, at::kLong).unsqueeze(1), at::arange(one.keys, at::kLong).unsqueeze(0)};
}

Tensor outside_band(const Sequence& one, int64_t shift, int64_t pre, int64_t next) {
  const auto [row, column] = places(one);
  return (column > row + (shift + next)).logical_or(column < row + (shift - pre)).unsqueeze(0);
}

Tensor above_diagonal(const Sequence& one, int64_t shift) {
  const auto [row, column] = places(one);
  return (column > row + shift).unsqueeze(0);
}

Tensor outside_prefix(const Call& call, const Sequence& one) {
  const int64_t length = (*call.prefix)[one.index];
  const Tensor behind = at::arange(one.keys, at::kLong).ge(length).unsqueeze(0);
  return above_diagonal(one, one.keys - one.rows).logical_and(behind);
}

// A mask of full size, where the kernel leaves out the blocks that its other arguments say are hidden.
Tensor within(const Call& call, const Sequence& one, const Tensor& skipped, const char* rule) {
  const Tensor mask = given_mask(call, one);
  const bool agrees = skipped.logical_and(mask.logical_not()).any().item<bool>() == false;
  check(agrees, "sparse_mode ", call.sparse_mode, ": the mask keeps keys that ", rule, " hide; they must agree");
  return mask;
}

}  // namespace

Tensor hidden(const Call& call, const Sequence& one, int64_t last_index) {
  if (!call.mask.defined()) return Tensor();
  if (one.index == 0) check_content(call);
  const int64_t bottom_right = one.keys - one.rows;
  int64_t mode = call.sparse_mode;
  if (mode == 7) mode = one.index == last_index ? 4 : 3;
  if (mode == 8) mode = one.index == 0 ? 4 : 2;
  switch (mode) {
    case 0:
      return within(call, one, outside_band(one, 0, call.pre, call.next), "pre_tokens and next_tokens");
    case 1:
      return given_mask(call, one);
    case 2:
      return above_diagonal(one, 0);
    case 3:
      return above_diagonal(one, bottom_right);
    case 4:
      return outside_band(one, bottom_right, call.pre, call.next);
    case 5:
      return within(call, one, outside_prefix(call, one), "the causal rule and the prefix");
    default:
      return outside_prefix(call, one);
  }
}

namespace {

void check_full_mask(const Call& call, const std::vector<Sequence>& all) {
  const auto sizes = call.mask.sizes();
  int64_t rows = 0;
  int64_t keys = 0;
  for (const Sequence& one : all) {
    rows = std::max(rows, one.rows);
    keys = std::max(keys, one.keys);
  }
  const int64_t axes = call.mask.dim();
  check(axes == 2 || (axes == 4 && !call.is_packed()), "atten_mask has shape ", sizes,
        call.is_packed() ? "; packed sequences take [S, K]"
                         : "; it takes [B, N, S, K], [B, 1, S, K], [1, 1, S, K] or [S, K]");
  check(sizes[axes - 2] == rows && sizes[axes - 1] == keys, "atten_mask has shape ", sizes, ", and there are ", rows,
        " queries and ", keys, " keys");
  if (axes == 2) {
    check(call.sparse_mode != 5, "sparse_mode 5 takes a mask [B, N, S, K] or [B, 1, S, K], not ", sizes);
    return;
  }
  const auto batch = static_cast<int64_t>(all.size());
  const bool is_per_batch = sizes[0] == batch && (sizes[1] == call.heads || sizes[1] == 1);
  const bool is_shared = sizes[0] == 1 && sizes[1] == 1 && call.sparse_mode != 5;
  check(is_per_batch || is_shared, "atten_mask has shape ", sizes, "; with ", batch, " batches and ", call.heads,
        " heads it takes [B, N, S, K], [B, 1, S, K]", call.sparse_mode == 5 ? "" : ", [1, 1, S, K] or [S, K]");
}

void check_prefix(const Call& call, const std::vector<Sequence>& all) {
  check(call.prefix && call.prefix->size() == all.size(), "sparse_mode ", call.sparse_mode,
        " takes a prefix for each of ", all.size(), " batches");
  check(all.size() <= 32, "prefix takes up to 32 batches, not ", all.size());
  for (const Sequence& one : all) {
    const int64_t length = (*call.prefix)[one.index];
    const int64_t least = std::max<int64_t>(one.keys - one.rows, 0);
    check(length >= least && length <= one.keys, "prefix ", length, " of batch ", one.index, " is not in [", least,
          ", ", one.keys, "]");
  }
}

}  // namespace

void check_masks(const Call& call, const std::vector<Sequence>& all) {
  const int64_t mode = call.sparse_mode;
  check(call.is_packed() ? mode >= 0 && mode <= 8 && mode != 5 : mode >= 0 && mode <= 6, "sparse_mode ", mode,
        " is not one of layout ", call.layout);
  if (!call.mask.defined()) return;
  const at::ScalarType type = call.mask.scalar_type();
  check(type == at::kBool || type == at::kByte, "atten_mask is bool or uint8, not ", c10::toString(type));
  if (mode == 5 || mode == 6) check_prefix(call, all);
  if (is_compressed(mode)) {
    const bool fits = call.mask.dim() == 2 && call.mask.size(0) == kCompressed && call.mask.size(1) == kCompressed;
    check(fits, "sparse_mode ", mode, " takes a mask of [2048, 2048], not ", call.mask.sizes());
  } else if (mode == 6) {
    const bool fits = call.mask.dim() == 2 && call.mask.size(0) == kPrefixRows && call.mask.size(1) == kCompressed;
    check(fits, "sparse_mode 6 takes a mask of [3072, 2048], not ", call.mask.sizes());
  } else {
    check_full_mask(call, all);
  }
  if (mode != 3 || !call.needs_keys_for_rows) return;
  for (const Sequence& one : all) {
    check(one.rows <= one.keys, "sparse_mode 3 takes no more queries than keys here, and sequence ", one.index,
          " has ", one.rows, " and ", one.keys);
  }
}

}  // namespace llm_adapt::opapi::attention
