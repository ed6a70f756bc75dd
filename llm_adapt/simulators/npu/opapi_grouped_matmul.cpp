// A matrix product for each group: aclnnGroupedMatmul, aclnnGroupedMatmulV4, aclnnGroupedMatmulV5.
//
// group_type 0: rows of x [M, K] by weight [E, K, N] or E of [K, N]; 2: over rows, x [M, K] as a transposed view by
// weight [K, N] gives [E, M, N]; -1: each x by its weight. Rows beyond the groups, and products over no rows, are not
// written by the real kernel: NaN (the lowest integer) stands there, on purpose, so that a reader shows. Limits:
// documents of torch_npu 2.13 and of aclnnGroupedMatmulV5. Modelled: float, int8 by int8, float by int8.
#include "opapi_quant.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

enum GroupType { kNoGroups = -1, kRows = 0, kInner = 2 };
enum Activation { kNone = 0, kRelu = 1, kGeluTanh = 2, kFastGelu = 4, kSilu = 5 };

struct Problem {
  Tensors x, weight, bias, scale, antiquant_scale, antiquant_offset, per_token_scale;
  Tensor group_list;
  int64_t split_item, group_type, group_list_type, activation;
  Tensors out;

  bool one_weight() const { return weight.size() == 1 && weight[0].dim() == 3; }
  bool is_int8() const { return x[0].scalar_type() == at::kChar; }
  bool has_int8_weight() const { return !is_int8() && weight[0].scalar_type() == at::kChar; }
  int64_t groups() const { return one_weight() ? weight[0].size(0) : static_cast<int64_t>(weight.size()); }

  // What a list has for group e: of one tensor its e-th slice.
  Tensor of(const Tensors& list, int64_t e) const {
    if (list.empty()) return Tensor();
    return one_weight() ? list[0].select(0, e) : list[e];
  }
};

bool is_transposed(const Tensor& tensor) {
  return tensor.dim() >= 2 && tensor.stride(-2) == 1 && tensor.stride(-1) == tensor.size(-2);
}

void check_inner_axis(const Tensor& tensor, const char* name) {
  const bool other_way = is_transposed(tensor) && !tensor.is_contiguous();
  const int64_t inner = other_way ? tensor.size(-2) : tensor.size(-1);
  check(inner < 65536, name, ": the inner axis must be below 65536, not ", inner);
}

void check_bias(const Problem& p) {
  if (p.bias.empty()) return;
  check(p.group_type != kInner, "bias must be absent with group_type 2");
  check(p.bias.size() == p.weight.size(), "bias must be as many as weight: ", p.weight.size(), ", not ", p.bias.size());
  const at::ScalarType x = p.x[0].scalar_type();
  const at::ScalarType wanted = x == at::kChar ? at::kInt : x == at::kBFloat16 ? at::kFloat : x;
  for (const Tensor& one : p.bias) {
    check(one.scalar_type() == wanted, "bias must be ", wanted, " with x of ", x, ", not ", one.scalar_type());
  }
}

void check_int8(const Problem& p) {
  check(p.group_type == kRows && p.x.size() == 1 && p.weight.size() == 1 && p.out.size() == 1,
        "int8 takes one x, one weight and group_type 0");
  const at::ScalarType out = p.out[0].scalar_type();
  check(p.scale.empty() == (out == at::kInt), "scale must be given, but for an int32 result");
  check(p.per_token_scale.empty() || is_one_of(out, {at::kHalf, at::kBFloat16}),
        "per_token_scale goes with results of float16 and bfloat16, not ", out);
  check(p.scale.empty() || is_packed(p.scale[0]) == (out == at::kChar),
        "scale must be int64 for an int8 result and floating point for others");
}

void check_kind(const Problem& p) {
  const at::ScalarType x = p.x[0].scalar_type(), weight = p.weight[0].scalar_type();
  const bool modelled = is_one_of(weight, {at::kFloat, at::kHalf, at::kBFloat16, at::kChar});
  check(modelled, "weight of ", weight, " is not modelled");
  check(x == weight || (p.has_int8_weight() && x != at::kFloat), "x of ", x, " does not go with weight of ", weight);
  check(p.activation >= 0 && p.activation <= 5 && p.activation != 3, "act_type must be 0, 1, 2, 4 or 5, not ", p.activation);
  check(p.activation == kNone || !p.per_token_scale.empty(), "act_type is supported with per_token_scale alone");
  if (p.is_int8()) check_int8(p);
  if (p.has_int8_weight()) {
    check(!p.antiquant_scale.empty(), "int8 weight with x of ", x, " needs antiquant_scale");
    check(p.group_type != kInner, "group_type 2 does not take int8 weight");
  }
  if (family() != Family::k310P) return;
  check(x == at::kHalf && weight == at::kHalf, "on ", soc_name(), " x and weight must be float16, not ", x);
  check(p.group_type == kRows, "on ", soc_name(), " group_type must be 0, not ", p.group_type);
}

