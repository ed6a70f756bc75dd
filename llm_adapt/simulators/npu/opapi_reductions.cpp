// What torch_npu's own C++ calls of reductions and comparisons: nansum, the larger or smaller of two, vector norms.
//
// Source: op-plugin 517f2e7d NansumKernelNpuOpApi, MaxKernelNpuOpApi, LinalgNormKernelNpuOpApi, LinalgNormKernelNpu.
#include <climits>
#include <limits>

#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

void nansum(const Tensor& input, const Ints& axes, bool keeps, int dtype, const Tensor& output) {
  store(output, at::nansum(wide(input), at::IntArrayRef(*axes), keeps).to(scalar_type(dtype)));
}

void check_nansum(const Tensor&, const Ints& axes, bool, int, const Tensor&) {
  check(axes.has_value(), "the axes are not given");
}

void maximum(const Tensor& first, const Tensor& other, const Tensor& output) {
  store(output, at::maximum(first, other));
}

void minimum(const Tensor& first, const Tensor& other, const Tensor& output) {
  store(output, at::minimum(first, other));
}

void vector_norm(const Tensor& input, const at::Scalar& order, const Ints& axes, bool keeps, int dtype,
                 const Tensor& output) {
  const bool all = !axes || axes->empty();
  const at::OptionalIntArrayRef over = all ? at::OptionalIntArrayRef() : at::OptionalIntArrayRef(*axes);
  store(output, at::linalg_vector_norm(wide(input), order, over, keeps).to(scalar_type(dtype)));
}

// GE has the norm in two operators: the sum of powers, then its root. An infinite order is INT_MAX or INT_MIN.
double order_of(const LegacyArguments& given) {
  const double order = given.attribute<double>("p");
  if (order >= static_cast<double>(INT_MAX)) return std::numeric_limits<double>::infinity();
  if (order <= static_cast<double>(INT_MIN)) return -std::numeric_limits<double>::infinity();
  return order;
}

const LegacyOperator powers("LpNormReduceV2", [](const LegacyArguments& given) {
  const double order = order_of(given);
  const auto axes = given.attribute<std::vector<int64_t>>("axes");
  const bool keeps = given.attribute<bool>("keepdim");
  const Tensor sizes = given.inputs[0].abs();
  if (std::isinf(order)) {
    store(given.outputs[0], order > 0 ? at::amax(sizes, axes, keeps) : at::amin(sizes, axes, keeps));
  } else {
    const Tensor terms = order == 0 ? sizes.ne(0).to(at::kFloat) : sizes.pow(order);
    store(given.outputs[0], axes.empty() ? terms.sum() : terms.sum(axes, keeps));
  }
});

const LegacyOperator root("LpNormUpdateV2", [](const LegacyArguments& given) {
  const double order = order_of(given);
  const Tensor& total = given.inputs[0];
  store(given.outputs[0], order == 0 || std::isinf(order) ? total : total.pow(1 / order));
});

}  // namespace

ACLNN_CHECKED(aclnnReduceNansum, check_nansum, nansum,
              (const aclTensor* input, const aclIntArray* axes, bool keeps, int dtype, const aclTensor* output), input,
              axes, keeps, dtype, output)
ACLNN(aclnnMaximum, maximum, (const aclTensor* first, const aclTensor* other, const aclTensor* output), first, other,
      output)
ACLNN(aclnnMinimum, minimum, (const aclTensor* first, const aclTensor* other, const aclTensor* output), first, other,
      output)
ACLNN(aclnnLinalgVectorNorm, vector_norm,
      (const aclTensor* input, const aclScalar* order, const aclIntArray* axes, bool keeps, int dtype,
       const aclTensor* output),
      input, order, axes, keeps, dtype, output)

}  // namespace llm_adapt::opapi
