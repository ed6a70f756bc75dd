// Cross entropy of rows of logits, and what a shard of the vocabulary gives to one.
//
// c = softcap tanh(scale x / softcap), lse = log(sum(exp(c))). Forward reads a row once and keeps lse; backward
// reads it again. Neither holds a row in float32.
#include "blocks.h"

namespace llm_adapt {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Logits {
  Rows x;
  int64_t columns;
  float scale, softcap;  // softcap is 0 for none

  // c of a block of columns.
  const float* read(int64_t row, int64_t at, int64_t count, Block& block) const {
    const float* values = x.read(row, at, count, block);
    if (softcap == 0.0f && scale == 1.0f) return values;
    const float factor = scale;
    float* c = block.values;
    if (softcap == 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) c[i] = values[i] * factor;
      return c;
    }
    const float cap = softcap;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) c[i] = cap * hyperbolic_tangent(values[i] * factor / cap);
    return c;
  }
};

struct Row {
  double lse;
  double total;  // sum of class_weight c
};

float largest(const float* c, int64_t count) {
  float found = -kInfinity;
#pragma omp simd reduction(max : found)
  for (int64_t i = 0; i < count; ++i) found = c[i] > found ? c[i] : found;
  return found;
}

float exponentials(const float* c, int64_t count, float shift) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < count; ++i) total += exponential(c[i] - shift);
  return total;
}

// `weights` only where the total is wanted: of each class, or null for 1.
Row reduce(const Logits& logits, int64_t row, bool wants_total, const float* weights) {
  Block block;
  float most = -kInfinity;
  double sum = 0.0, total = 0.0;
  for (int64_t at = 0; at < logits.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, logits.columns - at);
    const float* c = logits.read(row, at, count, block);
    const float here = largest(c, count);
    if (here > most) {
      if (most != -kInfinity) sum *= std::exp(static_cast<double>(most) - here);
      most = here;
    }
    // Without a finite largest number nothing is subtracted: infinities and NaN then come through.
    sum += exponentials(c, count, std::isinf(most) ? 0.0f : most);
    if (wants_total) {
      float part = 0.0f;
      if (weights == nullptr) {
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < count; ++i) part += c[i];
      } else {
        const float* w = weights + at;
#pragma omp simd reduction(+ : part)
        for (int64_t i = 0; i < count; ++i) part += c[i] * w[i];
      }
      total += part;
    }
  }
  return {(std::isinf(most) ? 0.0 : most) + std::log(sum), total};
}

float one(const Logits& logits, int64_t row, int64_t column) {
  Block block;
  return *logits.read(row, column, 1, block);
}

// dx_j = (softmax_j along - level w_j - [j = target] drop) dc_j/dx_j, with w = 1 where there are no weights.
struct Factors {
  float along, level, drop;
};

void differentiate(const Logits& logits, const Rows& dx, int64_t row, float lse, Factors by, int64_t target,
                   const float* weights) {
  Block block, out;
  const float scale = logits.scale, cap = logits.softcap;
  for (int64_t at = 0; at < logits.columns; at += kBlock) {
    const int64_t count = std::min(kBlock, logits.columns - at);
    const float* c = logits.read(row, at, count, block);
    float* d = dx.room(row, at, out);
    const float along = by.along, level = by.level;
    if (weights == nullptr || level == 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] = exponential(c[i] - lse) * along - level;
    } else {
      const float* w = weights + at;
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] = exponential(c[i] - lse) * along - level * w[i];
    }
    if (target >= at && target < at + count) d[target - at] -= by.drop;
    if (cap != 0.0f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] *= scale * (1.0f - c[i] / cap * (c[i] / cap));
    } else if (scale != 1.0f) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) d[i] *= scale;
    }
    dx.wrote(row, at, count, out);
  }
}

void clear(const Rows& dx, int64_t row, int64_t columns) { std::memset(dx.at(row, 0), 0, columns * bytes_of(dx.type)); }

double sum_of(const std::vector<float>& values) {
  double total = 0.0;
  for (const float value : values) total += value;
  return total;
}

}  // namespace

