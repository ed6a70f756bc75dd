// RMSNorm and LayerNorm, alone and of a sum: h = x or x + residual, n = (h - mean) rstd, y = n w + bias.
//
// With g = dy w: dh = rstd (g - mean(g) - n mean(g n)), dw = sum of dy n over the rows, dbias = sum of dy. An RMSNorm
// has mean = 0 and no mean(g).
#include "blocks.h"

namespace llm_adapt {
namespace {

enum Form : int { kStandard = 0, kCastFirst = 1, kOnePlus = 2, kOnePlusRounded = 3 };

struct Norm {
  Rows x, residual, h, y;
  const float *weight, *bias;
  int64_t columns;
  float eps;
  bool is_centered;
  int narrow_type;  // what n is rounded to before it meets the weight; kFloat32 = not at all
};

std::vector<float> factors(const void* weight, int type, int form, int64_t count) {
  std::vector<float> found = vector_of(weight, type, count);
  if (form == kOnePlus || form == kOnePlusRounded)
    for (float& factor : found) factor += 1.0f;
  if (form == kOnePlusRounded) round_to(type, found.data(), static_cast<int64_t>(found.size()));
  return found;
}

float sum(const float* values, int64_t count) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += values[i];
  return total;
}

float squares(const float* values, int64_t count, float mean) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += (values[i] - mean) * (values[i] - mean);
  return total;
}

// Columns of h. The first time they are added up they are stored as well.
const float* hidden(const Norm& norm, int64_t row, int64_t column, int64_t count, Block& block, bool is_first) {
  if (!norm.residual.exist()) return norm.x.read(row, column, count, block);
  if (!is_first) return norm.h.read(row, column, count, block);
  Block other;
  const float* a = norm.x.read(row, column, count, block);
  const float* b = norm.residual.read(row, column, count, other);
  float* h = norm.h.room(row, column, block);
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) h[i] = a[i] + b[i];
  norm.h.wrote(row, column, count, block);
  round_to(norm.h.type, h, count);
  return h;
}

// Mean of a row, 0 unless it is centered, and mean of the squares about it. Those of blocks are put together as Chan,
// Golub and LeVeque 1979 do, so that a row is read once, and a mean far from 0 costs no digits.
struct Moments {
  double mean = 0.0, squares = 0.0;
};

Moments moments_of(const Norm& norm, int64_t row) {
  Block block;
  Moments found;
  for (int64_t at = 0; at < norm.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, norm.columns - at);
    const float* h = hidden(norm, row, at, count, block, true);
    const float mean = norm.is_centered ? sum(h, count) / static_cast<float>(count) : 0.0f;
    const double ahead = mean - found.mean, all = static_cast<double>(at + count);
    found.squares += squares(h, count, mean) + ahead * ahead * at * count / all;
    found.mean += ahead * count / all;
  }
  found.squares /= norm.columns;
  return found;
}

void normalise(const Norm& norm, int64_t row, float* means, float* rstds) {
  Block block, out;
  const Moments moments = moments_of(norm, row);
  const float middle = static_cast<float>(moments.mean);
  const float rstd = 1.0f / std::sqrt(static_cast<float>(moments.squares) + norm.eps);
  if (means != nullptr) means[row] = middle;
  if (rstds != nullptr) rstds[row] = rstd;
  for (int64_t at = 0; at < norm.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, norm.columns - at);
    const float* h = hidden(norm, row, at, count, block, false);
    float* y = norm.y.room(row, at, out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) y[i] = (h[i] - middle) * rstd;
    round_to(norm.narrow_type, y, count);
    if (norm.weight != nullptr) {
      const float* w = norm.weight + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] *= w[i];
    }
    if (norm.bias != nullptr) {
      const float* b = norm.bias + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] += b[i];
    }
    norm.y.wrote(row, at, count, out);
  }
}

struct Backward {
  Rows h, dy, dh, dx;  // dh: what comes in for h itself
  const float* weight;
  const float *means, *rstds;
  int64_t columns;
  bool is_centered;
};

