// aclnn RMS norms that quantize to int8: round half to even, saturate, NaN becomes 0.
//
// Sources: op-plugin documents of npu_rms_norm_quant, npu_add_rms_norm_quant, npu_add_rms_norm_dynamic_quant; CANN
// ops-nn documents of the aclnn functions. That values beyond int8 saturate is an assumption: no document says it.
// Outputs of int4 and of 8-bit floats are not modelled.
#include "opapi_norms.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;

namespace {

// rms_norm with a shift; gamma and beta are [H] or [1, H].
Tensor shifted_norm(const Tensor& x, const Tensor& gamma, const Tensor& beta, double epsilon, Tensor* rstd = nullptr) {
  const Tensor inverse = at::rsqrt(x.square().mean({-1}, true) + epsilon);
  if (rstd != nullptr) *rstd = inverse;
  const Tensor y = x * inverse * wide(gamma).flatten();
  return beta.defined() ? y + wide(beta).flatten() : y;
}

Tensor to_int8(const Tensor& value) { return value.round().clamp(-128, 127).nan_to_num(0).to(at::kChar); }

Tensor quantized(const Tensor& y, const Tensor& scale, const Tensor& offset, bool divide) {
  const Tensor scaled = divide ? y / wide(scale) : y * wide(scale);
  return to_int8(offset.defined() ? scaled + wide(offset) : scaled);
}

void check_quantized(const Tensor& x, const Tensor& gamma, const Tensor& y) {
  check_floating(x, "x");
  check_same_dtype(x, "x", gamma, "gamma");
  check(is_one_of(x.scalar_type(), {at::kHalf, at::kBFloat16}) || llm_adapt::family() == Family::kA5,
        "x must be float16 or bfloat16, not ", x.scalar_type());
  check(y.scalar_type() == at::kChar, "an output of ", y.scalar_type(), " is not modelled, only int8");
  check(x.numel() > 0, "empty tensors are not supported");
  check_last_axis_of_310p(x, "x");
}

void check_row(const Tensor& x, const Tensor& row, const char* name) {
  const bool fits = row.dim() == 1 || (row.dim() == 2 && row.size(0) == 1);
  check(fits && row.size(-1) == x.size(-1), name, " must be [H] or [1, H] with H = ", x.size(-1), ", not ",
        row.sizes());
  check_same_dtype(x, "x", row, name);
}

void rms_norm_quant(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& scale,
                    const Tensor& offset, double epsilon, const Tensor& y) {
  store(y, quantized(shifted_norm(wide(x), gamma, beta, epsilon), scale, offset, false));
}

void check_rms_norm_quant(const Tensor& x, const Tensor& gamma, const Tensor& beta, const Tensor& scale,
                          const Tensor& offset, double, const Tensor& y) {
  check_quantized(x, gamma, y);
  check_row(x, gamma, "gamma");
  check_row(x, beta, "beta");
  check(scale.dim() == 1 && scale.numel() == 1, "scale must have the shape [1], not ", scale.sizes());
  check_same_shape(scale, "scale", offset, "offset");
  check_same_dtype(x, "x", scale, "scale");
  check(offset.scalar_type() == at::kChar || llm_adapt::family() == Family::kA5, "offset must be int8, not ",
        offset.scalar_type());
}

void rms_norm_quant_v3(const Tensor& x, const Tensor& gamma, const Tensor& scale, const Tensor& offset,
                       const Tensor& beta, double epsilon, bool divide, bool with_rstd, const Tensor& y,
                       const Tensor& rstd) {
  Tensor inverse;
  store(y, quantized(shifted_norm(wide(x), gamma, beta, epsilon, &inverse), scale, offset, divide));
  if (with_rstd) store(rstd, inverse);
}

void check_rms_norm_quant_v3(const Tensor& x, const Tensor& gamma, const Tensor& scale, const Tensor& offset,
                             const Tensor& beta, double, bool, bool, const Tensor& y, const Tensor&) {
  check_quantized(x, gamma, y);
  check_row(x, gamma, "gamma");
  if (beta.defined()) check_row(x, beta, "beta");
  check(scale.dim() == 1 && (scale.numel() == 1 || scale.numel() == x.size(-1)), "scale must be [1] or [H], not ",
        scale.sizes());
  if (offset.defined()) check_same_shape(scale, "scale", offset, "offset");
}

void add_rms_norm_quant(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& scale1,
                        const Tensor& scale2, const Tensor& zero1, const Tensor& zero2, const Tensor& beta, int64_t,
                        double epsilon, bool divide, const Tensor& y1, const Tensor& y2, const Tensor& x,
                        const Tensor& unquantized) {
  const Tensor sum = wide(x1) + wide(x2);
  const Tensor plain = sum * rms_rstd(sum, gamma, epsilon) * wide(gamma);
  const Tensor y = beta.defined() ? plain + wide(beta) : plain;
  store(y1, quantized(y, scale1, zero1, divide));
  if (scale2.defined()) store(y2, quantized(y, scale2, zero2, divide));
  store(x, sum);
  if (unquantized.defined()) store(unquantized, plain);
}

void check_add_rms_norm_quant(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& scale1,
                              const Tensor& scale2, const Tensor& zero1, const Tensor& zero2, const Tensor& beta,
                              int64_t axis, double, bool, const Tensor& y1, const Tensor&, const Tensor&,
                              const Tensor&) {
  check_quantized(x1, gamma, y1);
  check(axis == -1, "axis must be -1, not ", axis);
  check_same_dtype(x1, "x1", x2, "x2");
  check_same_shape(x1, "x1", x2, "x2");
  check_gamma_shape(x1, gamma);
  check_same_shape(gamma, "gamma", scale1, "scales1");
  for (const Tensor& row : {scale2, zero1, zero2, beta}) {
    if (row.defined()) check_same_shape(gamma, "gamma", row, "scales2, zero_points and beta");
  }
  if (beta.defined()) check_same_dtype(gamma, "gamma", beta, "beta");
  if (llm_adapt::family() == Family::kA5) return;
  const bool half = x1.scalar_type() == at::kHalf;
  const at::ScalarType scale_type = half ? at::kFloat : at::kBFloat16;
  check(scale1.scalar_type() == scale_type, "scales1 must be ", scale_type, " with x1 of ", x1.scalar_type(), ", not ",
        scale1.scalar_type());
  const at::ScalarType zero_type = half ? at::kInt : at::kBFloat16;
  check(!zero1.defined() || zero1.scalar_type() == zero_type, "zero_points1 must be ", zero_type, " with x1 of ",
        x1.scalar_type(), ", not ", zero1.defined() ? zero1.scalar_type() : zero_type);
}

void dynamic(const Tensor& y, const Tensor& smooth, const Tensor& output, const Tensor& scale_output) {
  const Tensor smoothed = smooth.defined() ? y * wide(smooth) : y;
  const Tensor scale = smoothed.abs().amax({-1}, true) / 127;
  store(output, to_int8(smoothed / scale));
  store(scale_output, scale.reshape(scale_output.sizes()));
}

using Mask = std::optional<std::vector<bool>>;

void add_rms_norm_dynamic_quant(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& smooth1,
                                const Tensor& smooth2, const Tensor& beta, double epsilon, const Mask& mask,
                                const Tensor& y1, const Tensor& y2, const Tensor& x, const Tensor& scale1,
                                const Tensor& scale2) {
  const Tensor sum = wide(x1) + wide(x2);
  const Tensor y = shifted_norm(sum, gamma, beta, epsilon);
  const bool first = !mask || (*mask)[0];
  const bool second = mask ? (*mask)[1] : smooth1.defined() && smooth2.defined();
  if (first) dynamic(y, smooth1, y1, scale1);
  if (second) dynamic(y, smooth2, y2, scale2);
  store(x, sum);
}

void check_add_rms_norm_dynamic_quant(const Tensor& x1, const Tensor& x2, const Tensor& gamma, const Tensor& smooth1,
                                      const Tensor& smooth2, const Tensor& beta, double, const Mask& mask,
                                      const Tensor& y1, const Tensor&, const Tensor&, const Tensor&, const Tensor&) {
  check_family({Family::kA2, Family::kA3, Family::kA5}, "Atlas A2, A3 and Ascend 950");
  check_quantized(x1, gamma, y1);
  check_rank(x1, "x1", 2, 8);
  check_same_dtype(x1, "x1", x2, "x2");
  check_same_shape(x1, "x1", x2, "x2");
  check(gamma.dim() == 1, "gamma must have one axis, not ", gamma.dim());
  check_row(x1, gamma, "gamma");
  for (const Tensor& row : {smooth1, smooth2, beta}) {
    if (row.defined()) check_row(x1, row, "smooth_scale1, smooth_scale2 and beta");
  }
  if (!mask) {
    check(smooth1.defined() || !smooth2.defined(), "smooth_scale2 without output_mask needs smooth_scale1");
    return;
  }
  check((*mask)[0] || !smooth1.defined(), "smooth_scale1 is given and output_mask[0] is False");
  check((*mask)[1] || !smooth2.defined(), "smooth_scale2 is given and output_mask[1] is False");
}

}  // namespace