// loss, z [rows], or of one element where `reduction` is 1 (mean) or 2 (sum). counts = what the mean divides loss and z
// by. Returns the first row whose target is no class, -1 without one.
LLM_ADAPT_EXPORT int64_t llm_adapt_cross_entropy(
    void* x, int64_t stride, int type, const int64_t* target, const void* class_weight, int weight_type, float* loss,
    float* z, float* lses, double* counts, int64_t rows, int64_t columns, int64_t ignore_index, float smoothing,
    float z_loss, float scale, float softcap, int reduction, int threads) {
  double number = 0.0, weight = 0.0;
  const std::vector<float> weights = vector_of(class_weight, weight_type, columns);
  for (int64_t row = 0; row < rows; ++row) {
    if (target[row] == ignore_index) continue;
    if (target[row] < 0 || target[row] >= columns) return row;
    number += 1.0;
    weight += weights.empty() ? 1.0 : weights[target[row]];
  }
  counts[0] = reduction == 1 ? weight : 1.0;
  counts[1] = reduction == 1 ? std::max(number, 1.0) : 1.0;  // without rows the z-loss is 0, and the loss NaN
  const Logits logits{{x, stride, type}, columns, scale, softcap};
  const double all = weights.empty() ? static_cast<double>(columns) : sum_of(weights);
  const float* w = weights.empty() ? nullptr : weights.data();
  std::vector<double> losses(rows), zs(rows);
  const int workers = team(2 * rows * columns, threads);  // an exponential is as long as two columns of a copy
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) {
    lses[row] = 0.0f;
    if (target[row] == ignore_index) continue;
    const Row found = reduce(logits, row, smoothing != 0.0f, w);
    const double lse = found.lse, mine = w == nullptr ? 1.0 : w[target[row]];
    double value = (lse - one(logits, row, target[row])) * mine;
    if (smoothing != 0.0f) value = (1.0 - smoothing) * value + smoothing * (lse * all - found.total) / columns;
    lses[row] = static_cast<float>(found.lse);
    zs[row] = z_loss * lse * lse;
    losses[row] = value;
  }
  if (reduction == 0) {
    for (int64_t row = 0; row < rows; ++row)
      loss[row] = static_cast<float>(losses[row] + zs[row]), z[row] = static_cast<float>(zs[row]);
    return -1;
  }
  double total = 0.0, z_total = 0.0;
  for (int64_t row = 0; row < rows; ++row) total += losses[row], z_total += zs[row];
  *z = static_cast<float>(z_total / counts[1]);
  *loss = static_cast<float>(total / counts[0] + z_total / counts[1]);
  return -1;
}

// upstream [rows], or one element with upstream_stride 0.
LLM_ADAPT_EXPORT void llm_adapt_cross_entropy_backward(
    void* x, int64_t stride, int type, const int64_t* target, const void* class_weight, int weight_type,
    const float* upstream, int64_t upstream_stride, const float* lses, const double* counts, void* dx, int64_t rows,
    int64_t columns, int64_t ignore_index, float smoothing, float z_loss, float scale, float softcap, int threads) {
  const Logits logits{{x, stride, type}, columns, scale, softcap};
  const Rows dx_rows{dx, columns, type};
  const std::vector<float> weights = vector_of(class_weight, weight_type, columns);
  const double all = weights.empty() ? static_cast<double>(columns) : sum_of(weights);
  const float* w = weights.empty() ? nullptr : weights.data();
  const int workers = team(2 * rows * columns, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) {
    if (target[row] == ignore_index) {
      clear(dx_rows, row, columns);
      continue;
    }
    const double d = upstream[row * upstream_stride], dl = d / counts[0];
    const double mine = (w == nullptr ? 1.0 : w[target[row]]) * (1.0 - smoothing), level = smoothing / columns;
    const double along = dl * (mine + level * all) + d / counts[1] * 2.0 * z_loss * lses[row];
    const Factors by{static_cast<float>(along), static_cast<float>(dl * level), static_cast<float>(dl * mine)};
    differentiate(logits, dx_rows, row, lses[row], by, target[row], w);
  }
}

// total may be null. A target that is not in start .. start + columns picks 0.
LLM_ADAPT_EXPORT void llm_adapt_softmax_partials(
    void* x, int64_t stride, int type, const int64_t* target, float* lses, float* picked, float* total, int64_t rows,
    int64_t columns, int64_t start, float scale, float softcap, int threads) {
  const Logits logits{{x, stride, type}, columns, scale, softcap};
  const int workers = team(2 * rows * columns, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const Row found = reduce(logits, row, total != nullptr, nullptr);
    const int64_t column = target[row] - start;
    lses[row] = static_cast<float>(found.lse);
    picked[row] = column >= 0 && column < columns ? one(logits, row, column) : 0.0f;
    if (total != nullptr) total[row] = static_cast<float>(found.total);
  }
}

// dlse, dpicked and dtotal [rows] may each be null, for 0.
LLM_ADAPT_EXPORT void llm_adapt_softmax_partials_backward(
    void* x, int64_t stride, int type, const int64_t* target, const float* lses, const float* dlse,
    const float* dpicked, const float* dtotal, void* dx, int64_t rows, int64_t columns, int64_t start, float scale,
    float softcap, int threads) {
  const Logits logits{{x, stride, type}, columns, scale, softcap};
  const Rows dx_rows{dx, columns, type};
  const int workers = team(2 * rows * columns, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t row = 0; row < rows; ++row) {
    const auto at = [row](const float* values) { return values == nullptr ? 0.0f : values[row]; };
    // A shard of nothing but minus infinity: exp(c) is 0, where exp(c - lse) would be NaN.
    const float lse = lses[row] == -kInfinity ? 0.0f : lses[row];
    differentiate(logits, dx_rows, row, lse, {at(dlse), -at(dtotal), -at(dpicked)}, target[row] - start, nullptr);
  }
}

}  // namespace llm_adapt
