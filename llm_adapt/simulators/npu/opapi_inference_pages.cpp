// Writing new keys and values into the pages of a cache, and reading those of sequences out of it.
//
// Mode "Norm": pages [P, C, N, D]. Mode "PA_NZ": pages [P, N * D / e, C, e], with e elements in 32 bytes: a token's
// N * D numbers stand in pieces of e. Token t of a cache is place t % C of page t / C.
// Source: documents of npu_scatter_pa_kv_cache and aclnnGatherPaKvCache.
#include "opapi.h"

namespace llm_adapt::opapi {
namespace {

bool is_in_pieces(const std::string& mode) { return mode == "PA_NZ"; }

void check_mode(const std::string& mode) {
  check(mode.empty() || mode == "Norm" || mode == "PA_NZ", "cache_mode is Norm or PA_NZ, not ", mode);
}

int64_t page_of(const Tensor& cache, const std::string& mode) { return cache.size(is_in_pieces(mode) ? 2 : 1); }

// [P, C, numbers of a token] as a view or, in pieces, [P, C, pieces, e].
Tensor by_token(const Tensor& cache, const std::string& mode) {
  return is_in_pieces(mode) ? cache.transpose(1, 2) : cache.flatten(2);
}

// [tokens, N, D] in the shape that a place of the cache has.
Tensor as_places(const Tensor& tokens, const Tensor& cache, const std::string& mode) {
  return is_in_pieces(mode) ? tokens.reshape({tokens.size(0), cache.size(1), cache.size(3)}) : tokens.flatten(1);
}

void check_cache(const Tensor& cache, const Tensor& tokens, const std::string& mode) {
  check(cache.dim() == 4 && tokens.dim() == 3, "a cache has four axes and its tokens [tokens, N, D], not ",
        cache.sizes(), " and ", tokens.sizes());
  check(cache.scalar_type() == tokens.scalar_type(), "a cache and its tokens have one dtype, not ",
        cache.scalar_type(), " and ", tokens.scalar_type());
  check(cache.is_contiguous() && tokens.is_contiguous(), "a cache and its tokens are contiguous");
  const int64_t numbers = tokens.size(1) * tokens.size(2);
  if (is_in_pieces(mode)) {
    check(cache.size(3) * cache.element_size() == 32 && cache.size(1) * cache.size(3) == numbers,
          "mode PA_NZ takes pages "
          "[P, N * D / e, C, e] with 32 bytes in the last axis, not ",
          cache.sizes());
  } else {
    check(cache.size(2) * cache.size(3) == numbers, "mode Norm takes pages [P, C, N, D], not ", cache.sizes());
  }
}

void check_scatter(Tensor key, Tensor key_cache, Tensor slots, Tensor value, Tensor value_cache, Tensor compress_lens,
                   Tensor compress_offsets, Tensor seq_lens, std::string mode, std::string, Ints, Ints) {
  check(!compress_lens.defined() && !compress_offsets.defined() && !seq_lens.defined(),
        "a compressed cache is not modelled");
  check_mode(mode);
  check_cache(key_cache, key, mode);
  check_cache(value_cache, value, mode);
  check(key.size(0) == value.size(0) && key.size(1) == value.size(1), "k and v have the same tokens and heads");
  const at::ScalarType type = slots.scalar_type();
  check((type == at::kInt || type == at::kLong) && slots.dim() == 1 && slots.size(0) == key.size(0),
        "slot_mapping is int32 or "
        "int64 with a place for each of ",
        key.size(0), " tokens, not ", type, " ", slots.sizes());
}

void put(const Tensor& tokens, const Tensor& cache, const Tensor& slots, const std::string& mode) {
  const int64_t page = page_of(cache, mode);
  by_token(cache, mode).index_put_({slots.div(page, "floor"), slots.remainder(page)}, as_places(tokens, cache, mode));
}

void scatter(Tensor key, Tensor key_cache, Tensor slots, Tensor value, Tensor value_cache, Tensor, Tensor, Tensor,
             std::string mode, std::string, Ints, Ints) {
  const Tensor places = slots.to(at::kLong);
  if (places.numel() == 0) return;
  const int64_t count = key_cache.size(0) * page_of(key_cache, mode);
  check(places.ge(0).logical_and(places.lt(count)).all().item<bool>(),
        "slot_mapping holds places that are not in [0, ", count, ")");
  const int64_t different = std::get<0>(at::_unique(places)).numel();
  check(different == places.numel(), "slot_mapping names a place twice");
  put(key, key_cache, places, mode);
  put(value, value_cache, places, mode);
}

void check_gather(Tensor key_cache, Tensor value_cache, Tensor table, Tensor lengths, Tensor key, Tensor value,
                  Tensor offset, std::string mode, bool is_cumulative) {
  check_mode(mode);
  check_cache(key_cache, key, mode);
  check_cache(value_cache, value, mode);
  check(table.scalar_type() == at::kInt && table.dim() == 2, "block_tables is int32 [B, pages]");
  check(lengths.scalar_type() == at::kInt && lengths.dim() == 1 && lengths.size(0) == table.size(0) + is_cumulative,
        "seq_lens is int32 [B], or [B + 1] where cumulative, not ", lengths.sizes());
  check(!offset.defined() || (offset.scalar_type() == at::kInt && offset.sizes() == table.sizes().slice(0, 1)),
        "seq_offset is int32 [B]");
}

// Pages before a sequence's offset are left out; places behind its pages and pages that do not exist read as zero.
void take(const Tensor& cache, const Tensor& row, int64_t first_page, const std::string& mode, const Tensor& to) {
  const int64_t page = page_of(cache, mode);
  const Tensor token = at::arange(to.size(0), at::kLong);
  const Tensor number = token.div(page, "floor") + first_page;
  const Tensor named = row.to(at::kLong).index_select(0, number.clamp_max(row.size(0) - 1));
  const Tensor exists = number.lt(row.size(0)).logical_and(named.ge(0)).logical_and(named.lt(cache.size(0)));
  const Tensor found = by_token(cache, mode).index({named.clamp(0, cache.size(0) - 1), token.remainder(page)});
  to.copy_(found.reshape(to.sizes()) * exists.view({-1, 1, 1}));
}

void gather(Tensor key_cache, Tensor value_cache, Tensor table, Tensor lengths, Tensor key, Tensor value,
            Tensor offset, std::string mode, bool is_cumulative) {
  const int64_t page = page_of(key_cache, mode);
  int64_t start = 0;
  for (int64_t i = 0; i < table.size(0); ++i) {
    const int64_t before = is_cumulative ? lengths[i].item<int64_t>() : 0;
    const int64_t count = lengths[i + is_cumulative].item<int64_t>() - before;
    check(count >= 0 && start + count <= key.size(0), "seq_lens name more than the ", key.size(0),
          " tokens of the result");
    const int64_t first_page = offset.defined() ? offset[i].item<int64_t>() / page : 0;
    take(key_cache, table[i], first_page, mode, key.narrow(0, start, count));
    take(value_cache, table[i], first_page, mode, value.narrow(0, start, count));
    start += count;
  }
}

}  // namespace

ACLNN_CHECKED(aclnnScatterPaKvCache, check_scatter, scatter,
              (const aclTensor* key, const aclTensor* key_cache, const aclTensor* slots, const aclTensor* value,
               const aclTensor* value_cache, const aclTensor* compress_lens, const aclTensor* compress_offsets,
               const aclTensor* seq_lens, char* mode, char* scatter_mode, const aclIntArray* strides,
               const aclIntArray* offsets),
              key, key_cache, slots, value, value_cache, compress_lens, compress_offsets, seq_lens, mode,
              scatter_mode, strides, offsets)
ACLNN_CHECKED(aclnnGatherPaKvCache, check_gather, gather,
              (const aclTensor* key_cache, const aclTensor* value_cache, const aclTensor* table,
               const aclTensor* lengths, const aclTensor* key, const aclTensor* value, const aclTensor* offset,
               char* mode, bool is_cumulative),
              key_cache, value_cache, table, lengths, key, value, offset, mode, is_cumulative)

}  // namespace llm_adapt::opapi
