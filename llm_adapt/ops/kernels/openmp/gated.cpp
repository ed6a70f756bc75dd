// Gated linear units and activations: y = f(gate + bias) (up + bias + offset) weight, or y = f(x + bias) weight.
//
// Backward forms f again: only the inputs are kept.
#include "blocks.h"

namespace llm_adapt {
namespace {

// The order of `_ACTIVATIONS` in gated.py.
enum Activation : int { kGelu, kGeluTanh, kQuickGelu, kRelu, kReluSquared, kSigmoid, kSilu };

struct Pair {
  float value, slope;
};

// Each has f(x) alone and with f'(x); alpha belongs to silu.
struct Gelu {
  static LLM_ADAPT_INLINE float value(float x, float) {
    return 0.5f * x * (1.0f + error_function(x * 0.70710678118654752f));
  }
  static LLM_ADAPT_INLINE Pair both(float x, float) {
    const float half = 0.5f * (1.0f + error_function(x * 0.70710678118654752f));
    return {x * half, half + x * 0.39894228040143268f * exponential(-0.5f * x * x)};
  }
};

struct GeluTanh {
  static LLM_ADAPT_INLINE float value(float x, float) {
    return 0.5f * x * (1.0f + hyperbolic_tangent(0.79788456080286536f * (x + 0.044715f * x * x * x)));
  }
  static LLM_ADAPT_INLINE Pair both(float x, float) {
    const float tangent = hyperbolic_tangent(0.79788456080286536f * (x + 0.044715f * x * x * x));
    const float inner = 0.79788456080286536f * (1.0f + 0.134145f * x * x);
    const float half = 0.5f * (1.0f + tangent);
    return {x * half, half + 0.5f * x * (1.0f - tangent * tangent) * inner};
  }
};

struct Silu {
  static LLM_ADAPT_INLINE float value(float x, float alpha) { return x * logistic(alpha * x); }
  static LLM_ADAPT_INLINE Pair both(float x, float alpha) {
    const float s = logistic(alpha * x);
    return {x * s, s * (1.0f + alpha * x * (1.0f - s))};
  }
};

struct Sigmoid {
  static LLM_ADAPT_INLINE float value(float x, float) { return logistic(x); }
  static LLM_ADAPT_INLINE Pair both(float x, float) {
    const float s = logistic(x);
    return {s, s * (1.0f - s)};
  }
};

struct Relu {
  static LLM_ADAPT_INLINE float value(float x, float) { return x < 0.0f ? 0.0f : x; }
  static LLM_ADAPT_INLINE Pair both(float x, float alpha) { return {value(x, alpha), x > 0.0f ? 1.0f : 0.0f}; }
};

struct ReluSquared {
  static LLM_ADAPT_INLINE float value(float x, float) { return x < 0.0f ? 0.0f : x * x; }
  static LLM_ADAPT_INLINE Pair both(float x, float alpha) { return {value(x, alpha), x < 0.0f ? 0.0f : 2.0f * x}; }
};

struct Gate {
  Rows x, up;    // x holds both parts where `up` does not exist and `is_gated`
  Rows y, dx, dup;
  const float *bias, *weights;
  int64_t columns;  // of y
  int64_t gate_at, up_at, step;  // first columns of the parts in x, and how far their columns are apart: 1 or 2
  float alpha, limit, offset;    // limit is infinite for none
  bool is_gated;

  bool is_plain() const { return weights == nullptr && offset == 0.0f && std::isinf(limit); }
};

struct Scratch {
  Block gate, up, packed, dy, gate_out, up_out;
};

struct Parts {
  const float *gate, *up;
};

// Columns of gate and up in a block: half as many where they alternate in x.
int64_t width_of(const Gate& given) { return kBlock / given.step; }

const float* biased(const float* values, const float* bias, int64_t step, int64_t count, Block& block) {
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) block.values[i] = values[i] + bias[i * step];
  return block.values;
}

// Gate and up with their biases, not yet limited.
Parts parts_of(const Gate& given, int64_t row, int64_t at, int64_t count, Scratch& scratch) {
  Parts found{scratch.gate.values, nullptr};
  if (given.step == 2) {
    const float* both = given.x.read(row, 2 * at, 2 * count, scratch.packed);
    float *gate = scratch.gate.values, *up = scratch.up.values;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) gate[i] = both[2 * i], up[i] = both[2 * i + 1];
    found.up = up;
  } else {
    found.gate = given.x.read(row, given.gate_at + at, count, scratch.gate);
    if (given.up.exist()) found.up = given.up.read(row, at, count, scratch.up);
    else if (given.is_gated) found.up = given.x.read(row, given.up_at + at, count, scratch.up);
  }
  if (given.bias == nullptr) return found;
  const float* bias = given.bias + at * given.step;
  found.gate = biased(found.gate, bias + given.gate_at, given.step, count, scratch.gate);
  if (given.is_gated) found.up = biased(found.up, bias + given.up_at, given.step, count, scratch.up);
  return found;
}

