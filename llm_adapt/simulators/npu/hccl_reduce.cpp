// Element-wise reductions over the contributions of all ranks.
//
// The builder compiles for a short build; these loops are worth the vectoriser's time.
#pragma GCC optimize("O3")
#include "hccl_reduce.h"

#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

namespace llm_adapt::hccl {
namespace {

constexpr size_t kBlock = 4096;

float widen_bf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

uint16_t round_bf16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  if (std::isnan(value)) {
    return static_cast<uint16_t>((bits >> 16) | 0x40);
  }
  uint32_t to_even = ((bits >> 16) & 1) + 0x7fff;
  return static_cast<uint16_t>((bits + to_even) >> 16);
}

float widen_fp16(uint16_t bits) {
  uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  uint32_t magnitude = static_cast<uint32_t>(bits & 0x7fff) << 13;
  if (magnitude >= 0x0f800000) {  // infinity and NaN
    return std::bit_cast<float>(sign | magnitude | 0x70000000);
  }
  // Multiplying by 2^112 moves the exponent from fp16's bias to fp32's, subnormals included.
  float value = std::bit_cast<float>(magnitude) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(value));
}

uint16_t round_fp16(float value) {
  uint32_t bits = std::bit_cast<uint32_t>(value);
  uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) {
    return sign | 0x7e00;
  }
  if (magnitude >= 0x477ff000) {  // rounds to 65536 or more
    return sign | 0x7c00;
  }
  if (magnitude < 0x38800000) {  // below 2^-14: adding 0.5 leaves multiples of 2^-24 in the low bits, rounded to even
    float shifted = std::bit_cast<float>(magnitude) + 0.5f;
    return sign | static_cast<uint16_t>(std::bit_cast<uint32_t>(shifted) - std::bit_cast<uint32_t>(0.5f));
  }
  uint32_t to_even = ((magnitude >> 13) & 1) + 0xfff;
  return sign | static_cast<uint16_t>((magnitude + to_even - 0x38000000) >> 13);
}

struct Bf16 {
  using Stored = uint16_t;
  using Sum = float;
  static float widen(uint16_t bits) { return widen_bf16(bits); }
  static uint16_t narrow(float value) { return round_bf16(value); }
};

struct Fp16 {
  using Stored = uint16_t;
  using Sum = float;
  static float widen(uint16_t bits) { return widen_fp16(bits); }
  static uint16_t narrow(float value) { return round_fp16(value); }
};

template <class T>
struct Plain {
  using Stored = T;
  using Sum = T;
  static T widen(T value) { return value; }
  static T narrow(T value) { return value; }
};

template <class T>
T combine(T one, T other, HcclReduceOp reduction) {
  // Through an unsigned type wide enough not to be promoted to int, so that an overflow wraps.
  using Wide = std::conditional_t<std::is_integral_v<T>, uint64_t, T>;
  switch (reduction) {
    case HCCL_REDUCE_SUM:
      return static_cast<T>(static_cast<Wide>(one) + static_cast<Wide>(other));
    case HCCL_REDUCE_PROD:
      return static_cast<T>(static_cast<Wide>(one) * static_cast<Wide>(other));
    case HCCL_REDUCE_MAX:
      return one != one || one > other ? one : other;
    default:
      return one != one || one < other ? one : other;
  }
}

template <class Format, HcclReduceOp kReduction>
void reduce_block(char* out, const std::vector<const char*>& in, size_t first, size_t count) {
  using Stored = typename Format::Stored;
  typename Format::Sum sum[kBlock];
  const Stored* from = reinterpret_cast<const Stored*>(in[0]) + first;
  for (size_t i = 0; i < count; ++i) {
    sum[i] = Format::widen(from[i]);
  }
  for (size_t rank = 1; rank < in.size(); ++rank) {
    from = reinterpret_cast<const Stored*>(in[rank]) + first;
    for (size_t i = 0; i < count; ++i) {
      sum[i] = combine(sum[i], Format::widen(from[i]), kReduction);
    }
  }
  Stored* to = reinterpret_cast<Stored*>(out) + first;
  for (size_t i = 0; i < count; ++i) {
    to[i] = Format::narrow(sum[i]);
  }
}

template <class Format, HcclReduceOp kReduction>
void reduce_all(char* out, const std::vector<const char*>& in, size_t count) {
  for (size_t first = 0; first < count; first += kBlock) {
    reduce_block<Format, kReduction>(out, in, first, std::min(kBlock, count - first));
  }
}

template <class Format>
void reduce_as(char* out, const std::vector<const char*>& in, size_t count, HcclReduceOp reduction) {
  switch (reduction) {
    case HCCL_REDUCE_SUM:
      return reduce_all<Format, HCCL_REDUCE_SUM>(out, in, count);
    case HCCL_REDUCE_PROD:
      return reduce_all<Format, HCCL_REDUCE_PROD>(out, in, count);
    case HCCL_REDUCE_MAX:
      return reduce_all<Format, HCCL_REDUCE_MAX>(out, in, count);
    case HCCL_REDUCE_MIN:
      return reduce_all<Format, HCCL_REDUCE_MIN>(out, in, count);
    default:
      throw Failure(HCCL_E_NOT_SUPPORT, "an unknown reduction");
  }
}

}  // namespace

void reduce(void* out, const std::vector<const char*>& in, size_t count, HcclDataType dtype, HcclReduceOp reduction) {
  char* to = static_cast<char*>(out);
  switch (dtype) {
    case HCCL_DATA_TYPE_INT8:
      return reduce_as<Plain<int8_t>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_INT16:
      return reduce_as<Plain<int16_t>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_INT32:
      return reduce_as<Plain<int32_t>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_INT64:
      return reduce_as<Plain<int64_t>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_UINT64:
      return reduce_as<Plain<uint64_t>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_FP16:
      return reduce_as<Fp16>(to, in, count, reduction);
    case HCCL_DATA_TYPE_BFP16:
      return reduce_as<Bf16>(to, in, count, reduction);
    case HCCL_DATA_TYPE_FP32:
      return reduce_as<Plain<float>>(to, in, count, reduction);
    case HCCL_DATA_TYPE_FP64:
      return reduce_as<Plain<double>>(to, in, count, reduction);
    default:
      throw Failure(HCCL_E_NOT_SUPPORT, "no reduction of " + name_of(dtype));
  }
}

}  // namespace llm_adapt::hccl
