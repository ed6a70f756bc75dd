// aclnnGelu and its gradient: what F.gelu runs on chips before Ascend950, whatever `approximate` says.
//
// Source: op-plugin 517f2e7d GeluKernelNpuOpApi, GeluBackwardKernelNpuOpApi (without TORCH_NPU_USE_COMPATIBLE_IMPL).
#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

void gelu(const Tensor& x, const Tensor& y) { store(y, at::gelu(wide(x), "tanh")); }

// torch_npu hands an out= on as it is: one that would have to grow is refused here, as the document says.
void check_gelu(const Tensor& x, const Tensor& y) {
  check_floating(x, "x");
  check_rank(x, "x", 0, 8);
  check_same_dtype(x, "x", y, "y");
  check_same_shape(x, "x", y, "y");
}

void gelu_backward(const Tensor& dy, const Tensor& x, const Tensor& dx) {
  const std::vector<Tensor> both = at::broadcast_tensors({wide(dy), wide(x)});
  store(dx, at::gelu_backward(both[0], both[1], "tanh"));
}

void check_gelu_backward(const Tensor& dy, const Tensor& x, const Tensor&) {
  check_floating(dy, "dy");
  check_floating(x, "x");
}

// On chips with jit_compile: the same form.
const LegacyOperator legacy_gelu("Gelu", [](const LegacyArguments& given) {
  check_gelu(given.inputs[0], given.outputs[0]);
  gelu(given.inputs[0], given.outputs[0]);
});
const LegacyOperator legacy_gelu_gradient("GeluGrad", [](const LegacyArguments& given) {
  check_gelu_backward(given.inputs[0], given.inputs[1], given.outputs[0]);
  gelu_backward(given.inputs[0], given.inputs[1], given.outputs[0]);
});

}  // namespace

ACLNN_CHECKED(aclnnGelu, check_gelu, gelu, (const aclTensor* x, const aclTensor* y), x, y)
ACLNN_CHECKED(aclnnGeluBackward, check_gelu_backward, gelu_backward,
              (const aclTensor* dy, const aclTensor* x, const aclTensor* dx), dy, x, dx)

}  // namespace llm_adapt::opapi
