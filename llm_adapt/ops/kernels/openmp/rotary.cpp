// Rotary position embedding: (y_i, y_j) = (x_i cos_i - x_j sin_i, x_j cos_j + x_i sin_j) of each pair of features.
//
// Its gradient is the same rotation with sin_i and sin_j changed for -sin_j and -sin_i, read as y is written and
// written as x is read.
#include "blocks.h"

namespace llm_adapt {
namespace {

struct Rotation {
  char *x, *y;
  int type;
  int64_t x_strides[3], y_strides[3];  // of batch, position and head; features are neighbours
  int64_t features, pairs;             // of a head, and how many of them are rotated
  bool reads_interleaved, writes_interleaved, is_rounded;
};

struct Table {
  Rows cos, sin;
  int64_t batch_stride;  // 0 where all sequences share it
  const int64_t* positions;
  int64_t positions_stride;  // of the batch
  bool is_half, is_interleaved, is_inverse, is_backward;
};

// The factors of one position, a column for each pair.
struct Angles {
  float *cos_i, *cos_j, *sin_i, *sin_j;
};

void columns_of(const Rows& table, int64_t start, const Table& how, int64_t pairs, int rounding, float* first,
                float* second, float* scratch) {
  const int64_t width = how.is_half ? pairs : 2 * pairs;
  const char* place = static_cast<const char*>(table.data) + start * bytes_of(table.type);
  if (table.type == kFloat32) std::memcpy(scratch, place, width * sizeof(float));
  if (table.type == kBFloat16) widen(reinterpret_cast<const BFloat16*>(place), scratch, width);
  if (table.type == kFloat16) widen(reinterpret_cast<const Float16*>(place), scratch, width);
  round_to(rounding, scratch, width);
  for (int64_t pair = 0; pair < pairs; ++pair) {
    first[pair] = scratch[how.is_half || !how.is_interleaved ? pair : 2 * pair];
    second[pair] = scratch[how.is_half ? pair : (how.is_interleaved ? 2 * pair + 1 : pairs + pair)];
  }
}

void fill(const Table& table, int64_t batch, int64_t position, int64_t pairs, int rounding, Angles angles,
          float* scratch) {
  const int64_t place = batch * table.positions_stride + position;
  const int64_t row = table.positions == nullptr ? position : table.positions[place];
  const int64_t start = batch * table.batch_stride;
  columns_of(table.cos, start + row * table.cos.stride, table, pairs, rounding, angles.cos_i, angles.cos_j, scratch);
  columns_of(table.sin, start + row * table.sin.stride, table, pairs, rounding, angles.sin_i, angles.sin_j, scratch);
  if (table.is_inverse != table.is_backward)
    for (int64_t pair = 0; pair < pairs; ++pair) {
      angles.sin_i[pair] = -angles.sin_i[pair];
      angles.sin_j[pair] = -angles.sin_j[pair];
    }
  if (table.is_backward) std::swap_ranges(angles.sin_i, angles.sin_i + pairs, angles.sin_j);
}

template <class T, bool kRounded>
LLM_ADAPT_INLINE float rounded(float value) {
  if (!kRounded) return value;
  T narrowed;
  narrow(value, narrowed);
  return widened(narrowed);
}

// Features of a pair are pairs apart, or neighbours where the step is 2.
template <class T, bool kRounded, int kReadStep, int kWriteStep>
void rotate(const T* __restrict x, T* __restrict y, Angles by, int64_t pairs) {
  const float *cos_i = by.cos_i, *cos_j = by.cos_j, *sin_i = by.sin_i, *sin_j = by.sin_j;
  const T* x_second = x + (kReadStep == 2 ? 1 : pairs);
  T* y_second = y + (kWriteStep == 2 ? 1 : pairs);
#pragma omp simd
  for (int64_t i = 0; i < pairs; ++i) {
    const float a = widened(x[kReadStep * i]), b = widened(x_second[kReadStep * i]);
    narrow(rounded<T, kRounded>(a * cos_i[i]) - rounded<T, kRounded>(b * sin_i[i]), y[kWriteStep * i]);
    narrow(rounded<T, kRounded>(b * cos_j[i]) + rounded<T, kRounded>(a * sin_j[i]), y_second[kWriteStep * i]);
  }
}

template <class T, bool kRounded>
void rotate_as(const Rotation& given, const T* x, T* y, Angles by) {
  if (given.reads_interleaved && given.writes_interleaved) rotate<T, kRounded, 2, 2>(x, y, by, given.pairs);
  else if (given.reads_interleaved) rotate<T, kRounded, 2, 1>(x, y, by, given.pairs);
  else if (given.writes_interleaved) rotate<T, kRounded, 1, 2>(x, y, by, given.pairs);
  else rotate<T, kRounded, 1, 1>(x, y, by, given.pairs);
}

// One head of one position.
template <class T>
void rotate_head(const Rotation& given, const T* x, T* y, Angles by) {
  if (given.is_rounded) rotate_as<T, true>(given, x, y, by);
  else rotate_as<T, false>(given, x, y, by);
  const int64_t rotated = 2 * given.pairs;
  if (given.features > rotated) std::memcpy(y + rotated, x + rotated, (given.features - rotated) * sizeof(T));
}

template <class T>
void rotate_all(const Rotation& given, const Table& table, int64_t batches, int64_t positions, int64_t heads,
                int threads) {
  // Positions at a time: as memory lies, and where heads are the outer axis so many that angles are filled once.
  const int64_t step = given.x_strides[1] >= given.x_strides[2] ? 1 : 32;
  const int64_t pairs = given.pairs, steps = (positions + step - 1) / step;
  const int workers = team(batches * positions * heads * given.features, threads);
  const int rounding = given.is_rounded ? given.type : static_cast<int>(kFloat32);
#pragma omp parallel num_threads(workers) if (workers > 1)
  {
    std::vector<float> memory((4 * step + 2) * pairs);
    float* scratch = memory.data() + 4 * step * pairs;
    const auto angles_of = [&](int64_t place) {
      float* first = memory.data() + 4 * place * pairs;
      return Angles{first, first + pairs, first + 2 * pairs, first + 3 * pairs};
    };
#pragma omp for schedule(static)
    for (int64_t item = 0; item < batches * steps; ++item) {
      const int64_t batch = item / steps, start = (item % steps) * step, count = std::min(step, positions - start);
      for (int64_t place = 0; place < count; ++place)
        fill(table, batch, start + place, pairs, rounding, angles_of(place), scratch);
      for (int64_t head = 0; head < heads; ++head)
        for (int64_t place = 0; place < count; ++place) {
          const int64_t at[3] = {batch, start + place, head};
          int64_t from = 0, to = 0;
          for (int axis = 0; axis < 3; ++axis) {
            from += at[axis] * given.x_strides[axis];
            to += at[axis] * given.y_strides[axis];
          }
          rotate_head(given, reinterpret_cast<const T*>(given.x) + from, reinterpret_cast<T*>(given.y) + to,
                      angles_of(place));
        }
    }
  }
}

}  // namespace

// pairs: 0 = half, 1 = interleaved, 2 = interleaved_to_half. strides: of x, then of y: batch, position, head each.
// Returns the first position that is no row of the tables, of which there are table_rows; -1 when all are.
LLM_ADAPT_EXPORT int64_t llm_adapt_rope(
    void* x, void* y, int type, const int64_t* strides, int64_t batches, int64_t positions, int64_t heads,
    int64_t features, void* cos, void* sin, int cos_type, int sin_type, int64_t row_stride, int64_t batch_stride,
    int64_t table_rows, int64_t pairs_rotated, const int64_t* indices, int64_t indices_stride,
    int pairs, int is_half, int is_rounded, int is_inverse, int is_backward, int threads) {
  if (indices != nullptr)
    for (int64_t i = 0; i < (indices_stride ? batches : 1) * positions; ++i)
      if (indices[i] < 0 || indices[i] >= table_rows) return i;
  bool reads = pairs != 0, writes = pairs == 1;
  if ((is_inverse != 0) != (is_backward != 0)) std::swap(reads, writes);
  Rotation given{static_cast<char*>(x), static_cast<char*>(y), type, {}, {}, features, pairs_rotated, reads, writes,
                 is_rounded != 0 && type != kFloat32};
  for (int axis = 0; axis < 3; ++axis) given.x_strides[axis] = strides[axis], given.y_strides[axis] = strides[3 + axis];
  const Table table{{cos, row_stride, cos_type}, {sin, row_stride, sin_type}, batch_stride, indices, indices_stride,
                    is_half != 0, pairs == 1, is_inverse != 0, is_backward != 0};
  if (type == kFloat32) rotate_all<float>(given, table, batches, positions, heads, threads);
  if (type == kBFloat16) rotate_all<BFloat16>(given, table, batches, positions, heads, threads);
  if (type == kFloat16) rotate_all<Float16>(given, table, batches, positions, heads, threads);
  return -1;
}

}  // namespace llm_adapt
