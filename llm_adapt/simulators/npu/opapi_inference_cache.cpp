// Keys and values of a sequence, and which of them its queries do not see.
//
// With a table the key and value tensors are pages, [pages, C, G * D] or [pages, G, C, D], and the i-th page of a
// sequence is the one that the table names. Sparse modes are those of attention for training; 5 to 8 are not taken.
#include "opapi_inference.h"

namespace llm_adapt::opapi::inference {
namespace {

constexpr int64_t kCompressed = 2048;

bool is_compressed(const Request& request) {
  return !is_decoding(request) && request.sparse_mode >= 2 && request.sparse_mode <= 4;
}

Tensor from_pages(const Request& request, const Tensor& pages, const Sequence& one) {
  const int64_t count = (one.keys + request.page - 1) / request.page;
  const Tensor numbers = request.table[one.index].slice(0, 0, count).to(at::kLong);
  const bool is_valid = numbers.ge(0).logical_and(numbers.lt(pages.size(0))).all().item<bool>();
  check(is_valid, "block_table names pages of batch ", one.index, " that are not in [0, ", pages.size(0), ")");
  Tensor found = pages.index_select(0, numbers);
  if (found.dim() == 3) {
    found =
        found.unflatten(2, {request.key_heads(), found.size(2) / request.key_heads()}).flatten(0, 1).transpose(0, 1);
  } else {
    found = found.transpose(0, 1).flatten(1, 2);
  }
  return wide(found.narrow(1, 0, one.keys));
}

Tensor given_mask(const Request& request, const Sequence& one) {
  Tensor mask = request.mask.to(at::kBool);
  const bool is_row_per_batch = mask.dim() == 2 && is_decoding(request);
  if (is_row_per_batch) mask = mask.unsqueeze(1);
  if (mask.dim() == 4) mask = mask.squeeze(1);
  if (mask.dim() == 3) mask = mask[mask.size(0) > 1 ? one.batch : 0];
  return mask.slice(0, 0, one.rows).slice(1, 0, one.keys);
}

void check_content(const Request& request) {
  static const Tensor causal = at::ones({kCompressed, kCompressed}, at::kBool).triu(1);
  check(at::equal(request.mask.to(at::kBool).view({kCompressed, kCompressed}), causal), "sparse_mode ",
        request.sparse_mode, " takes the mask triu(ones(2048, 2048), 1), and the given mask is another one");
}

Tensor outside(const Sequence& one, int64_t shift, int64_t pre, int64_t next) {
  const Tensor row = at::arange(one.rows, at::kLong).unsqueeze(1);
  const Tensor column = at::arange(one.keys, at::kLong).unsqueeze(0);
  return (column > row + (shift + next)).logical_or(column < row + (shift - pre));
}

Tensor within_band(const Request& request, const Sequence& one) {
  const Tensor mask = given_mask(request, one);
  const Tensor skipped = outside(one, 0, request.pre, request.next);
  check(!skipped.logical_and(mask.logical_not()).any().item<bool>(),
        "sparse_mode 0: the mask keeps keys that pre_tokens ", request.pre, " and next_tokens ", request.next,
        " hide; they must agree");
  return mask;
}

}  // namespace

Tensor cached(const Request& request, const Tensor& tensor, const Sequence& one) {
  if (request.table.defined()) return from_pages(request, tensor, one);
  const Tensor whole = heads_first(tensor, request.key_heads(), request.layout_in());
  return wide(whole[one.batch].narrow(1, one.key, one.keys));
}

Tensor hidden(const Request& request, const Sequence& one) {
  if (!request.mask.defined()) return Tensor();
  if (is_decoding(request)) return given_mask(request, one);
  if (is_compressed(request)) check_content(request);
  constexpr int64_t kAll = 1LL << 40;
  const int64_t bottom_right = one.keys - one.rows;
  switch (request.sparse_mode) {
    case 0:
      return within_band(request, one);
    case 1:
      return given_mask(request, one);
    case 2:
      return outside(one, 0, kAll, 0);
    case 3:
      return outside(one, bottom_right, kAll, 0);
    default:
      return outside(one, bottom_right, request.pre, request.next);
  }
}

void check_mask(const Request& request, const std::vector<Sequence>& all) {
  check(is_decoding(request) || (request.sparse_mode >= 0 && request.sparse_mode <= 4), "sparse_mode ",
        request.sparse_mode, is_decoding(request) ? "" : " is not modelled; 0 to 4 are");
  if (!request.mask.defined()) return;
  const Tensor& mask = request.mask;
  const at::ScalarType type = mask.scalar_type();
  check(type == at::kBool || type == at::kChar || type == at::kByte, "atten_mask is bool, int8 or uint8, not ", type);
  if (is_compressed(request)) {
    const bool fits = mask.dim() >= 2 && mask.size(-1) == kCompressed && mask.size(-2) == kCompressed &&
                      mask.numel() == kCompressed * kCompressed;
    check(fits, "sparse_mode ", request.sparse_mode, " takes a mask of [2048, 2048], not ", mask.sizes());
    return;
  }
  int64_t rows = 0;
  int64_t keys = 0;
  for (const Sequence& one : all) {
    rows = std::max(rows, one.rows);
    keys = std::max(keys, one.keys);
  }
  const auto batch = static_cast<int64_t>(all.size());
  const int64_t axes = mask.dim();
  check(axes >= 2 && axes <= 4 && (axes < 4 || mask.size(1) == 1), "atten_mask has shape ", mask.sizes(),
        "; it takes [S, K], [B, K] with one query, [1 or B, S, K] or [1 or B, 1, S, K]");
  const bool is_row_per_batch = axes == 2 && is_decoding(request);
  const int64_t first = is_row_per_batch || axes > 2 ? mask.size(0) : 1;
  check(first == 1 || first == batch, "atten_mask has shape ", mask.sizes(), ", and there are ", batch, " batches");
  const bool has_rows = is_row_per_batch || mask.size(-2) >= rows;
  check(has_rows && mask.size(-1) >= keys, "atten_mask has shape ", mask.sizes(), ", and there are ", rows,
        " queries and ", keys, " keys");
}

}  // namespace llm_adapt::opapi::inference
