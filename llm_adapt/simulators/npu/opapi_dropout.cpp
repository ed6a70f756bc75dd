// Dropout: masks of one bit an element, made from a seed and an offset, and their use.
//
// The same seed and offset make the same mask, which is what gradients and recomputation rely on. The numbers are not
// those of the device's generator. Bit i stands in byte i / 8 at place i % 8, lowest first.
#include <ATen/core/PhiloxRNGEngine.h>

#include <cmath>

#include "opapi_attention.h"

namespace llm_adapt::opapi {
namespace {

constexpr int64_t kAlignment = 128;  // a mask is as long as its bits rounded up to this many
constexpr int kRandomBits = 24;

int64_t count_of(const Ints& shape) {
  int64_t count = 1;
  for (int64_t size : *shape) count *= size;
  return count;
}

int64_t mask_bytes(int64_t count) { return (count + kAlignment - 1) / kAlignment * kAlignment / 8; }

void check_probability(double drop) {
  check(drop >= 0 && drop <= 1, "the dropout probability ", drop, " is not in [0, 1]");
}

void check_mask(const Tensor& mask, int64_t count) {
  check(mask.scalar_type() == at::kByte && mask.dim() == 1, "a dropout mask is uint8 with one axis");
  check(mask.numel() >= mask_bytes(count), "a dropout mask of ", mask.numel(), " bytes is too short for ", count,
        " bits");
}

void check_generated(Ints shape, double drop, int64_t, int64_t, Tensor mask) {
  check_probability(drop);
  check_mask(mask, count_of(shape));
}

void generate(Ints shape, double drop, int64_t seed, int64_t offset, Tensor mask) {
  generate_keep_bits(mask, count_of(shape), drop, seed, offset);
}

void check_generated_v2(Ints shape, double drop, int64_t seed, int64_t offset, int, Tensor mask) {
  check_generated(shape, drop, seed, offset, mask);
}

void generate_v2(Ints shape, double drop, int64_t seed, int64_t offset, int, Tensor mask) {
  generate(shape, drop, seed, offset, mask);
}

void check_input(const Tensor& input, const Tensor& out) {
  const at::ScalarType type = input.scalar_type();
  check(type == at::kFloat || type == at::kHalf || type == at::kBFloat16,
        "dropout takes float32, float16 and bfloat16");
  check(type == out.scalar_type() && input.sizes() == out.sizes(), "the result of dropout is like its input");
}

void check_applied(Tensor input, Tensor mask, double drop, Tensor out) {
  check_probability(drop);
  check_input(input, out);
  check_mask(mask, input.numel());
}

void apply(Tensor input, Tensor mask, double drop, Tensor out) {
  if (drop == 1) {
    out.zero_();
    return;
  }
  const Tensor kept = keep_bits(mask, 0, input.numel()).view(input.sizes());
  out.copy_(wide(input) * kept / (1 - drop));
}

void check_dropout(Tensor input, Tensor noise_shape, double drop, int64_t, int64_t, Tensor out, Tensor mask) {
  check(family() == Family::kA5, "aclnnDropoutV3 is there on Ascend950 only, this is ", soc_name());
  check(!noise_shape.defined(), "a noise shape is not modelled");
  check_applied(input, mask, drop, out);
}

void dropout(Tensor input, Tensor, double drop, int64_t seed, int64_t offset, Tensor out, Tensor mask) {
  generate_keep_bits(mask, input.numel(), drop, seed, offset);
  apply(input, mask, drop, out);
}

void check_gradient(Tensor grad, Tensor mask, double, Tensor out) {
  check(family() == Family::kA5, "aclnnDropoutV3Grad is there on Ascend950 only, this is ", soc_name());
  check_input(grad, out);
  check_mask(mask, grad.numel());
}

void gradient(Tensor grad, Tensor mask, double scale, Tensor out) {
  out.copy_(wide(grad) * keep_bits(mask, 0, grad.numel()).view(grad.sizes()) * scale);
}

}  // namespace

void generate_keep_bits(const Tensor& bytes, int64_t count, double drop, int64_t seed, int64_t offset) {
  // In steps of 2^-24, so that 1 - 0.9 in float32 and in float64 mean the same.
  const auto dropped = static_cast<uint32_t>(std::llround(drop * (1 << kRandomBits)));
  at::Philox4_32 random(static_cast<uint64_t>(seed), static_cast<uint64_t>(offset), 0);
  Tensor whole = bytes.is_contiguous() ? bytes : at::zeros_like(bytes, at::MemoryFormat::Contiguous);
  whole.zero_();
  auto* byte = whole.data_ptr<uint8_t>();
  for (int64_t i = 0; i < count; ++i) {
    const bool is_kept = (random() >> (32 - kRandomBits)) >= dropped;
    if (is_kept) byte[i / 8] |= static_cast<uint8_t>(1 << (i % 8));
  }
  if (!bytes.is_contiguous()) bytes.copy_(whole);
}

Tensor keep_bits(const Tensor& bytes, int64_t start, int64_t count) {
  const Tensor whole = bytes.contiguous();
  const auto* byte = whole.data_ptr<uint8_t>();
  Tensor kept = at::empty({count}, at::kBool);
  bool* bit = kept.data_ptr<bool>();
  for (int64_t i = 0; i < count; ++i) bit[i] = (byte[(start + i) / 8] >> ((start + i) % 8)) & 1;
  return kept;
}

ACLNN_CHECKED(aclnnDropoutGenMask, check_generated, generate,
              (const aclIntArray* shape, double prob, int64_t seed, int64_t offset, const aclTensor* out), shape,
              prob, seed, offset, out)
ACLNN_CHECKED(aclnnDropoutGenMaskV2, check_generated_v2, generate_v2,
              (const aclIntArray* shape, double prob, int64_t seed, int64_t offset, int prob_dtype,
               const aclTensor* out),
              shape, prob, seed, offset, prob_dtype, out)
ACLNN_CHECKED(aclnnDropoutDoMask, check_applied, apply,
              (const aclTensor* self, const aclTensor* mask, double prob, const aclTensor* out), self, mask, prob,
              out)
ACLNN_CHECKED(aclnnDropoutV3, check_dropout, dropout,
              (const aclTensor* input, const aclTensor* noise_shape, double p, int64_t seed, int64_t offset,
               const aclTensor* out, const aclTensor* mask),
              input, noise_shape, p, seed, offset, out, mask)
ACLNN_CHECKED(aclnnDropoutV3Grad, check_gradient, gradient,
              (const aclTensor* grad, const aclTensor* mask, double scale, const aclTensor* out), grad, mask, scale,
              out)

}  // namespace llm_adapt::opapi
