// Softmax of attention scores: p = softmax(scale x) over the keys that a query sees, 0 for the others.
//
// dx = scale p (dp - sum(dp p)). Of float32 backward reads p; p of 16 bits, rounded, would spoil the difference where
// one key has nearly all the weight, so it is formed again from x and the log-sum-exp of its row.
#include "blocks.h"

namespace llm_adapt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Scores {
  Rows x, p;
  const uint8_t* mask;  // 1 = masked out; null for none
  int64_t mask_strides[4], heads, queries, keys, left, right;  // left, right: -1 for no limit
  const float* sinks;  // of each head; null for none
  float scale;

  // The keys that a query may see by its place alone.
  int64_t first(int64_t query) const {
    return left < 0 ? 0 : std::min(std::max<int64_t>(0, query + keys - queries - left), keys);
  }
  int64_t end(int64_t query) const {
    return right < 0 ? keys : std::min(std::max<int64_t>(0, query + keys - queries + right + 1), keys);
  }
};

struct Place {
  int64_t batch, head, query;
};

Place place_of(const Scores& scores, int64_t row) {
  return {row / (scores.queries * scores.heads), row / scores.queries % scores.heads, row % scores.queries};
}

// scale x of a block of keys, minus infinity where the mask hides.
const float* read(const Scores& scores, const Place& place, int64_t row, int64_t at, int64_t count, Block& block) {
  const float* x = scores.x.read(row, at, count, block);
  const float scale = scores.scale;
  float* values = block.values;
  if (scores.mask == nullptr) {
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) values[i] = x[i] * scale;
    return values;
  }
  const int64_t* strides = scores.mask_strides;
  const uint8_t* mask =
      scores.mask + place.batch * strides[0] + place.head * strides[1] + place.query * strides[2] + at * strides[3];
  const int64_t step = strides[3];
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) values[i] = mask[i * step] ? -kInfinity : x[i] * scale;
  return values;
}

bool sees_any(const Scores& scores, const Place& place, int64_t first, int64_t end) {
  if (scores.mask == nullptr) return first < end;
  const int64_t* strides = scores.mask_strides;
  const uint8_t* mask = scores.mask + place.batch * strides[0] + place.head * strides[1] + place.query * strides[2];
  for (int64_t key = first; key < end; ++key)
    if (!mask[key * strides[3]]) return true;
  return false;
}

void zero(const Rows& p, int64_t row, int64_t from, int64_t to) {
  if (to > from) std::memset(p.at(row, from), 0, (to - from) * bytes_of(p.type));
}

void weigh(const Scores& scores, int64_t row, float* lses) {
  Block block, out;
  const Place place = place_of(scores, row);
  const int64_t first = scores.first(place.query), end = std::max(first, scores.end(place.query));
  float most = scores.sinks == nullptr ? -kInfinity : scores.sinks[place.head];
  double sum = most == -kInfinity ? 0.0 : 1.0;
  for (int64_t at = first; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const float* s = read(scores, place, row, at, count, block);
    float here = -kInfinity, part = 0.0f;
#pragma omp simd reduction(max : here)
    for (int64_t i = 0; i < count; ++i) here = s[i] > here ? s[i] : here;
    if (here > most) {
      if (most != -kInfinity) sum *= std::exp(static_cast<double>(most) - here);
      most = here;
    }
    const float shift = most == -kInfinity ? 0.0f : most;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < count; ++i) part += exponential(s[i] - shift);
    sum += part;
  }
  // A row without any key is 0; one whose keys are all minus infinity is NaN, as of any softmax.
  const bool is_empty = sum == 0.0 && !sees_any(scores, place, first, end);
  const float shift = is_empty || most == -kInfinity ? 0.0f : most;
  const float factor = is_empty ? 0.0f : static_cast<float>(1.0 / sum);
  if (lses != nullptr) lses[row] = is_empty ? kInfinity : shift + static_cast<float>(std::log(sum));
  zero(scores.p, row, 0, first);
  zero(scores.p, row, end, scores.keys);
  for (int64_t at = first; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const float* s = read(scores, place, row, at, count, block);
    float* p = scores.p.room(row, at, out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) p[i] = exponential(s[i] - shift) * factor;
    scores.p.wrote(row, at, count, out);
  }
}

const float* weights_of(const Scores& scores, const Place& place, int64_t row, int64_t at, int64_t count, Block& block,
                        const float* lses) {
  if (!scores.x.exist()) return scores.p.read(row, at, count, block);
  read(scores, place, row, at, count, block);
  const float lse = lses[row];
  float* p = block.values;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) p[i] = exponential(p[i] - lse);
  return p;
}

