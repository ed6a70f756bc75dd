// From floating point to integers and back: aclnnDynamicQuantV2, aclnnAscendQuantV3, aclnnQuantize,
// aclnnAscendAntiQuant, aclnnTransQuantParamV2 and V3.
//
// Rounding is to the nearest, halves to even. int4 is packed, eight to an int32. float8, hifloat8 and MX formats are not
// modelled. Limits: documents of torch_npu 2.13 and CANN 8.5.
#include "opapi_quant.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr int kAclInt8 = 2, kAclInt32 = 3;

void check_int8_chip() { check_chip({Family::kA2, Family::kA3, Family::kA5}); }

void check_dynamic(const Tensor& x, const Tensor& smooth, const Tensor& group_index, int64_t dtype, const Tensor& y,
                   const Tensor& scale, const Tensor& offset) {
  check_int8_chip();
  check_dtype(x, "input", {at::kHalf, at::kBFloat16});
  check(dtype == kAclInt8 || dtype == kAclInt32, "aclDataType ", dtype, " is not modelled, only int8 and packed int4");
  check(y.scalar_type() == (dtype == kAclInt8 ? at::kChar : at::kInt), "the result has dtype ", y.scalar_type());
  check(scale.sizes() == x.sizes().slice(0, x.dim() - 1), "only quant_mode pertoken is modelled: scale ", scale.sizes(),
        " is not one for each token of ", x.sizes());
  if (offset.defined()) check_same_shape(scale, "scale", offset, "offset");
  check(smooth.defined() || !group_index.defined(), "group_index needs smooth_scales");
  if (!smooth.defined()) return;
  check_same_dtype(x, "input", smooth, "smooth_scales");
  check(smooth.dim() == (group_index.defined() ? 2 : 1) && smooth.size(-1) == x.size(-1), "smooth_scales ", smooth.sizes(),
        " must be [H], or [groups, H] with group_index; H is ", x.size(-1));
  if (!group_index.defined()) return;
  check_dtype(group_index, "group_index", {at::kInt});
  check(group_index.numel() == smooth.size(0), "group_index must be one for each of ", smooth.size(0), " smooth_scales");
}

// x smoothed: group i, of the tokens up to group_index[i], by its own smooth_scales.
Tensor smoothed(const Tensor& x, const Tensor& smooth, const Tensor& group_index) {
  const Tensor rows = wide(x).reshape({-1, x.size(-1)});
  if (!smooth.defined()) return rows;
  if (!group_index.defined()) return rows * wide(smooth);
  const Tensor ends = group_index.to(at::kLong);
  check(ends[-1].item<int64_t>() == rows.size(0), "group_index must end at the ", rows.size(0), " tokens");
  const Tensor group = at::searchsorted(ends, at::arange(rows.size(0)), /*out_int32=*/false, /*right=*/true);
  return rows * wide(smooth).index_select(0, group);
}

Tensor divided(const Tensor& values, const Tensor& scale) { return at::where(scale > 0, values / scale, 0.0); }

void store_integers(const Tensor& y, const Tensor& values) {
  if (y.scalar_type() == at::kChar) return store_rounded(y, values.reshape(y.sizes()));
  store(y, packed_int4(values.round().clamp(-8, 7)).reshape(y.sizes()));
}

// A token of zeros has scale 0 and becomes zeros: what the real kernel gives there is not documented.
void dynamic(const Tensor& x, const Tensor& smooth, const Tensor& group_index, int64_t, const Tensor& y,
             const Tensor& scale, const Tensor& offset) {
  if (x.numel() == 0) return;
  const double high = y.scalar_type() == at::kChar ? 127 : 7;
  const Tensor rows = smoothed(x, smooth, group_index);
  if (!offset.defined()) {
    const Tensor found = rows.abs().amax(-1, /*keepdim=*/true) / high;
    store(scale, found.reshape(scale.sizes()));
    return store_integers(y, divided(rows, found));
  }
  const Tensor most = rows.amax(-1, /*keepdim=*/true), least = rows.amin(-1, /*keepdim=*/true);
  const Tensor found = (most - least) / (2 * high + 1);
  const Tensor shift = high - divided(most, found);
  store(scale, found.reshape(scale.sizes()));
  store(offset, shift.reshape(offset.sizes()));
  store_integers(y, divided(rows, found) + shift);
}

