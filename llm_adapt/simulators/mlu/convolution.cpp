// Convolutions: torch asks a PrivateUse1 device for two operators of its own, which the CPU does not have.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "mirror.h"
#include "mlu.h"

namespace llm_adapt::mlu {
namespace {

using at::IntArrayRef;
using at::Tensor;

void check_devices(const Tensor& first, const Tensor& second) {
  TORCH_CHECK(
      first.device() == second.device(), "Expected all tensors to be on the same device, but found at least two "
      "devices, ", first.device(), " and ", second.device(), "! (in aten::convolution)");
}

Tensor on_host(const Tensor& tensor) { return tensor.defined() ? host::host_alias(tensor) : tensor; }
Tensor on_device(const Tensor& tensor, const Tensor& like) {
  return tensor.defined() ? tensor.to(like.device()) : tensor;
}

Tensor convolution(
    const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias, IntArrayRef stride,
    IntArrayRef padding, IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  check_devices(input, weight);
  const Tensor added = bias.value_or(Tensor());
  if (added.defined()) {
    check_devices(input, added);
  }
  const Tensor output = at::convolution(
      on_host(input), on_host(weight), on_host(added), stride, padding, dilation, transposed, output_padding, groups);
  return on_device(output, input);
}

std::tuple<Tensor, Tensor, Tensor> convolution_backward(
    const Tensor& grad, const Tensor& input, const Tensor& weight, IntArrayRef stride, IntArrayRef padding,
    IntArrayRef dilation, bool transposed, IntArrayRef output_padding, int64_t groups, std::array<bool, 3> wanted) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  const int64_t channels = transposed ? weight.size(1) * groups : weight.size(0);
  auto [to_input, to_weight, to_bias] = at::convolution_backward(
      on_host(grad), on_host(input), on_host(weight), IntArrayRef(&channels, 1), stride, padding, dilation, transposed,
      output_padding, groups, wanted);
  return {on_device(to_input, input), on_device(to_weight, input), on_device(to_bias, input)};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("convolution_overrideable", &convolution);
  library.impl("convolution_backward_overrideable", &convolution_backward);
}

}  // namespace llm_adapt::mlu
