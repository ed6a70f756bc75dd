// Gradients of weights, added up in float32: aclnnGroupedMatmulAdd and aclnnGroupedMatmulAddV2.
//
// y[e] += x[rows of e]' @ weight[rows of e]; x [T, M], weight [T, N], y [E, M, N] or [E M, N]. A group without rows leaves
// its y as it is. Limits: documents of torch_npu 2.13 and of aclnnGroupedMatmulAdd. op-plugin calls V2 on Ascend950
// alone; elsewhere the group_list_type that a user gives goes nowhere, and the list is taken as cumulative.
#include "opapi_moe.h"

using namespace llm_adapt;
using namespace llm_adapt::opapi;

namespace {

void check_add(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool transpose_x,
               bool transpose_weight, int64_t group_type) {
  check_rank(x, "x", 2);
  check_rank(weight, "weight", 2);
  check_dtype(x, "x", {at::kHalf, at::kBFloat16});
  check_same_dtype(x, "x", weight, "weight");
  check_dtype(y, "input", {at::kFloat});
  check_dtype(group_list, "group_list", {at::kLong});
  check_rank(group_list, "group_list", 1);
  check(transpose_x && !transpose_weight, "transpose_x must be True and transpose_weight False");
  check(group_type == 2, "group_type must be 2, not ", group_type);
  check(x.size(0) == weight.size(0), "x ", x.sizes(), " and weight ", weight.sizes(), " differ in rows");
  check(y.is_contiguous(), "input must be contiguous");
  check(y.numel() == group_list.size(0) * x.size(1) * weight.size(1), "input ", y.sizes(), " is not [E, M, N] of x ", x.sizes(),
        ", weight ", weight.sizes(), " and ", group_list.size(0), " groups");
}

void add(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool are_counts) {
  const std::vector<int64_t> ends = group_ends(group_list, are_counts);
  check(ends.empty() || ends.back() <= x.size(0), "group_list has ", ends.back(), " rows of ", x.size(0));
  const Tensor of_groups = y.view({group_list.size(0), x.size(1), weight.size(1)});
  int64_t first = 0;
  for (size_t e = 0; e < ends.size(); ++e) {
    of_groups.select(0, e).add_(wide(x.slice(0, first, ends[e])).t().matmul(wide(weight.slice(0, first, ends[e]))));
    first = ends[e];
  }
}

void check_v1(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool transpose_x,
              bool transpose_weight, int64_t group_type) {
  check_chip({Family::kA2, Family::kA3});
  check_add(x, weight, group_list, y, transpose_x, transpose_weight, group_type);
}

void add_v1(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool, bool, int64_t) {
  add(x, weight, group_list, y, false);
}

void check_v2(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool transpose_x,
              bool transpose_weight, int64_t group_type, int64_t group_list_type) {
  check_chip({Family::kA5});
  check_add(x, weight, group_list, y, transpose_x, transpose_weight, group_type);
  check(group_list_type == 0 || group_list_type == 1, "group_list_type must be 0 or 1, not ", group_list_type);
}

void add_v2(const Tensor& x, const Tensor& weight, const Tensor& group_list, const Tensor& y, bool, bool, int64_t,
            int64_t group_list_type) {
  add(x, weight, group_list, y, group_list_type == 1);
}

}  // namespace

ACLNN_CHECKED(aclnnGroupedMatmulAdd, check_v1, add_v1,
              (const aclTensor* x, const aclTensor* weight, const aclTensor* group_list, const aclTensor* y,
               bool transpose_x, bool transpose_weight, int64_t group_type),
              x, weight, group_list, y, transpose_x, transpose_weight, group_type)
ACLNN_CHECKED(aclnnGroupedMatmulAddV2, check_v2, add_v2,
              (const aclTensor* x, const aclTensor* weight, const aclTensor* group_list, const aclTensor* y,
               bool transpose_x, bool transpose_weight, int64_t group_type, int64_t group_list_type),
              x, weight, group_list, y, transpose_x, transpose_weight, group_type, group_list_type)
