// Products of quantised matrices: aclnnQuantMatmulV5, aclnnWeightQuantBatchMatmulV2, and aclnnDequantSwigluQuant.
//
// Sums of integers are exact. Not modelled: float8 and MX, scales by group of int8 by int8, int8 by int4 with one scale
// for a group, an int64 scale of a weight, swiglu by groups or with a static scale. Limits: documents of torch_npu 2.13 and CANN 8.5.
#include "opapi_quant.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

constexpr int64_t kMostColumns = 65535;

bool is_given(const Tensor& tensor) { return tensor.defined() && tensor.numel() > 0; }

void check_scales(const Tensor& x1, const Tensor& x2, const Tensor& rows, const Tensor& columns, const Tensor& out) {
  const int64_t n = out.size(-1);
  check_rank(columns, "scale", 1);
  check(columns.numel() == 1 || columns.numel() == n, "scale must have 1 or ", n, " elements, not ", columns.numel());
  check_dtype(columns, "scale", {at::kFloat, at::kBFloat16, at::kLong, at::kUInt64});
  const at::ScalarType type = out.scalar_type();
  check(is_packed(columns) || type != at::kChar, "an int8 result takes a packed scale");
  if (!is_given(rows)) return;
  check_dtype(rows, "pertoken_scale", {at::kFloat});
  check(rows.dim() == 1 && rows.numel() == x1.size(-2), "pertoken_scale must be [M] = [", x1.size(-2), "], not ", rows.sizes());
  check(!is_packed(columns), "pertoken_scale does not go with a packed scale");
  check(is_one_of(type, {at::kHalf, at::kBFloat16}), "pertoken_scale goes with results of float16 and bfloat16, not ", type);
}

void check_quant_matmul(const Tensor& x1, const Tensor& x2, const Tensor& rows, const Tensor& columns, const Tensor& y_scale,
                        const Tensor& x1_offset, const Tensor& offset, const Tensor& y_offset, const Tensor& bias, bool,
                        bool, int64_t group_size, const Tensor& out) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check(x1.dim() >= 2 && x1.dim() <= 6 && x2.dim() >= 2 && x2.dim() <= 6, "x1 and x2 must have 2 to 6 dimensions");
  const bool int8 = x1.scalar_type() == at::kChar && x2.scalar_type() == at::kChar;
  check(int8, "x1 of ", x1.scalar_type(), " by x2 of ", x2.scalar_type(), " is not modelled, only int8 by int8");
  check(group_size == 0 && !is_given(y_scale) && !is_given(x1_offset) && !is_given(y_offset),
        "group_sizes and y_scale are not modelled");
  check(x1.size(-1) == x2.size(-2), "x1 ", x1.sizes(), " and x2 ", x2.sizes(), " differ in K");
  check(x1.size(-1) <= kMostColumns && x2.size(-1) <= kMostColumns, "the last axes of x1 and x2 must be at most ", kMostColumns);
  check_dtype(out, "the result", {at::kChar, at::kHalf, at::kBFloat16, at::kInt});
  check_scales(x1, x2, rows, columns, out);
  check(!is_given(offset) || out.scalar_type() == at::kChar, "offset goes with an int8 result alone");
  if (!is_given(bias)) return;
  check_dtype(bias, "bias", {at::kInt, at::kFloat, at::kHalf, at::kBFloat16});
  const bool whole = bias.scalar_type() == at::kInt;
  check(whole || out.scalar_type() == at::kBFloat16 || (out.scalar_type() == at::kHalf && is_given(rows)), "bias of ",
        bias.scalar_type(), " does not go with a result of ", out.scalar_type());
}

// (x1 @ x2 + bias) scale pertoken_scale with an int32 bias; x1 @ x2 scale pertoken_scale + bias with others.
void quant_matmul(const Tensor& x1, const Tensor& x2, const Tensor& rows, const Tensor& columns, const Tensor&,
                  const Tensor&, const Tensor& offset, const Tensor&, const Tensor& bias, bool, bool, int64_t,
                  const Tensor& out) {
  Tensor sum = x1.to(at::kDouble).matmul(x2.to(at::kDouble));
  const bool before = is_given(bias) && bias.scalar_type() == at::kInt;
  if (before) sum = sum + bias;
  if (out.scalar_type() == at::kInt) return store(out, sum);
  Tensor values = sum.to(at::kFloat) * (is_packed(columns) ? unpacked_scale(columns) : wide(columns));
  if (is_given(rows)) values = values * rows.unsqueeze(1);
  if (is_given(bias) && !before) values = values + wide(bias);
  if (out.scalar_type() != at::kChar) return store(out, values);
  if (is_given(offset)) return store_rounded(out, values + offset);
  store_rounded(out, values + unpacked_offset(columns));
}

void check_weight_quant(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& offset,
                        const Tensor& quant_scale, const Tensor& quant_offset, const Tensor& bias, int group_size,
                        const Tensor& y) {
  check_chip({Family::kA2, Family::kA3, Family::k310P, Family::kA5});
  check_rank(x, "x", 2);
  check_rank(weight, "weight", 2);
  check_dtype(x, "x", {at::kHalf, at::kBFloat16});
  check(family() != Family::k310P || x.scalar_type() == at::kHalf, "x must be float16 on ", soc_name());
  check_dtype(weight, "weight", {at::kChar, at::kInt});
  check(scale.scalar_type() != at::kLong, "antiquant_scale of int64 is not modelled");
  check_same_dtype(x, "x", scale, "antiquant_scale");
  if (is_given(offset)) check_same_dtype(scale, "antiquant_scale", offset, "antiquant_offset");
  check(!is_given(quant_scale) && !is_given(quant_offset), "quant_scale and quant_offset are not modelled");
  const int64_t groups = group_size == 0 ? 1 : (x.size(1) + group_size - 1) / group_size;
  check(scale.numel() == 1 || scale.numel() == groups * y.size(1), "antiquant_scale ", scale.sizes(), " must have 1 or ",
        groups * y.size(1), " elements");
  if (!is_given(bias)) return;
  const at::ScalarType wanted = x.scalar_type() == at::kBFloat16 ? at::kFloat : at::kHalf;
  check(bias.scalar_type() == wanted, "bias must be ", wanted, " with x of ", x.scalar_type(), ", not ", bias.scalar_type());
}