ACLNN_CHECKED(aclnnRmsNormQuant, check_rms_norm_quant, rms_norm_quant,
              (const aclTensor* x, const aclTensor* gamma, const aclTensor* beta, const aclTensor* scale,
               const aclTensor* offset, double epsilon, const aclTensor* y),
              x, gamma, beta, scale, offset, epsilon, y)
ACLNN_CHECKED(aclnnRmsNormQuantV3, check_rms_norm_quant_v3, rms_norm_quant_v3,
              (const aclTensor* x, const aclTensor* gamma, const aclTensor* scale, const aclTensor* offset,
               const aclTensor* beta, double epsilon, bool divide, bool with_rstd, const aclTensor* y,
               const aclTensor* rstd),
              x, gamma, scale, offset, beta, epsilon, divide, with_rstd, y, rstd)
ACLNN_CHECKED(aclnnAddRmsNormQuantV2, check_add_rms_norm_quant, add_rms_norm_quant,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, const aclTensor* scale1,
               const aclTensor* scale2, const aclTensor* zero1, const aclTensor* zero2, const aclTensor* beta,
               int64_t axis, double epsilon, bool divide, const aclTensor* y1, const aclTensor* y2, const aclTensor* x,
               const aclTensor* unquantized),
              x1, x2, gamma, scale1, scale2, zero1, zero2, beta, axis, epsilon, divide, y1, y2, x, unquantized)
ACLNN_CHECKED(aclnnAddRmsNormDynamicQuantV2, check_add_rms_norm_dynamic_quant, add_rms_norm_dynamic_quant,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* gamma, const aclTensor* smooth1,
               const aclTensor* smooth2, const aclTensor* beta, double epsilon, const aclBoolArray* mask,
               const aclTensor* y1, const aclTensor* y2, const aclTensor* x, const aclTensor* scale1,
               const aclTensor* scale2),
              x1, x2, gamma, smooth1, smooth2, beta, epsilon, mask, y1, y2, x, scale1, scale2)
