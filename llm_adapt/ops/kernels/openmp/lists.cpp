// Sums over the elements of one tensor of a list.
#include "blocks.h"

namespace llm_adapt {
namespace {

template <class T>
double squares_of(const T* values, int64_t count) {
  double total = 0.0;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t end = std::min(at + kBlock, count);
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = at; i < end; ++i) {
      const float value = widened(values[i]);
      sum += value * value;
    }
    total += sum;
  }
  return total;
}

double squares_of(const Rows& all, int64_t begin, int64_t end) {
  const char* place = all.at(0, begin);
  if (all.type == kBFloat16) return squares_of(reinterpret_cast<const BFloat16*>(place), end - begin);
  if (all.type == kFloat16) return squares_of(reinterpret_cast<const Float16*>(place), end - begin);
  return squares_of(reinterpret_cast<const float*>(place), end - begin);
}

}  // namespace

// The sum of the squares of `count` neighbours, with the same bits for any number of threads.
LLM_ADAPT_EXPORT double llm_adapt_squares(void* data, int64_t count, int type, int threads) {
  const Rows all{data, count, type};
  const Cut cut((count + kBlock - 1) / kBlock, false);
  std::vector<double> sums(cut.parts);
  const int workers = team(count, threads);
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
  for (int64_t part = 0; part < cut.parts; ++part)
    sums[part] = squares_of(all, cut.begin(part) * kBlock, std::min(cut.begin(part + 1) * kBlock, count));
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

}  // namespace llm_adapt