void check_group_list(const Problem& p, int64_t groups) {
  check(p.group_list.defined(), "group_list must be given");
  check_dtype(p.group_list, "group_list", {at::kLong});
  check(p.group_list_type == 0 || p.group_list_type == 1, "group_list_type ", p.group_list_type, " is not modelled");
  check_rank(p.group_list, "group_list", 1);
  check(p.group_list.size(0) == groups, "group_list must have one number for each of ", groups, " weights, not ",
        p.group_list.size(0));
}

void check_rows(const Problem& p) {
  check(p.split_item == 2 || p.split_item == 3, "group_type 0 gives one result: split_item must be 2 or 3, not ", p.split_item);
  if (p.x.size() == 1) check_group_list(p, p.groups());
  check(p.x.size() == 1 || static_cast<int64_t>(p.x.size()) == p.groups(), "x must be one, or one for each of ", p.groups(),
        " weights, not ", p.x.size());
}

void check_inner(const Problem& p) {
  check(p.x.size() == 1 && p.weight.size() == 1 && p.split_item >= 2, "group_type 2 with several tensors is not modelled");
  check_rank(p.weight[0], "weight", 2);
  check(p.x[0].numel() == 0 || is_transposed(p.x[0]), "group_type 2 takes x as a transposed view, not strides ", p.x[0].strides());
  check(p.x[0].size(1) == p.weight[0].size(0), "x ", p.x[0].sizes(), " and weight ", p.weight[0].sizes(), " differ in K");
  const bool weight_is = is_transposed(p.weight[0]) && !p.weight[0].is_contiguous();
  check(!weight_is, "group_type 2 does not take weight as a transposed view");
  check_group_list(p, p.out[0].size(0));
}

void check_separate(const Problem& p) {
  check(p.split_item == 0 || p.split_item == 1, "group_type -1 gives a result for each x: split_item must be 0 or 1, not ",
        p.split_item);
  check(!p.group_list.defined(), "group_list must be absent with group_type -1");
  check(p.x.size() == p.weight.size() && p.out.size() == p.x.size(), "x and weight must be the same number");
}

void check_problem(const Problem& p) {
  check_chip({Family::kA2, Family::kA3, Family::k310P, Family::kA5});
  check(!p.x.empty() && p.x.size() <= 128, "x must have 1 to 128 tensors, not ", p.x.size());
  check(!p.weight.empty() && p.weight.size() <= 128, "weight must have 1 to 128 tensors, not ", p.weight.size());
  check_kind(p);
  check_bias(p);
  for (const Tensor& one : p.weight) check_inner_axis(one, "weight");
  for (const Tensor& one : p.x) {
    check_inner_axis(one, "x");
    check(p.split_item < 2 || one.dim() == 2, "x must be [M, K], not ", one.sizes());
    const bool other_way = one.dim() == 2 && is_transposed(one) && !one.is_contiguous();
    check(p.group_type == kInner || !other_way, "x must not be a transposed view with group_type ", p.group_type);
  }
  check(p.group_type == kNoGroups || p.group_type == kRows || p.group_type == kInner, "group_type must be -1, 0 or 2, not ",
        p.group_type);
  if (p.group_type == kNoGroups) check_separate(p);
  if (p.group_type == kRows) check_rows(p);
  if (p.group_type == kInner) check_inner(p);
}

Tensor activated(const Tensor& values, int64_t activation) {
  if (activation == kRelu) return values.relu();
  if (activation == kGeluTanh) return at::gelu(values, "tanh");
  if (activation == kFastGelu) return values * (values * 1.702).sigmoid();
  if (activation == kSilu) return at::silu(values);
  return values;
}

// (x @ weight + bias) scale per_token_scale, the sum exact.
void int8_product(const Problem& p, const Tensor& x, int64_t e, const Tensor& rows, const Tensor& out) {
  Tensor sum = x.to(at::kDouble).matmul(p.of(p.weight, e).to(at::kDouble));
  const Tensor bias = p.of(p.bias, e), scale = p.of(p.scale, e);
  if (bias.defined()) sum = sum + bias;
  if (!scale.defined()) return store(out, sum);
  if (is_packed(scale)) return store_rounded(out, sum.to(at::kFloat) * unpacked_scale(scale));
  sum = sum.to(at::kFloat) * wide(scale);
  if (rows.defined()) sum = sum * rows.unsqueeze(1);
  store(out, activated(sum, p.activation));
}

