// The dtypes as float32 and back, and functions of float32 that compilers vectorise.
//
// No torch, no libm in loops, no -ffast-math: NaN stays NaN and infinities count. Rounding is to the nearest, of halves
// to the even one, as torch rounds.
#pragma once

#include <cstdint>
#include <cstring>

namespace llm_adapt {

enum Type : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

#define LLM_ADAPT_INLINE inline __attribute__((always_inline))

LLM_ADAPT_INLINE uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}

LLM_ADAPT_INLINE float float_of(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}

LLM_ADAPT_INLINE float widened(float x) { return x; }

LLM_ADAPT_INLINE float widened(BFloat16 x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

LLM_ADAPT_INLINE float widened(Float16 x) {
  // The exponent is moved by a product, which also makes subnormal numbers normal.
  const float magnitude = float_of(static_cast<uint32_t>(x.bits & 0x7fff) << 13) * 0x1p112f;
  const uint32_t special = magnitude >= 65536.0f ? 0x7f800000u : 0u;
  return float_of(bits_of(magnitude) | special | static_cast<uint32_t>(x.bits & 0x8000) << 16);
}

LLM_ADAPT_INLINE void narrow(float x, float& y) { y = x; }

LLM_ADAPT_INLINE void narrow(float x, BFloat16& y) {
  const uint32_t bits = bits_of(x);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  y.bits = static_cast<uint16_t>(x != x ? 0x7fc0u : rounded);
}

LLM_ADAPT_INLINE void narrow(float x, Float16& y) {
  const uint32_t magnitude = bits_of(x) & 0x7fffffffu, sign = (bits_of(x) >> 16) & 0x8000u;
  const uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;  // the sum rounds
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t small = magnitude < 0x38800000u ? subnormal : normal;
  y.bits = static_cast<uint16_t>(sign | (magnitude >= 0x47800000u ? special : small));
}

LLM_ADAPT_INLINE float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

// exp(x) / 2, to about one rounding; 0 for what float32 holds as a subnormal only, and NaN stays. Twice it is infinite
// where exp(x) is. log(2) in two parts is of Cephes' expf; the polynomial is a minimax fit, off by 3e-9.
LLM_ADAPT_INLINE float half_of_exponential(float x) {
  // The sum with 1.5 * 2^23 rounds to an integer n; with 126 more, its last bits are the exponent of 2^(n - 1). Beyond
  // n = 128 the rest r grows instead. An integer minimum, since one of floats that keeps NaN is no single instruction.
  const float sum = fused(x, 1.44269504088896341f, 12583038.0f);
  const int32_t most = 0x4b4000fe, bits = static_cast<int32_t>(bits_of(sum));
  const uint32_t bounded = static_cast<uint32_t>(bits < most ? bits : most);
  const float n = float_of(bounded) - 12583038.0f;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float p = fused(1.3814539e-3f, r, 8.3687454e-3f);
  p = fused(p, r, 4.1668389e-2f);
  p = fused(p, r, 1.6666521e-1f);
  p = fused(p, r, 4.9999994e-1f);
  p = fused(p, r * r, r);
  const float power = float_of(bounded << 23);
  const float y = fused(power, p, power);
  return x < -87.0f ? 0.0f : y;
}

LLM_ADAPT_INLINE float exponential(float x) {
  const float half = half_of_exponential(x);
  return half + half;
}

LLM_ADAPT_INLINE float logistic(float x) { return 1.0f / fused(2.0f, half_of_exponential(-x), 1.0f); }

// tanh(x). Source of the constants: Cephes tanhf.
LLM_ADAPT_INLINE float hyperbolic_tangent(float x) {
  const float size = x < 0.0f ? -x : x, square = x * x;
  float p = fused(-5.70498872745e-3f, square, 2.06390887954e-2f);
  p = fused(p, square, -5.37397155531e-2f);
  p = fused(p, square, 1.33314422036e-1f);
  p = fused(p, square, -3.33332819422e-1f);
  const float small = fused(p * square, x, x);
  const float large = 1.0f - 2.0f / (exponential(2.0f * size) + 1.0f);
  return size < 0.625f ? small : (x < 0.0f ? -large : large);  // NaN takes the second way, and stays
}

// erf(x), off by at most 1.5e-7. Source: Abramowitz and Stegun, 7.1.26.
LLM_ADAPT_INLINE float error_function(float x) {
  const float size = x < 0.0f ? -x : x;
  const float t = 1.0f / fused(0.3275911f, size, 1.0f);
  float p = fused(1.061405429f, t, -1.453152027f);
  p = fused(p, t, 1.421413741f);
  p = fused(p, t, -0.284496736f);
  p = fused(p, t, 0.254829592f);
  const float y = 1.0f - p * t * exponential(-size * size);
  return x < 0.0f ? -y : y;
}

}  // namespace llm_adapt
