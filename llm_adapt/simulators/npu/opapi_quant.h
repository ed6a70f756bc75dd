// What the aclnn entry points of quantised operators share.
#pragma once
#include <limits>

#include "opapi_moe.h"

namespace llm_adapt::opapi {

// Round to the nearest, halves to even, and stay within the integer type of the output.
inline void store_rounded(const Tensor& output, const Tensor& values) {
  const bool is_int8 = output.scalar_type() == at::kChar;
  const double low = is_int8 ? -128.0 : output.scalar_type() == at::kByte ? 0.0 : -2147483648.0;
  const double high = is_int8 ? 127.0 : output.scalar_type() == at::kByte ? 255.0 : 2147483647.0;
  store(output, values.round().to(at::kDouble).clamp(low, high));
}

// A scale as the matrix unit takes it, of aclnnTransQuantParam: a float32 cut to 19 bits in the low half of an integer,
// and an offset of 9 bits at bit 37.
inline Tensor unpacked_scale(const Tensor& packed) {
  return packed.contiguous().view(at::kLong).bitwise_and(0xFFFFFFFFLL).to(at::kInt).view(at::kFloat);
}

inline Tensor unpacked_offset(const Tensor& packed) {
  const Tensor bits = packed.contiguous().view(at::kLong).__rshift__(37).bitwise_and(0x1FF);
  return at::where(bits >= 256, bits - 512, bits).to(at::kFloat);
}

inline bool is_packed(const Tensor& scale) { return is_one_of(scale.scalar_type(), {at::kLong, at::kUInt64}); }

// Eight int4 in each int32 of the last axis, the first in the low bits.
inline Tensor unpacked_int4(const Tensor& packed) {
  const Tensor shifts = at::arange(0, 32, 4, at::kLong);
  const Tensor bits = packed.to(at::kLong).unsqueeze(-1).__rshift__(shifts).bitwise_and(0xF);
  return at::where(bits >= 8, bits - 16, bits).flatten(-2);
}

inline Tensor packed_int4(const Tensor& values) {
  const Tensor shifts = at::arange(0, 32, 4, at::kLong);
  const Tensor groups = values.to(at::kLong).unflatten(-1, {values.size(-1) / 8, 8}).bitwise_and(0xF);
  return groups.__lshift__(shifts).sum(-1).to(at::kInt);
}

}  // namespace llm_adapt::opapi