void product(const Problem& p, const Tensor& x, int64_t e, const Tensor& rows, const Tensor& out) {
  if (p.is_int8()) return int8_product(p, x, e, rows, out);
  Tensor weight = wide(p.of(p.weight, e));
  if (p.has_int8_weight()) {
    const Tensor offset = p.of(p.antiquant_offset, e);
    if (offset.defined()) weight = weight + wide(offset);
    weight = weight * wide(p.of(p.antiquant_scale, e));
  }
  Tensor y = wide(x).matmul(weight);
  const Tensor bias = p.of(p.bias, e);
  store(out, bias.defined() ? y + wide(bias) : y);
}

void forget(const Tensor& out) {
  if (out.is_floating_point()) {
    out.fill_(std::numeric_limits<double>::quiet_NaN());
  } else {
    out.fill_(out.scalar_type() == at::kChar ? -128 : std::numeric_limits<int32_t>::min());
  }
}

void multiply_rows(const Problem& p, const std::vector<int64_t>& ends) {
  const Tensor out = p.out[0];
  check(ends.empty() || ends.back() <= out.size(0), "group_list has ", ends.back(), " rows of ", out.size(0));
  int64_t first = 0;
  for (size_t e = 0; e < ends.size(); ++e) {
    const Tensor x = p.x.size() == 1 ? p.x[0].slice(0, first, ends[e]) : p.x[e];
    check(x.size(0) == ends[e] - first, "group_list has ", ends[e] - first, " rows for x ", x.sizes());
    const Tensor rows = p.per_token_scale.empty() ? Tensor() : p.per_token_scale[0].slice(0, first, ends[e]);
    if (ends[e] > first) product(p, x, e, rows, out.slice(0, first, ends[e]));
    first = ends[e];
  }
}

std::vector<int64_t> ends_of_list(const Tensors& x) {
  std::vector<int64_t> ends;
  for (const Tensor& one : x) ends.push_back(one.size(0) + (ends.empty() ? 0 : ends.back()));
  return ends;
}

void multiply_inner(const Problem& p) {
  const std::vector<int64_t> ends = group_ends(p.group_list, p.group_list_type == 1);
  check(ends.empty() || ends.back() <= p.weight[0].size(0), "group_list has ", ends.back(), " rows of ", p.weight[0].size(0));
  int64_t first = 0;
  for (size_t e = 0; e < ends.size(); ++e) {
    const Tensor x = wide(p.x[0].slice(1, first, ends[e])), weight = wide(p.weight[0].slice(0, first, ends[e]));
    if (ends[e] > first) store(p.out[0].select(0, e), x.matmul(weight));
    first = ends[e];
  }
}

void multiply(const Problem& p) {
  for (const Tensor& one : p.out) forget(one);
  if (p.group_type == kInner) return multiply_inner(p);
  if (p.group_type == kNoGroups) {
    for (size_t e = 0; e < p.x.size(); ++e) product(p, p.x[e], e, Tensor(), p.out[e]);
    return;
  }
  const bool listed = p.group_list.defined();
  multiply_rows(p, listed ? group_ends(p.group_list, p.group_list_type == 1) : ends_of_list(p.x));
}

Problem problem_of_v5(const Tensors& x, const Tensors& weight, const Tensors& bias, const Tensors& scale, const Tensors&,
                      const Tensors& antiquant_scale, const Tensors& antiquant_offset, const Tensors& per_token_scale,
                      const Tensor& group_list, const Tensors&, const Tensors&, const Tensors&, int64_t split_item,
                      int64_t group_type, int64_t group_list_type, int64_t activation, const Ints&, const Tensors& out,
                      const Tensors&, const Tensors&) {
  return {x, weight, bias, scale, antiquant_scale, antiquant_offset, per_token_scale, group_list, split_item, group_type,
          group_list_type, activation, out};
}

void check_unused(const Tensors& offset, const Tensors& activation_input, const Tensors& quant_scale,
                  const Tensors& quant_offset) {
  const bool absent = offset.empty() && activation_input.empty() && quant_scale.empty() && quant_offset.empty();
  check(absent, "offset, activation_input, activation_quant_scale and activation_quant_offset must be None");
}

const auto check_v5 = [](const auto&... given) {
  const auto all = std::tie(given...);
  check_unused(std::get<4>(all), std::get<9>(all), std::get<10>(all), std::get<11>(all));
  check_problem(problem_of_v5(given...));
};
const auto multiply_v5 = [](const auto&... given) { multiply(problem_of_v5(given...)); };

