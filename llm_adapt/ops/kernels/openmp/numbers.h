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
  const uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  y.bits = static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16);
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

// exp(x), to about one rounding; 0 for what float32 holds as a subnormal only. Source of the constants: Cephes expf.
LLM_ADAPT_INLINE float exponential(float x) {
  const float shifted = fused(x, 1.44269504088896341f, 12582912.0f);  // 1.5 * 2^23: the sum rounds to an integer
  const float n = shifted - 12582912.0f;
  float r = fused(n, -0.693359375f, x);
  r = fused(n, 2.12194440e-4f, r);
  float p = fused(1.9875691500e-4f, r, 1.3981999507e-3f);
  p = fused(p, r, 8.3334519073e-3f);
  p = fused(p, r, 4.1665795894e-2f);
  p = fused(p, r, 1.6666665459e-1f);
  p = fused(p, r, 5.0000001201e-1f);
  p = fused(p, r * r, r) + 1.0f;
  // 2 * 2^(n - 1), since n may be 128; the bits of 2^(n - 1) come from those of n + 1.5 * 2^23.
  const float y = (p + p) * float_of((bits_of(shifted) + 126u) << 23);
  // Beyond these x the bits mean nothing. NaN takes neither way, and stays.
  return x < -87.0f ? 0.0f : (x > 88.73f ? float_of(0x7f800000u) : y);
}

LLM_ADAPT_INLINE float logistic(float x) { return 1.0f / (1.0f + exponential(-x)); }

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
