// aclnn rotary embeddings of inference: queries and keys at once in place, DeepSeek's, and by cached positions.
//
// Letters of shapes: B batch, S sequence, N heads, T tokens, D head size. Sources: op-plugin documents of
// npu_apply_rotary_pos_emb, npu_interleave_rope and npu_mrope.
#include "opapi_rotary.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;
using llm_adapt::family;

namespace {

constexpr int64_t kBSND = 1, kTND = 4;

Turn turn_of(const std::string& mode) {
  if (mode == "half") return Turn::kHalf;
  if (mode == "interleave") return Turn::kInterleave;
  check(mode == "quarter", "rotary_mode must be half, interleave or quarter, not ", mode);
  return Turn::kQuarter;
}

void apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, int64_t,
                  const std::string& mode) {
  const Turn turn = turn_of(mode);
  query.copy_(rotated(wide(query), wide(cos), wide(sin), turn));
  key.copy_(rotated(wide(key), wide(cos), wide(sin), turn));
}

void check_before_950(const Tensor& query, const Tensor& key, const Tensor& cos, int64_t layout, Turn turn) {
  const int64_t size = query.size(-1);
  check(layout == kBSND || layout == kTND, "the layout must be BSND or TND on ", llm_adapt::soc_name());
  check(turn == Turn::kHalf, "rotary_mode must be half on ", llm_adapt::soc_name());
  check(size == 64 || size == 128, "D must be 64 or 128, not ", size);
  check(query.numel() > 0 && key.numel() > 0, "empty tensors are not supported");
  std::vector<int64_t> expected = query.sizes().vec();
  expected[expected.size() - 2] = 1;
  check(cos.sizes() == at::IntArrayRef(expected), "cos and sin must have the shape ", at::IntArrayRef(expected),
        ", not ", cos.sizes());
}

void check_apply_rotary(const Tensor& query, const Tensor& key, const Tensor& cos, const Tensor& sin, int64_t layout,
                        const std::string& mode) {
  check_family({Family::k310P, Family::kA2, Family::kA3, Family::kA5}, "Atlas 310P, A2, A3 and Ascend 950");
  check_floating(query, "query");
  for (const Tensor& other : {key, cos, sin}) check_same_dtype(query, "query", other, "key, cos and sin");
  check_rank(query, "query", layout == kTND ? 3 : 4, layout == kTND ? 3 : 4);
  check(key.dim() == query.dim() && key.size(-1) == query.size(-1), "key must have the axes and D of query, not ",
        key.sizes());
  check_same_shape(cos, "cos", sin, "sin");
  check(cos.dim() == query.dim() && cos.size(-1) == query.size(-1), "cos and sin narrower than D = ", query.size(-1),
        " are not modelled, they are ", cos.sizes());
  const Turn turn = turn_of(mode);
  if (family() != Family::kA5) return check_before_950(query, key, cos, layout, turn);
  const int64_t step = turn == Turn::kQuarter ? 4 : 2;
  check(query.size(-1) <= 1024 && query.size(-1) % step == 0, "D must be a multiple of ", step, " of at most 1024");
}

// Pairs that lie together are brought apart, then turned as halves; they stay apart.
void interleave_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor& y) {
  store(y, rotated(wide(x), wide(cos), wide(sin), Turn::kInterleaveToHalf));
}

void check_interleave_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, const Tensor&) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  check(is_one_of(x.scalar_type(), {at::kHalf, at::kBFloat16}), "x must be float16 or bfloat16, not ",
        x.scalar_type());
  check_rank(x, "x", 4, 4);
  check(x.size(-1) == 64, "D must be 64, not ", x.size(-1));
  check_same_dtype(x, "x", cos, "cos");
  check_same_dtype(x, "x", sin, "sin");
  check_same_shape(cos, "cos", sin, "sin");
  check(cos.dim() == 4 && cos.size(1) == 1 && cos.size(3) == 64 && cos.size(0) == x.size(0) &&
            (cos.size(2) == 1 || cos.size(2) == x.size(2)),
        "cos and sin must be [B, 1, S or 1, 64], not ", cos.sizes());
  check(x.is_contiguous() && cos.is_contiguous() && sin.is_contiguous(), "x, cos and sin must be contiguous");
}

// The rows of the cache of each token, [T, rotary_dim], from one row of positions or one for each section.
Tensor rows_of(const Tensor& positions, const Tensor& cache, const std::vector<int64_t>& sections, bool interleaved) {
  const Tensor rows = wide(cache).index({positions.to(at::kLong)});
  if (positions.dim() == 1) return rows;
  const int64_t half = rows.size(-1) / 2;
  const Tensor halves = rows.unflatten(-1, {2, half});  // [sections, T, cos and sin, half]
  if (interleaved) {
    Tensor mixed = halves[0].clone();
    for (int64_t which : {1, 2}) {
      const int64_t end = sections[1] * 3;
      mixed.slice(-1, which, end, 3).copy_(halves[which].slice(-1, which, end, 3));
    }
    return mixed.flatten(-2);
  }
  Tensors parts;
  int64_t start = 0;
  for (size_t which = 0; which < sections.size(); ++which) {
    parts.push_back(halves[which].slice(-1, start, start + sections[which]));
    start += sections[which];
  }
  return at::cat(parts, -1).flatten(-2);
}