// dx of a row; returns sum(dp p).
float differentiate(const Scores& scores, const Rows& dp_rows, const Rows& dx, int64_t row, const float* lses) {
  Block p_block, dp_block, out;
  const Place place = place_of(scores, row);
  const int64_t first = scores.first(place.query), end = std::max(first, scores.end(place.query));
  double sum = 0.0;
  for (int64_t at = first; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const float* p = weights_of(scores, place, row, at, count, p_block, lses);
    const float* dp = dp_rows.read(row, at, count, dp_block);
    float part = 0.0f;
#pragma omp simd reduction(+ : part)
    for (int64_t i = 0; i < count; ++i) part += p[i] * dp[i];
    sum += part;
  }
  const float product = static_cast<float>(sum), scale = scores.scale;
  zero(dx, row, 0, first);
  zero(dx, row, end, scores.keys);
  for (int64_t at = first; at < end; at += kBlock) {
    const int64_t count = std::min(kBlock, end - at);
    const float* p = weights_of(scores, place, row, at, count, p_block, lses);
    const float* dp = dp_rows.read(row, at, count, dp_block);
    float* d = dx.room(row, at, out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) d[i] = scale * p[i] * (dp[i] - product);
    dx.wrote(row, at, count, out);
  }
  return product;
}

Scores scores_of(void* x, int64_t stride, int type, void* p, int64_t heads, int64_t queries, int64_t keys, int64_t left,
                 int64_t right, float scale) {
  Scores scores{};
  scores.x = {x, stride, type}, scores.p = {p, keys, type};
  scores.heads = heads, scores.queries = queries, scores.keys = keys;
  scores.left = left, scores.right = right, scores.scale = scale;
  return scores;
}

}  // namespace

// lses [rows] may be null. mask_strides: of batch, head, query and key.
LLM_ADAPT_EXPORT void llm_adapt_masked_softmax(
    void* x, int64_t stride, int type, void* p, const uint8_t* mask, const int64_t* mask_strides, const float* sinks,
    float* lses, int64_t batches, int64_t heads, int64_t queries, int64_t keys, int64_t left, int64_t right,
    float scale, int threads) {
  Scores scores = scores_of(x, stride, type, p, heads, queries, keys, left, right, scale);
  scores.mask = mask, scores.sinks = sinks;
  for (int axis = 0; mask != nullptr && axis < 4; ++axis) scores.mask_strides[axis] = mask_strides[axis];
  const int64_t rows = batches * heads * queries;
  const int workers = team(2 * rows * keys, threads);
#pragma omp parallel for schedule(dynamic, 16) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) weigh(scores, row, lses);
}

// Of x and p one is null: x is given with mask and lses, where p is not read. dsinks [heads] may be null; it needs
// sinks and lses.
LLM_ADAPT_EXPORT void llm_adapt_masked_softmax_backward(
    void* x, int64_t stride, int type, void* p, const uint8_t* mask, const int64_t* mask_strides, const float* sinks,
    const float* lses, void* dp, int64_t dp_stride, void* dx, float* dsinks, int64_t batches, int64_t heads,
    int64_t queries, int64_t keys, int64_t left, int64_t right, float scale, int threads) {
  Scores scores = scores_of(x, stride, type, p, heads, queries, keys, left, right, scale);
  scores.mask = mask;
  for (int axis = 0; mask != nullptr && axis < 4; ++axis) scores.mask_strides[axis] = mask_strides[axis];
  const Rows dp_rows{dp, dp_stride, type}, dx_rows{dx, keys, type};
  const int64_t rows = batches * heads * queries;
  std::vector<float> products(dsinks == nullptr ? 0 : rows);
  const int workers = team(2 * rows * keys, threads);
#pragma omp parallel for schedule(dynamic, 16) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const float product = differentiate(scores, dp_rows, dx_rows, row, lses);
    if (dsinks != nullptr) products[row] = product;
  }
  if (dsinks == nullptr) return;
  std::vector<double> totals(heads);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t head = row / queries % heads;
    totals[head] -= std::exp(static_cast<double>(sinks[head]) - lses[row]) * products[row];
  }
  for (int64_t head = 0; head < heads; ++head) dsinks[head] = static_cast<float>(totals[head]);
}

}  // namespace llm_adapt