LLM_ADAPT_INLINE float at_most(float x, float limit) { return x > limit ? limit : x; }
LLM_ADAPT_INLINE float within(float x, float limit) { return x < -limit ? -limit : at_most(x, limit); }

template <class F>
void forward_row(const Gate& given, int64_t row) {
  Scratch scratch;
  const int64_t width = width_of(given);
  const float weight = given.weights == nullptr ? 1.0f : given.weights[row];
  const float alpha = given.alpha, limit = given.limit, offset = given.offset;
  for (int64_t at = 0; at < given.columns; at += width) {
    const int64_t count = std::min(width, given.columns - at);
    const Parts parts = parts_of(given, row, at, count, scratch);
    const float *a = parts.gate, *b = parts.up;
    float* y = given.y.room(row, at, scratch.gate_out);
    if (b == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] = F::value(a[i], alpha) * weight;
    } else if (given.is_plain()) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) y[i] = F::value(a[i], alpha) * b[i];
    } else {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i)
        y[i] = F::value(at_most(a[i], limit), alpha) * (within(b[i], limit) + offset) * weight;
    }
    given.y.wrote(row, at, count, scratch.gate_out);
  }
}

struct Grads {
  float *gate, *up;
};

// Where the gradients of a block are put, and brought to their place.
Grads grads_of(const Gate& given, int64_t row, int64_t at, Scratch& scratch) {
  if (given.step == 2) return {scratch.gate_out.values, scratch.up_out.values};
  Grads found{given.dx.room(row, given.gate_at + at, scratch.gate_out), nullptr};
  if (given.up.exist()) found.up = given.dup.room(row, at, scratch.up_out);
  else if (given.is_gated) found.up = given.dx.room(row, given.up_at + at, scratch.up_out);
  return found;
}

void wrote(const Gate& given, int64_t row, int64_t at, int64_t count, Scratch& scratch) {
  if (given.step == 2) {
    float* both = given.dx.room(row, 2 * at, scratch.packed);
    const float *gate = scratch.gate_out.values, *up = scratch.up_out.values;
#pragma omp simd
    for (int64_t i = 0; i < count; ++i) both[2 * i] = gate[i], both[2 * i + 1] = up[i];
    given.dx.wrote(row, 2 * at, 2 * count, scratch.packed);
    return;
  }
  given.dx.wrote(row, given.gate_at + at, count, scratch.gate_out);
  if (given.up.exist()) given.dup.wrote(row, at, count, scratch.up_out);
  else if (given.is_gated) given.dx.wrote(row, given.up_at + at, count, scratch.up_out);
}

// The gradient of a row; those of the bias are added to dbias, that of the weight of the row is returned.
template <class F>
float backward_row(const Gate& given, const Rows& dy_rows, int64_t row, float* dbias) {
  Scratch scratch;
  const int64_t width = width_of(given);
  const float weight = given.weights == nullptr ? 1.0f : given.weights[row];
  const float alpha = given.alpha, limit = given.limit, offset = given.offset;
  double dweight = 0.0;
  for (int64_t at = 0; at < given.columns; at += width) {
    const int64_t count = std::min(width, given.columns - at);
    const Parts parts = parts_of(given, row, at, count, scratch);
    const float *a = parts.gate, *b = parts.up;
    const Grads to = grads_of(given, row, at, scratch);
    const float* dy = dy_rows.read(row, at, count, scratch.dy);
    float *da = to.gate, *db = to.up;
    float product = 0.0f;
    if (b == nullptr) {
#pragma omp simd reduction(+ : product)
      for (int64_t i = 0; i < count; ++i) {
        const Pair f = F::both(a[i], alpha);
        product += dy[i] * f.value;
        da[i] = dy[i] * weight * f.slope;
      }
    } else if (given.is_plain()) {
#pragma omp simd
      for (int64_t i = 0; i < count; ++i) {
        const Pair f = F::both(a[i], alpha);
        db[i] = dy[i] * f.value;
        da[i] = dy[i] * b[i] * f.slope;
      }
    } else {
#pragma omp simd reduction(+ : product)
      for (int64_t i = 0; i < count; ++i) {
        const Pair f = F::both(at_most(a[i], limit), alpha);
        const float linear = within(b[i], limit) + offset, scaled = dy[i] * weight;
        const float was_within = (b[i] < -limit) | (b[i] > limit) ? 0.0f : 1.0f;
        product += dy[i] * f.value * linear;
        db[i] = scaled * f.value * was_within;
        da[i] = a[i] > limit ? 0.0f : scaled * linear * f.slope;
      }
    }
    dweight += product;
    if (dbias != nullptr) {
      const int64_t step = given.step;
      float* sum = dbias + at * step;
      for (int64_t i = 0; i < count; ++i) sum[given.gate_at + i * step] += da[i];
      for (int64_t i = 0; given.is_gated && i < count; ++i) sum[given.up_at + i * step] += db[i];
    }
    wrote(given, row, at, count, scratch);
  }
  return static_cast<float>(dweight);
}