// V4 is V5 without the hint for tuning, its 17th argument.
template <typename Act>
auto without_hint(Act act) {
  return [=](const Tensors& a, const Tensors& b, const Tensors& c, const Tensors& d, const Tensors& e, const Tensors& f,
             const Tensors& g, const Tensors& h, const Tensor& i, const Tensors& j, const Tensors& k, const Tensors& l,
             int64_t split_item, int64_t group_type, int64_t list_type, int64_t activation, const Tensors& out,
             const Tensors& features, const Tensors& scales) {
    act(a, b, c, d, e, f, g, h, i, j, k, l, split_item, group_type, list_type, activation, Ints(), out, features, scales);
  };
}

// The oldest form: the ends of the groups are known to the host, and split_item says how many results there are.
Problem problem_of_v1(const Tensors& x, const Tensors& weight, const Tensors& bias, const Tensors& scale,
                      const Tensors& antiquant_scale, const Tensors& antiquant_offset, const Ints& ends,
                      int64_t split_item, const Tensors& out) {
  const bool listed = ends && !ends->empty();
  const Tensor group_list = listed ? at::tensor(*ends, at::kLong) : Tensor();
  const int64_t type = split_item < 2 ? kNoGroups : kRows;
  return {x, weight, bias, scale, antiquant_scale, antiquant_offset, {}, type == kRows ? group_list : Tensor(), split_item,
          type, 0, kNone, out};
}

// One x by several weights into several results: each x is its rows.
Tensors rows_of_each(const Tensors& x, const Ints& ends) {
  if (x.size() != 1 || !ends || ends->empty()) return x;
  Tensors found;
  int64_t first = 0;
  for (int64_t end : *ends) {
    found.push_back(x[0].slice(0, first, end));
    first = end;
  }
  return found;
}

const auto check_v1 = [](const Tensors& x, const Tensors& weight, const Tensors& bias, const Tensors& scale,
                         const Tensors& offset, const Tensors& antiquant_scale, const Tensors& antiquant_offset,
                         const Ints& ends, int64_t split_item, const Tensors& out) {
  check_unused(offset, {}, {}, {});
  const Tensors given = split_item < 2 ? rows_of_each(x, ends) : x;
  check_problem(problem_of_v1(given, weight, bias, scale, antiquant_scale, antiquant_offset, ends, split_item, out));
};
const auto multiply_v1 = [](const Tensors& x, const Tensors& weight, const Tensors& bias, const Tensors& scale,
                            const Tensors&, const Tensors& antiquant_scale, const Tensors& antiquant_offset,
                            const Ints& ends, int64_t split_item, const Tensors& out) {
  const Tensors given = split_item < 2 ? rows_of_each(x, ends) : x;
  multiply(problem_of_v1(given, weight, bias, scale, antiquant_scale, antiquant_offset, ends, split_item, out));
};

}  // namespace

ACLNN_CHECKED(aclnnGroupedMatmul, check_v1, multiply_v1,
              (const aclTensorList* x, const aclTensorList* weight, const aclTensorList* bias,
               const aclTensorList* scale, const aclTensorList* offset, const aclTensorList* antiquant_scale,
               const aclTensorList* antiquant_offset, const aclIntArray* ends, int64_t split_item,
               const aclTensorList* out),
              x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, ends, split_item, out)
ACLNN_CHECKED(aclnnGroupedMatmulV4, without_hint(check_v5), without_hint(multiply_v5),
              (const aclTensorList* x, const aclTensorList* weight, const aclTensorList* bias,
               const aclTensorList* scale, const aclTensorList* offset, const aclTensorList* antiquant_scale,
               const aclTensorList* antiquant_offset, const aclTensorList* per_token_scale, const aclTensor* group_list,
               const aclTensorList* activation_input, const aclTensorList* quant_scale, const aclTensorList* quant_offset,
               int64_t split_item, int64_t group_type, int64_t group_list_type, int64_t activation,
               const aclTensorList* out, const aclTensorList* features, const aclTensorList* scales),
              x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale, group_list,
              activation_input, quant_scale, quant_offset, split_item, group_type, group_list_type, activation, out,
              features, scales)
ACLNN_CHECKED(aclnnGroupedMatmulV5, check_v5, multiply_v5,
              (const aclTensorList* x, const aclTensorList* weight, const aclTensorList* bias,
               const aclTensorList* scale, const aclTensorList* offset, const aclTensorList* antiquant_scale,
               const aclTensorList* antiquant_offset, const aclTensorList* per_token_scale, const aclTensor* group_list,
               const aclTensorList* activation_input, const aclTensorList* quant_scale, const aclTensorList* quant_offset,
               int64_t split_item, int64_t group_type, int64_t group_list_type, int64_t activation,
               const aclIntArray* hint, const aclTensorList* out, const aclTensorList* features,
               const aclTensorList* scales),
              x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, per_token_scale, group_list,
              activation_input, quant_scale, quant_offset, split_item, group_type, group_list_type, activation, hint, out,
              features, scales)