// A scale of one element or of an axis, in a shape that goes with x.
Tensor along(const Tensor& given, const Tensor& x, int64_t axis) {
  if (given.numel() == 1) return given.reshape({});
  std::vector<int64_t> shape(x.dim(), 1);
  shape[axis < 0 ? axis + x.dim() : axis] = given.numel();
  return given.reshape(shape);
}

void check_along(const Tensor& given, const char* name, int64_t size) {
  check(given.numel() == 1 || given.numel() == size, name, " must have 1 or ", size, " elements, not ", given.numel());
}

void check_ascend(const Tensor& x, const Tensor& scale, const Tensor& offset, bool, const std::string& round_mode, int dtype,
                  int64_t axis, const Tensor&) {
  check_int8_chip();
  check_dtype(x, "input", {at::kFloat, at::kHalf, at::kBFloat16});
  check_same_dtype(x, "input", scale, "scales");
  check(round_mode == "round", "round mode ", round_mode, " is not modelled");
  check(dtype == kAclInt8 || dtype == kAclInt32, "aclDataType ", dtype, " is not modelled, only int8 and packed int4");
  check(axis == -1 || axis == -2, "axis must be -1 or -2, not ", axis);
  check(x.dim() + axis >= 0, "axis ", axis, " is outside of ", x.sizes());
  check_along(scale, "scales", x.size(axis));
  if (!offset.defined()) return;
  check_same_shape(scale, "scales", offset, "zero_points");
  check_same_dtype(scale, "scales", offset, "zero_points");
}

void ascend(const Tensor& x, const Tensor& scale, const Tensor& offset, bool squared, const std::string&, int,
            int64_t axis, const Tensor& y) {
  const Tensor factor = along(wide(scale), x, axis);
  Tensor values = wide(x) * (squared ? factor * factor : factor);
  if (offset.defined()) values = values + along(wide(offset), x, axis);
  store_integers(y, values);
}

void check_quantize(const Tensor& x, const Tensor& scale, const Tensor& offset, int, int64_t axis, const Tensor& y) {
  check_int8_chip();
  check_dtype(x, "input", {at::kFloat, at::kHalf, at::kBFloat16});
  check_dtype(scale, "scales", {at::kFloat, at::kBFloat16});
  check_dtype(y, "the result", {at::kChar, at::kByte, at::kInt});
  check(axis >= -x.dim() && axis < x.dim(), "axis ", axis, " is outside of ", x.sizes());
  check_rank(scale, "scales", 1);
  check_along(scale, "scales", x.size(axis));
  if (!offset.defined()) return;
  check_dtype(offset, "zero_points", {at::kChar, at::kByte, at::kInt, at::kBFloat16});
  check_same_shape(scale, "scales", offset, "zero_points");
}

void quantize(const Tensor& x, const Tensor& scale, const Tensor& offset, int, int64_t axis, const Tensor& y) {
  Tensor values = wide(x) / along(wide(scale), x, axis);
  if (offset.defined()) values = values + along(wide(offset), x, axis);
  store_rounded(y, values);
}

void check_anti(const Tensor& x, const Tensor& scale, const Tensor& offset, int64_t, bool, const Tensor& y) {
  check_int8_chip();
  check_dtype(x, "x", {at::kChar, at::kInt});
  check_dtype(scale, "scale", {at::kFloat, at::kBFloat16});
  check_rank(scale, "scale", 1);
  check_along(scale, "scale", y.size(-1));
  check_dtype(y, "the result", {at::kHalf, at::kBFloat16});
  if (!offset.defined()) return;
  check_same_shape(scale, "scale", offset, "offset");
  check_same_dtype(scale, "scale", offset, "offset");
}