// A scale for each group of rows, as one for each row.
Tensor of_rows(const Tensor& given, int64_t rows, int64_t columns, int group_size) {
  if (given.numel() == 1) return wide(given).reshape({1, 1});
  if (group_size == 0) return wide(given).reshape({1, columns});
  return wide(given).reshape({-1, columns}).repeat_interleave(group_size, 0).slice(0, 0, rows);
}

void weight_quant(const Tensor& x, const Tensor& weight, const Tensor& scale, const Tensor& offset, const Tensor&,
                  const Tensor&, const Tensor& bias, int group_size, const Tensor& y) {
  Tensor values = weight.scalar_type() == at::kChar ? weight.to(at::kFloat) : unpacked_int4(weight).to(at::kFloat);
  const int64_t k = x.size(1), n = y.size(1);
  if (is_given(offset)) values = values + of_rows(offset, k, n, group_size);
  values = values * of_rows(scale, k, n, group_size);
  Tensor result = wide(x).matmul(values);
  if (is_given(bias)) result = result + wide(bias).reshape({1, -1});
  store(y, result);
}

void check_swiglu(const Tensor& x, const Tensor& of_weight, const Tensor& of_rows, const Tensor& bias,
                  const Tensor& quant_scale, const Tensor& quant_offset, const Tensor& group_index, bool,
                  const std::string& quant_mode, const Tensor& y, const Tensor&) {
  check_chip({Family::kA2, Family::kA3, Family::kA5});
  check_dtype(x, "x", {at::kInt, at::kHalf, at::kBFloat16});
  check(!is_given(group_index), "group_index is not modelled");
  check(quant_mode == "dynamic", "quant_mode 0 (static) is not modelled: what it does with its scale is not documented");
  check(x.scalar_type() != at::kInt || is_given(of_rows), "x of int32 needs activation_scale");
  check(x.scalar_type() == at::kInt || !(is_given(of_rows) || is_given(bias)),
        "activation_scale and bias go with x of int32 alone");
  check(!is_given(bias) || bias.scalar_type() == at::kInt, "bias must be int32");
  check(!is_given(quant_offset), "quant_offset is not modelled");
  check(y.size(-1) * 2 == x.size(-1), "the result must have half the columns of x");
}

// dequantise, silu(one half) times the other, smooth, quantise by token.
void swiglu(const Tensor& x, const Tensor& of_weight, const Tensor& of_rows, const Tensor& bias, const Tensor& quant_scale,
            const Tensor&, const Tensor&, bool activate_left, const std::string&, const Tensor& y, const Tensor& scale) {
  Tensor values = (is_given(bias) ? x + bias : x).to(at::kFloat);
  if (is_given(of_weight)) values = values * wide(of_weight);
  if (is_given(of_rows)) values = values * of_rows.reshape(scale.sizes()).unsqueeze(-1);
  const std::vector<Tensor> halves = values.chunk(2, -1);
  Tensor result = at::silu(halves[activate_left ? 0 : 1]) * halves[activate_left ? 1 : 0];
  if (is_given(quant_scale)) result = result * wide(quant_scale);
  const Tensor found = result.abs().amax(-1, /*keepdim=*/true) / 127;
  store(scale, found.squeeze(-1));
  store_rounded(y, at::where(found > 0, result / found, 0.0));
}

}  // namespace

ACLNN_CHECKED(aclnnQuantMatmulV5, check_quant_matmul, quant_matmul,
              (const aclTensor* x1, const aclTensor* x2, const aclTensor* rows, const aclTensor* columns,
               const aclTensor* y_scale, const aclTensor* x1_offset, const aclTensor* offset, const aclTensor* y_offset,
               const aclTensor* bias, bool transpose_x1, bool transpose_x2, int64_t group_size, const aclTensor* out),
              x1, x2, rows, columns, y_scale, x1_offset, offset, y_offset, bias, transpose_x1, transpose_x2, group_size, out)
ACLNN_CHECKED(aclnnWeightQuantBatchMatmulV2, check_weight_quant, weight_quant,
              (const aclTensor* x, const aclTensor* weight, const aclTensor* scale, const aclTensor* offset,
               const aclTensor* quant_scale, const aclTensor* quant_offset, const aclTensor* bias, int group_size,
               const aclTensor* y),
              x, weight, scale, offset, quant_scale, quant_offset, bias, group_size, y)
ACLNN_CHECKED(aclnnDequantSwigluQuant, check_swiglu, swiglu,
              (const aclTensor* x, const aclTensor* of_weight, const aclTensor* of_rows, const aclTensor* bias,
               const aclTensor* quant_scale, const aclTensor* quant_offset, const aclTensor* group_index,
               bool activate_left, const char* quant_mode, const aclTensor* y, const aclTensor* scale),
              x, of_weight, of_rows, bias, quant_scale, quant_offset, group_index, activate_left, quant_mode, y, scale)