Tensor by_position(const Tensor& x, const Tensor& rows, int64_t head_size, bool neox) {
  const int64_t width = rows.size(-1);
  const std::vector<Tensor> tables = rows.unsqueeze(1).chunk(2, -1);  // [T, 1, rotary_dim / 2]
  const Turn turn = neox ? Turn::kHalf : Turn::kInterleave;
  const auto full = [&](const Tensor& table) {
    return neox ? at::cat({table, table}, -1) : at::repeat_interleave(table, 2, -1);
  };
  const Tensor heads = wide(x).unflatten(-1, {-1, head_size});
  const Tensor turned = rotated(heads.slice(-1, 0, width), full(tables[0]), full(tables[1]), turn);
  return at::cat({turned, heads.slice(-1, width)}, -1).flatten(-2);
}

void cached_rope(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cache,
                 const Ints& sections, int64_t head_size, bool neox, int64_t cache_mode, const Tensor& query_out,
                 const Tensor& key_out) {
  const Tensor rows = rows_of(positions, cache, sections.value_or(std::vector<int64_t>()), cache_mode == 1);
  store(query_out, by_position(query, rows, head_size, neox));
  store(key_out, by_position(key, rows, head_size, neox));
}

void check_sections(const Tensor& positions, const std::vector<int64_t>& sections, int64_t rotary_dim,
                    int64_t cache_mode) {
  // With one row of positions the sections mean nothing; torch_npu then passes whatever lies in memory.
  if (positions.dim() == 1) return check(cache_mode == 0, "cache_mode must be default with one row of positions");
  const int64_t count = static_cast<int64_t>(sections.size());
  check(count == 3 || count == 4, "mrope_section must have 3 or 4 parts, not ", count);
  check(positions.size(0) == count, "positions must have one row for each part of mrope_section, ", count, ", not ",
        positions.size(0));
  const int64_t total = std::accumulate(sections.begin(), sections.end(), int64_t{0});
  check(total == rotary_dim / 2, "mrope_section ", sections, " must sum to half of rotary_dim ", rotary_dim);
  check(cache_mode == 0 || (count == 3 && sections[1] == sections[2]), "cache_mode interleave with mrope_section ",
        sections, " is not modelled");
}

void check_cached_rope(const Tensor& positions, const Tensor& query, const Tensor& key, const Tensor& cache,
                       const Ints& sections, int64_t head_size, bool, int64_t cache_mode, const Tensor&,
                       const Tensor&) {
  check_family({Family::kA2, Family::kA3}, "Atlas A2 and A3");
  check_floating(query, "query");
  check_same_dtype(query, "query", key, "key");
  check_same_dtype(query, "query", cache, "cos_sin_cache");
  check(is_one_of(positions.scalar_type(), {at::kInt, at::kLong}), "positions must be int32 or int64, not ",
        positions.scalar_type());
  check_rank(positions, "positions", 1, 2);
  for (const Tensor& matrix : {query, key, cache}) check_rank(matrix, "query, key and cos_sin_cache", 2, 2);
  check(query.size(-1) % head_size == 0 && key.size(-1) % head_size == 0, "head_size ", head_size,
        " does not divide the widths of query and key");
  const int64_t rotary_dim = cache.size(-1);
  const int64_t step = query.scalar_type() == at::kFloat ? 16 : 32;
  check(rotary_dim % step == 0 && rotary_dim <= head_size, "rotary_dim must be a multiple of ", step,
        " of at most head_size ", head_size, ", not ", rotary_dim);
  check_sections(positions, sections.value_or(std::vector<int64_t>()), rotary_dim, cache_mode);
}

}  // namespace

ACLNN_CHECKED(aclnnApplyRotaryPosEmbV2, check_apply_rotary, apply_rotary,
              (const aclTensor* query, const aclTensor* key, const aclTensor* cos, const aclTensor* sin, int64_t layout,
               char* mode),
              query, key, cos, sin, layout, mode)
ACLNN_CHECKED(aclnnInterleaveRope, check_interleave_rope, interleave_rope,
              (const aclTensor* x, const aclTensor* cos, const aclTensor* sin, const aclTensor* y), x, cos, sin, y)
ACLNN_CHECKED(aclnnRopeWithSinCosCacheV2, check_cached_rope, cached_rope,
              (const aclTensor* positions, const aclTensor* query, const aclTensor* key, const aclTensor* cache,
               const aclIntArray* sections, int64_t head_size, bool neox, int64_t cache_mode,
               const aclTensor* query_out, const aclTensor* key_out),
              positions, query, key, cache, sections, head_size, neox, cache_mode, query_out, key_out)
