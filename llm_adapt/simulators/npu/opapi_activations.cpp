// Activations of one input: gelu in both forms, fast gelu and silu, with their gradients.
//
// Sources: op-plugin documents of npu_gelu and npu_fast_gelu, CANN ops-nn documents of the aclnn functions.
#include "opapi_legacy.h"

using namespace llm_adapt::opapi;

namespace {

constexpr double kFast = 1.702;

void check_elementwise(const Tensor& x, const Tensor& y) {
  check_floating(x, "x");
  check_rank(x, "x", 0, 8);
  check_same_dtype(x, "x", y, "y");
  check_same_shape(x, "x", y, "y");
}

const char* form_of(int64_t approximate) { return approximate == 1 ? "tanh" : "none"; }

void gelu_v2(const Tensor& x, int64_t approximate, const Tensor& y) {
  store(y, at::gelu(wide(x), form_of(approximate)));
}

void check_gelu_v2(const Tensor& x, int64_t approximate, const Tensor& y) {
  check_elementwise(x, y);
  check(approximate == 0 || approximate == 1, "approximate must be 0 (erf) or 1 (tanh), not ", approximate);
}

void gelu_backward_v2(const Tensor& dy, const Tensor& x, const std::string& approximate, const Tensor& dx) {
  const std::vector<Tensor> both = at::broadcast_tensors({wide(dy), wide(x)});
  store(dx, at::gelu_backward(both[0], both[1], approximate));
}

void check_gelu_backward_v2(const Tensor& dy, const Tensor& x, const std::string& approximate, const Tensor& dx) {
  check_floating(dy, "dy");
  check_elementwise(x, dx);
  check(approximate == "none" || approximate == "tanh", "approximate must be none or tanh, not ", approximate);
}

void fast_gelu(const Tensor& x, const Tensor& y) {
  const Tensor x_wide = wide(x);
  store(y, x_wide * at::sigmoid(x_wide * kFast));
}

void fast_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& dx) {
  const Tensor x_wide = wide(x);
  const Tensor gate = at::sigmoid(x_wide * kFast);
  store(dx, wide(dy) * gate * (1 + x_wide * kFast * (1 - gate)));
}

void check_fast_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& dx) {
  check_elementwise(x, dx);
  check_same_dtype(x, "x", dy, "dy");
  check_same_shape(x, "x", dy, "dy");
}

// op-plugin only asks whether it is there: aten's own kernel of it is called.
void log_sigmoid(const Tensor& x, const Tensor& y) { store(y, at::log_sigmoid(wide(x))); }

// A1 and 310P take fast gelu as a GE operator; npu_silu is one on every chip.
const LegacyOperator legacy_fast_gelu("FastGelu", [](const LegacyArguments& given) {
  check_elementwise(given.inputs[0], given.outputs[0]);
  fast_gelu(given.inputs[0], given.outputs[0]);
});
const LegacyOperator legacy_fast_gelu_grad("FastGeluGrad", [](const LegacyArguments& given) {
  check_fast_gelu_backward(given.inputs[0], given.inputs[1], given.outputs[0]);
  fast_gelu_backward(given.inputs[0], given.inputs[1], given.outputs[0]);
});

void check_silu(const Tensor& x) {
  check(is_one_of(x.scalar_type(), {at::kFloat, at::kHalf}), "x must be float32 or float16, not ", x.scalar_type());
}
const LegacyOperator legacy_silu("Swish", [](const LegacyArguments& given) {
  check_silu(given.inputs[0]);
  store(given.outputs[0], at::silu(wide(given.inputs[0])));
});
const LegacyOperator legacy_silu_grad("SwishGrad", [](const LegacyArguments& given) {
  check_silu(given.inputs[1]);
  store(given.outputs[0], at::silu_backward(wide(given.inputs[0]), wide(given.inputs[1])));
});

}  // namespace

ACLNN_CHECKED(aclnnLogSigmoid, check_elementwise, log_sigmoid, (const aclTensor* x, const aclTensor* y), x, y)
ACLNN_CHECKED(aclnnGeluV2, check_gelu_v2, gelu_v2, (const aclTensor* x, int64_t approximate, const aclTensor* y), x,
              approximate, y)
ACLNN_CHECKED(aclnnGeluBackwardV2, check_gelu_backward_v2, gelu_backward_v2,
              (const aclTensor* dy, const aclTensor* x, char* approximate, const aclTensor* dx), dy, x, approximate,
              dx)
ACLNN_CHECKED(aclnnFastGelu, check_elementwise, fast_gelu, (const aclTensor* x, const aclTensor* y), x, y)
ACLNN_CHECKED(aclnnFastGeluBackward, check_fast_gelu_backward, fast_gelu_backward,
              (const aclTensor* dy, const aclTensor* x, const aclTensor* dx), dy, x, dx)