// dw and dbias of this row are added to what is there.
void differentiate(const Backward& given, int64_t row, float* dw, float* dbias) {
  Block h_block, dy_block, dh_block, out, g_block;
  const float mean = given.is_centered ? given.means[row] : 0.0f, rstd = given.rstds[row];
  double products = 0.0, total = 0.0;
  for (int64_t at = 0; at < given.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, given.columns - at);
    const float* h = given.h.read(row, at, count, h_block);
    const float* dy = given.dy.read(row, at, count, dy_block);
    const float* w = given.weight == nullptr ? nullptr : given.weight + at;
    float product = 0.0f, part = 0.0f;
    if (w == nullptr) {
#pragma omp simd reduction(+ : product, part)
      for (int64_t i = 0; i < count; ++i) product += dy[i] * (h[i] - mean), part += dy[i];
    } else {
#pragma omp simd reduction(+ : product, part)
      for (int64_t i = 0; i < count; ++i) product += dy[i] * w[i] * (h[i] - mean), part += dy[i] * w[i];
    }
    products += product, total += part;
  }
  const float along = static_cast<float>(products * rstd / given.columns);
  const float level = given.is_centered ? static_cast<float>(total / given.columns) : 0.0f;
  for (int64_t at = 0; at < given.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, given.columns - at);
    const float* h = given.h.read(row, at, count, h_block);
    const float* dy = given.dy.read(row, at, count, dy_block);
    const float* g = dy;
    if (dw != nullptr) {
      float* to = dw + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i] += dy[i] * ((h[i] - mean) * rstd);
    }
    if (dbias != nullptr) {
      float* to = dbias + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) to[i] += dy[i];
    }
    if (!given.dx.exist()) continue;
    if (given.weight != nullptr) {
      const float* w = given.weight + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) g_block.values[i] = dy[i] * w[i];
      g = g_block.values;
    }
    float* dx = given.dx.room(row, at, out);
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) dx[i] = rstd * (g[i] - level - (h[i] - mean) * rstd * along);
    if (given.dh.exist()) {
      const float* dh = given.dh.read(row, at, count, dh_block);
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) dx[i] += dh[i];
    }
    given.dx.wrote(row, at, count, out);
  }
}

}  // namespace

LLM_ADAPT_EXPORT void llm_adapt_norm(
    void* x, int64_t x_stride, int x_type, void* residual, int64_t residual_stride, int residual_type, void* h,
    int h_type, const void* weight, int weight_type, const void* bias, int bias_type, void* y, int y_type, float* means,
    float* rstds, int64_t rows, int64_t columns, float eps, int form, int is_centered, int threads) {
  const std::vector<float> w = factors(weight, weight_type, form, columns);
  const std::vector<float> b = vector_of(bias, bias_type, columns);
  const Norm norm{{x, x_stride, x_type},
                  {residual, residual_stride, residual_type},
                  {h, columns, h_type},
                  {y, columns, y_type},
                  w.empty() ? nullptr : w.data(),
                  b.empty() ? nullptr : b.data(),
                  columns,
                  eps,
                  is_centered != 0,
                  form == kCastFirst ? h_type : static_cast<int>(kFloat32)};
  const int workers = team(rows * columns, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) normalise(norm, row, means, rstds);
}

LLM_ADAPT_EXPORT void llm_adapt_norm_backward(
    void* h, int64_t h_stride, int h_type, const void* weight, int weight_type, void* dy, int64_t dy_stride,
    int dy_type, void* dh, int64_t dh_stride, int dh_type, float* means, float* rstds, void* dx, void* dw, void* dbias,
    int bias_type, int64_t rows, int64_t columns, int form, int is_centered, int threads) {
  const std::vector<float> w = factors(weight, weight_type, form, columns);
  const Backward given{{h, h_stride, h_type},
                       {dy, dy_stride, dy_type},
                       {dh, dh_stride, dh_type},
                       {dx, columns, h_type},
                       w.empty() ? nullptr : w.data(),
                       means,
                       rstds,
                       columns,
                       is_centered != 0};
  const Cut cut(rows, dw != nullptr || dbias != nullptr);
  Sums weights(cut, columns, dw != nullptr), biases(cut, columns, dbias != nullptr);
  const int workers = team(rows * columns, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t part = 0; part < cut.parts; ++part)
    for (int64_t row = cut.begin(part); row < cut.begin(part + 1); ++row)
      differentiate(given, row, weights.of(part), biases.of(part));
  if (dw != nullptr) store(weights.total(), dw, weight_type);
  if (dbias != nullptr) store(biases.total(), dbias, bias_type);
}

}  // namespace llm_adapt
