// What numbers.h computes and how many threads there are, for those who want to see it: the tests.
#include <omp.h>

#include "blocks.h"

namespace llm_adapt {

LLM_ADAPT_EXPORT int llm_adapt_threads() { return omp_get_max_threads(); }

// Reads `count` numbers of one dtype, and writes them in another.
LLM_ADAPT_EXPORT void llm_adapt_convert(void* from, int from_type, void* to, int to_type, int64_t count) {
  const Rows source{from, count, from_type}, target{to, count, to_type};
  Block block, out;
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t size = std::min(kBlock, count - at);
    const float* values = source.read(0, at, size, block);
    float* room = target.room(0, at, out);
    for (int64_t i = 0; i < size; ++i) room[i] = values[i];
    target.wrote(0, at, size, out);
  }
}

// which: 0 = exp, 1 = tanh, 2 = erf.
LLM_ADAPT_EXPORT void llm_adapt_function(int which, const float* x, float* y, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i)
    y[i] = which == 0 ? exponential(x[i]) : (which == 1 ? hyperbolic_tangent(x[i]) : error_function(x[i]));
}

}  // namespace llm_adapt