template <class Act>
void with_activation(int activation, Act act) {
  switch (activation) {
    case kGelu: return act(Gelu());
    case kGeluTanh: return act(GeluTanh());
    case kRelu: return act(Relu());
    case kReluSquared: return act(ReluSquared());
    case kSigmoid: return act(Sigmoid());
    default: return act(Silu());  // quick_gelu is silu with alpha = 1.702
  }
}

// layout: 0 = halves, 1 = halves_swapped, 2 = interleaved; 0 for a separate `up`, and without a gate.
Gate gate_of(Rows x, Rows up, const std::vector<float>& bias, const float* weights, int64_t columns, int activation,
             int layout, int is_gated) {
  Gate gate{};
  gate.x = x, gate.up = up, gate.weights = weights, gate.columns = columns, gate.is_gated = is_gated != 0;
  gate.bias = bias.empty() ? nullptr : bias.data();
  gate.step = layout == 2 ? 2 : 1;
  gate.gate_at = layout == 1 ? columns : 0;
  gate.up_at = layout == 2 ? 1 : (layout == 1 ? 0 : columns);
  gate.alpha = activation == kQuickGelu ? 1.702f : 1.0f;
  gate.limit = std::numeric_limits<float>::infinity();
  return gate;
}

}  // namespace

LLM_ADAPT_EXPORT void llm_adapt_gated(
    void* x, int64_t x_stride, void* up, int64_t up_stride, int type, const void* bias, int bias_type,
    const float* weights, void* y, int64_t rows, int64_t columns, int activation, int layout, int is_gated, float alpha,
    float limit, float offset, int threads) {
  const std::vector<float> b = vector_of(bias, bias_type, is_gated ? 2 * columns : columns);
  Gate gate = gate_of({x, x_stride, type}, {up, up_stride, type}, b, weights, columns, activation, layout, is_gated);
  gate.y = {y, columns, type};
  gate.alpha *= alpha, gate.limit = limit, gate.offset = offset;
  const int workers = team(2 * rows * columns, threads);  // an exponential is as long as two columns of a copy
  with_activation(activation, [&](auto f) {
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int64_t row = 0; row < rows; ++row) forward_row<decltype(f)>(gate, row);
  });
}

// dx is shaped as x with rows side by side, dup as up.
LLM_ADAPT_EXPORT void llm_adapt_gated_backward(
    void* x, int64_t x_stride, void* up, int64_t up_stride, int type, const void* bias, int bias_type,
    const float* weights, void* dy, int64_t dy_stride, void* dx, void* dup, void* dbias, float* dweights, int64_t rows,
    int64_t columns, int activation, int layout, int is_gated, float alpha, float limit, float offset, int threads) {
  const int64_t width = is_gated ? 2 * columns : columns;
  const std::vector<float> b = vector_of(bias, bias_type, width);
  Gate gate = gate_of({x, x_stride, type}, {up, up_stride, type}, b, weights, columns, activation, layout, is_gated);
  gate.dx = {dx, up == nullptr ? width : columns, type};
  gate.dup = {dup, columns, type};
  gate.alpha *= alpha, gate.limit = limit, gate.offset = offset;
  const Rows dy_rows{dy, dy_stride, type};
  const Cut cut(rows, dbias != nullptr);
  Sums biases(cut, width, dbias != nullptr);
  const int workers = team(2 * rows * columns, threads);
  with_activation(activation, [&](auto f) {
#pragma omp parallel for schedule(static) num_threads(workers) if (workers > 1)
    for (int64_t part = 0; part < cut.parts; ++part)
      for (int64_t row = cut.begin(part); row < cut.begin(part + 1); ++row) {
        const float found = backward_row<decltype(f)>(gate, dy_rows, row, biases.of(part));
        if (dweights != nullptr) dweights[row] = found;
      }
  });
  if (dbias != nullptr) store(biases.total(), dbias, bias_type);
}

}  // namespace llm_adapt
