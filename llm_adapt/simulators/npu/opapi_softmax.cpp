// aclnnSoftmax; aclnnScaledMaskedSoftmax and its gradient: softmax(x scale) of what is not masked; True = masked out.
//
// op-plugin calls the masked ones on Ascend 950 alone; older chips take the GE operators at the end. Sources: op-plugin
// document of npu_scaled_masked_softmax, CANN ops-nn documents of the aclnn functions. What a row that is
// masked as a whole becomes is written nowhere: it is refused.
#include <limits>

#include "opapi_legacy.h"

using namespace llm_adapt::opapi;

namespace {

void softmax(const Tensor& x, int64_t dim, const Tensor& y) { store(y, at::softmax(wide(x), dim)); }

void check_plain_softmax(const Tensor& x, int64_t, const Tensor&) { check_floating(x, "x"); }

void check_softmax(const Tensor& x, const Tensor& mask, double, bool fixed_triangle, const Tensor&) {
  check_floating(x, "x");
  check_rank(x, "x", 4, 4);
  for (int64_t axis : {-2, -1}) {
    const int64_t size = x.size(axis);
    check(32 <= size && size <= 4096 && size % 32 == 0,
          "the last two axes of x must be 32 to 4096 in steps of 32, not ", x.sizes());
  }
  check(!fixed_triangle, "fixed_triu_mask must be False");
  check(mask.scalar_type() == at::kBool && mask.dim() == 4, "the mask must be bool of four axes, not ",
        mask.scalar_type(), " ", mask.sizes());
  for (int64_t axis = 0; axis < 4; ++axis) {
    check(mask.size(axis) == x.size(axis) || mask.size(axis) == 1, "the mask ", mask.sizes(),
          " does not broadcast to x ", x.sizes());
  }
}

void scaled_masked_softmax(const Tensor& x, const Tensor& mask, double scale, bool, const Tensor& y) {
  const bool whole_row = mask.expand(x.sizes()).all(-1).any().item<bool>();
  TORCH_CHECK(!whole_row, "a row that is masked as a whole is not modelled");
  const Tensor scores = (wide(x) * scale).masked_fill(mask, -std::numeric_limits<double>::infinity());
  store(y, at::softmax(scores, -1));
}

void scaled_masked_softmax_backward(const Tensor& dy, const Tensor& y, const Tensor& mask, double scale, bool,
                                    const Tensor& dx) {
  const Tensor weighted = wide(dy) * wide(y);
  const Tensor gradient = (weighted - weighted.sum(-1, true) * wide(y)) * scale;
  store(dx, gradient.masked_fill(mask, 0.0));
}

void check_backward(const Tensor& dy, const Tensor& y, const Tensor& mask, double scale, bool fixed_triangle,
                    const Tensor& dx) {
  check_softmax(y, mask, scale, fixed_triangle, dx);
  check_same_dtype(y, "y", dy, "dy");
  check_same_shape(y, "y", dy, "dy");
}

const LegacyOperator forward("ScaledMaskedSoftmax", [](const LegacyArguments& given) {
  const Tensor &x = given.inputs[0], &mask = given.inputs[1], &y = given.outputs[0];
  const double scale = given.attribute<double>("scale");
  const bool fixed_triangle = given.attribute<bool>("fixed_triu_mask");
  check_softmax(x, mask, scale, fixed_triangle, y);
  scaled_masked_softmax(x, mask, scale, fixed_triangle, y);
});

const LegacyOperator backward("ScaledMaskedSoftmaxGrad", [](const LegacyArguments& given) {
  const Tensor &dy = given.inputs[0], &y = given.inputs[1], &mask = given.inputs[2], &dx = given.outputs[0];
  const double scale = given.attribute<double>("scale");
  const bool fixed_triangle = given.attribute<bool>("fixed_triu_mask");
  check_backward(dy, y, mask, scale, fixed_triangle, dx);
  scaled_masked_softmax_backward(dy, y, mask, scale, fixed_triangle, dx);
});

}  // namespace

ACLNN_CHECKED(aclnnSoftmax, check_plain_softmax, softmax,
              (const aclTensor* x, int64_t dim, const aclTensor* y), x, dim, y)
ACLNN_CHECKED(aclnnScaledMaskedSoftmax, check_softmax, scaled_masked_softmax,
              (const aclTensor* x, const aclTensor* mask, double scale, bool fixed_triangle, const aclTensor* y), x,
              mask, scale, fixed_triangle, y)
ACLNN_CHECKED(aclnnScaledMaskedSoftmaxBackward, check_backward, scaled_masked_softmax_backward,
              (const aclTensor* dy, const aclTensor* y, const aclTensor* mask, double scale, bool fixed_triangle,
               const aclTensor* dx),
              dy, y, mask, scale, fixed_triangle, dx)