void anti(const Tensor& x, const Tensor& scale, const Tensor& offset, int64_t, bool squared, const Tensor& y) {
  Tensor values = x.scalar_type() == at::kInt ? unpacked_int4(x).to(at::kFloat) : x.to(at::kFloat);
  if (offset.defined()) values = values + wide(offset);
  const Tensor factor = wide(scale);
  store(y, values * (squared ? factor * factor : factor));
}

void check_pack(const Tensor& scale, const Tensor& offset, int64_t round_mode, const Tensor& packed) {
  check_chip({Family::kA2, Family::kA3, Family::k310P, Family::kA5});
  check_dtype(scale, "scale", {at::kFloat});
  check(scale.dim() == 1 || scale.dim() == 2, "scale must have 1 or 2 dimensions, not ", scale.sizes());
  check(scale.is_contiguous() && scale.numel() > 0, "scale must be contiguous and not empty");
  if (offset.defined()) check_dtype(offset, "offset", {at::kFloat});
  check(round_mode == 0 || round_mode == 1, "round_mode must be 0 or 1, not ", round_mode);
  check(packed.scalar_type() == at::kLong || packed.scalar_type() == at::kUInt64, "the result must be int64");
}

// The float32 bits, cut (or rounded, halves to even) to 19 bits; bit 46 set; the offset of 9 bits at bit 37.
void pack(const Tensor& scale, const Tensor& offset, int64_t round_mode, const Tensor& packed) {
  Tensor bits = scale.view(at::kInt).to(at::kLong).bitwise_and(0xFFFFFFFFLL);
  if (round_mode == 1) bits = bits + 0xFFF + bits.__rshift__(13).bitwise_and(1);
  Tensor whole = bits.bitwise_and(0xFFFFE000LL).bitwise_or(1LL << 46);
  if (offset.defined()) {
    const Tensor shift = offset.round().clamp(-256, 255).to(at::kLong).bitwise_and(0x1FF);
    whole = whole.bitwise_or(shift.__lshift__(37));
  }
  packed.view(at::kLong).copy_(whole.expand(packed.sizes()));
}

void check_pack_v2(const Tensor& scale, const Tensor& offset, const Tensor& packed) { check_pack(scale, offset, 0, packed); }
void pack_v2(const Tensor& scale, const Tensor& offset, const Tensor& packed) { pack(scale, offset, 0, packed); }

}  // namespace

ACLNN_CHECKED(aclnnDynamicQuantV2, check_dynamic, dynamic,
              (const aclTensor* x, const aclTensor* smooth, const aclTensor* group_index, int64_t dtype,
               const aclTensor* y, const aclTensor* scale, const aclTensor* offset),
              x, smooth, group_index, dtype, y, scale, offset)
ACLNN_CHECKED(aclnnAscendQuantV3, check_ascend, ascend,
              (const aclTensor* x, const aclTensor* scale, const aclTensor* offset, bool squared, const char* round_mode,
               int dtype, int64_t axis, const aclTensor* y),
              x, scale, offset, squared, round_mode, dtype, axis, y)
ACLNN_CHECKED(aclnnQuantize, check_quantize, quantize,
              (const aclTensor* x, const aclTensor* scale, const aclTensor* offset, int dtype, int64_t axis,
               const aclTensor* y),
              x, scale, offset, dtype, axis, y)
ACLNN_CHECKED(aclnnAscendAntiQuant, check_anti, anti,
              (const aclTensor* x, const aclTensor* scale, const aclTensor* offset, int64_t dtype, bool squared,
               const aclTensor* y),
              x, scale, offset, dtype, squared, y)
ACLNN_CHECKED(aclnnTransQuantParamV2, check_pack_v2, pack_v2,
              (const aclTensor* scale, const aclTensor* offset, const aclTensor* packed), scale, offset, packed)
ACLNN_CHECKED(aclnnTransQuantParamV3, check_pack, pack,
              (const aclTensor* scale, const aclTensor* offset, int64_t round_mode, const aclTensor* packed), scale,
              offset, round_mode, packed)
