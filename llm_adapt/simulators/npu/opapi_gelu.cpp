// aclnnGelu and its gradient: what F.gelu runs on chips before Ascend950, whatever `approximate` says.
//
// Source: op-plugin 517f2e7d GeluKernelNpuOpApi, GeluBackwardKernelNpuOpApi (without TORCH_NPU_USE_COMPATIBLE_IMPL).
#include "opapi.h"

namespace llm_adapt::opapi {
namespace {

void gelu(const Tensor& x, Tensor y) { y.copy_(at::gelu(wide(x), "tanh")); }

void gelu_backward(const Tensor& dy, const Tensor& x, Tensor dx) {
  dx.copy_(at::gelu_backward(wide(dy), wide(x), "tanh"));
}

}  // namespace

ACLNN(aclnnGelu, gelu, (const aclTensor* x, const aclTensor* y), x, y)
ACLNN(aclnnGeluBackward, gelu_backward,
      (const aclTensor* dy, const aclTensor* x, const aclTensor* dx), dy, x, dx)

}  // namespace llm_adapt::opapi
