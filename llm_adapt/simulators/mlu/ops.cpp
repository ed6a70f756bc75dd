// Operators of the mlu device: allocation here, everything else by the host kernel within the device's limits.
#include "mlu.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/Resize.h>
#include <torch/library.h>

#include "kernel.h"

namespace llm_adapt::mlu {
namespace {

bool is_float8(at::ScalarType dtype) { return c10::isFloat8Type(dtype); }

// Moving bytes needs no arithmetic.
bool only_moves(const c10::OperatorHandle& op) {
  const std::string& name = op.schema().name();
  if (name == "aten::copy_" || name == "aten::resize_" || name == "aten::set_") {
    return true;
  }
  for (const auto& result : op.schema().returns()) {
    if (result.alias_info() == nullptr || result.alias_info()->isWrite()) {
      return false;
    }
  }
  return !op.schema().returns().empty();
}

void refuse_complex_double(at::ScalarType dtype) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      dtype != at::kComplexDouble,
      "complex128 was asked on an MLU, whose float64 is float32 inside; what complex128 does there is not public. "
      "Use complex64.");
}

class Mlu final : public host::HostDevice {
 public:
  Mlu() : HostDevice(kDevice, "mlu") {}

  void check(const c10::OperatorHandle& op, host::Arguments arguments) override {
    for (const c10::IValue& value : arguments) {
      if (value.isTensor()) {
        check(op, value.toTensor());
      } else if (value.isTensorList()) {
        for (const at::Tensor& tensor : value.toTensorList()) {
          check(op, tensor);
        }
      }
    }
  }

  // float64 is stored and computed as float32.
  void written(const at::Tensor& on_host) override {
    refuse_complex_double(on_host.scalar_type());
    if (on_host.scalar_type() == at::kDouble && on_host.numel() > 0) {
      on_host.copy_(on_host.to(at::kFloat));
    }
  }

 private:
  void check(const c10::OperatorHandle& op, const at::Tensor& tensor) const {
    if (!owns(tensor)) {
      return;
    }
    TORCH_CHECK_NOT_IMPLEMENTED(
        !is_float8(tensor.scalar_type()) || major_capability() >= 6 || only_moves(op), op.schema().name(),
        " was asked in ", tensor.scalar_type(), "; an MLU computes in float8 from capability 6 on, and this one has ",
        major_capability(), ". Use bfloat16.");
  }
};

at::Tensor empty(
    at::IntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> where, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK_NOT_IMPLEMENTED(
      layout.value_or(at::kStrided) == at::kStrided, "The mlu simulator models strided tensors.");
  const auto type = c10::dtype_or_default(dtype);
  refuse_complex_double(type);
  const c10::OptionalDeviceGuard on(where);
  return at::detail::empty_generic(size, &memory(), c10::DispatchKeySet(device().key()), type, format);
}

at::Tensor empty_strided(
    at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device> where, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  const auto type = c10::dtype_or_default(dtype);
  refuse_complex_double(type);
  const c10::OptionalDeviceGuard on(where);
  return at::detail::empty_strided_generic(size, stride, &memory(), c10::DispatchKeySet(device().key()), type);
}

// Kernels finish before the call returns, so no stream can still use the memory.
void record_stream(at::Tensor& tensor, c10::Stream stream) {}

constexpr auto kHostKernel = &host::run<&device>;

}  // namespace

host::HostDevice& device() {
  static auto* one = new Mlu;
  return *one;
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<kHostKernel>());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("record_stream", &record_stream);
  // torch's own kernel of copy_ asks for a stub of the device.
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<kHostKernel>());
}

}  // namespace llm_adapt::mlu
