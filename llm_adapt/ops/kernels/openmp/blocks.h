// Tensors as rows of columns in a dtype known at run time, read and written in blocks of float32.
//
// A block lies in the first cache of a core, so that converting costs next to nothing beside reading memory, and what
// computes is written once for all dtypes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <limits>
#include <vector>

#include "numbers.h"

#define LLM_ADAPT_EXPORT extern "C" __attribute__((visibility("default")))

namespace llm_adapt {

constexpr int64_t kBlock = 1024;
constexpr int64_t kLeastWork = 1 << 15;  // elements for which a further thread pays

struct alignas(64) Block {
  float values[kBlock];
};

template <class T>
void widen(const T* __restrict from, float* __restrict to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) to[i] = widened(from[i]);
}

template <class T>
void narrow_all(const float* __restrict from, T* __restrict to, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) narrow(from[i], to[i]);
}

inline int64_t bytes_of(int type) { return type == kFloat32 ? 4 : 2; }

template <class T>
void round_all(float* values, int64_t count) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) {
    T rounded;
    narrow(values[i], rounded);
    values[i] = widened(rounded);
  }
}

// Rounds to a dtype and back.
inline void round_to(int type, float* values, int64_t count) {
  if (type == kBFloat16) round_all<BFloat16>(values, count);
  if (type == kFloat16) round_all<Float16>(values, count);
}

// Rows of a tensor, `stride` elements apart; the columns of a row are neighbours.
struct Rows {
  void* data;
  int64_t stride;
  int type;

  bool exist() const { return data != nullptr; }

  char* at(int64_t row, int64_t column) const {
    return static_cast<char*>(data) + (row * stride + column) * bytes_of(type);
  }

  // Columns of a row as float32: where they lie, or converted into the block.
  const float* read(int64_t row, int64_t column, int64_t count, Block& block) const {
    char* place = at(row, column);
    if (type == kFloat32) return reinterpret_cast<const float*>(place);
    if (type == kBFloat16) widen(reinterpret_cast<const BFloat16*>(place), block.values, count);
    if (type == kFloat16) widen(reinterpret_cast<const Float16*>(place), block.values, count);
    return block.values;
  }

  // Where to put float32 values of columns; `wrote` brings them to their place.
  float* room(int64_t row, int64_t column, Block& block) const {
    return type == kFloat32 ? reinterpret_cast<float*>(at(row, column)) : block.values;
  }

  void wrote(int64_t row, int64_t column, int64_t count, const Block& block) const {
    char* place = at(row, column);
    if (type == kBFloat16) narrow_all(block.values, reinterpret_cast<BFloat16*>(place), count);
    if (type == kFloat16) narrow_all(block.values, reinterpret_cast<Float16*>(place), count);
  }
};

// A vector of any dtype in float32; empty where there is none.
inline std::vector<float> vector_of(const void* data, int type, int64_t count) {
  std::vector<float> found(data == nullptr ? 0 : count);
  if (data == nullptr) return found;
  if (type == kFloat32) std::memcpy(found.data(), data, count * sizeof(float));
  if (type == kBFloat16) widen(static_cast<const BFloat16*>(data), found.data(), count);
  if (type == kFloat16) widen(static_cast<const Float16*>(data), found.data(), count);
  return found;
}

inline void store(const std::vector<float>& values, void* data, int type) {
  const auto count = static_cast<int64_t>(values.size());
  if (type == kFloat32) std::memcpy(data, values.data(), count * sizeof(float));
  if (type == kBFloat16) narrow_all(values.data(), static_cast<BFloat16*>(data), count);
  if (type == kFloat16) narrow_all(values.data(), static_cast<Float16*>(data), count);
}

// How many threads work on so many elements.
inline int team(int64_t elements, int threads) {
  return static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, elements / kLeastWork)));
}

// Rows cut into parts that do not depend on the number of threads.
struct Cut {
  int64_t rows, parts;

  // Where something is summed over rows each part costs a vector of sums.
  Cut(int64_t rows, bool is_summed)
      : rows(rows), parts(std::max<int64_t>(1, std::min<int64_t>(64, is_summed ? rows / 8 : rows))) {}

  int64_t begin(int64_t part) const { return rows * part / parts; }
};

// Sums over rows, such as the gradient of a weight. Those of the parts are added up in their order, so that the result
// has the same bits for any number of threads.
class Sums {
 public:
  Sums(Cut cut, int64_t columns, bool is_wanted) : columns_(columns), values_(is_wanted ? cut.parts * columns : 0) {}

  float* of(int64_t part) { return values_.empty() ? nullptr : values_.data() + part * columns_; }

  std::vector<float> total() const {
    std::vector<float> found(columns_);
    for (size_t at = 0; at < values_.size(); at += columns_)
      for (int64_t column = 0; column < columns_; ++column) found[column] += values_[at + column];
    return found;
  }

 private:
  int64_t columns_;
  std::vector<float> values_;
};

}  // namespace llm_adapt
