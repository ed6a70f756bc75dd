// Matrix products of any rank: aclnnMatmul, which torch_npu's own autograd node of matmul runs, and the two GE
// operators that it takes instead on chips of the older way, and in npu_bmmV2.
//
// They accumulate in float32 and round once. Source: op-plugin 517f2e7d MatmulBackwardKernelNpuOpApi, BmmV2KernelNpu.
#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

void check_factors(const Tensor& left, const Tensor& right) {
  check_floating(left, "the left factor");
  check_same_dtype(left, "the left factor", right, "the right factor");
}

void check_matmul(const Tensor& left, const Tensor& right, const Tensor&, int8_t) { check_factors(left, right); }

void matmul(const Tensor& left, const Tensor& right, const Tensor& output, int8_t) {
  store(output, at::matmul(wide(left), wide(right)));
}

// A transposed factor is given as it lies in memory, with a flag.
void legacy_product(const LegacyArguments& given, const char* left_flag, const char* right_flag) {
  Tensor left = given.inputs[0], right = given.inputs[1];
  check_factors(left, right);
  if (given.attribute<bool>(left_flag)) left = left.transpose(-2, -1);
  if (given.attribute<bool>(right_flag)) right = right.transpose(-2, -1);
  Tensor result = at::matmul(wide(left), wide(right));
  if (given.inputs.size() > 2) result = result + wide(given.inputs[2]);
  store(given.outputs[0], result);
}

const LegacyOperator product_of_two("MatMul", [](const LegacyArguments& given) {
  legacy_product(given, "transpose_x1", "transpose_x2");
});
const LegacyOperator product_of_batches("BatchMatMul", [](const LegacyArguments& given) {
  legacy_product(given, "adj_x1", "adj_x2");
});

}  // namespace

ACLNN_CHECKED(aclnnMatmul, check_matmul, matmul,
              (const aclTensor* left, const aclTensor* right, const aclTensor* output, int8_t cube_math_type), left,
              right, output, cube_math_type)

}  // namespace llm_adapt::opapi
