// The CUDA dispatch key: allocation and views here, everything else by the shared host kernel.
//
// An operator that the CPU computes is registered by name, so that it is preferred to torch's composite of it, which
// may look for a compiled CUDA kernel. One that is neither registered nor a composite reaches the fallback and raises.
#include "operators.h"

#include "devices.h"
#include "kernel.h"

#include <ATen/EmptyTensor.h>
#include <ATen/native/TensorFactories.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/unfold_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/DeviceGuard.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <unordered_set>

namespace llm_adapt::dcu {

namespace {

bool g_has_fp8_matmul = false;
bool g_has_bfloat16 = false;
bool g_has_flash_attn = false;

class Dcu final : public host::HostDevice {
 public:
  Dcu() : host::HostDevice(kCuda, "cuda") {}

  void check(const c10::OperatorHandle& op, host::Arguments arguments) override {
    const std::string& name = op.schema().name();
    TORCH_CHECK_NOT_IMPLEMENTED(
        g_has_fp8_matmul || name != "aten::_scaled_mm",
        "torch._scaled_mm was called; this chip has no float8 matrix product (gfx938 and gfx92a have).");
    if (!g_has_bfloat16) {
      refuse_bfloat16(op, arguments);
    }
  }

 private:
  void refuse_bfloat16(const c10::OperatorHandle& op, host::Arguments arguments) const {
    for (const c10::IValue& value : arguments) {
      TORCH_CHECK_NOT_IMPLEMENTED(
          !value.isTensor() || !owns(value.toTensor()) || value.toTensor().scalar_type() != at::kBFloat16,
          op.operator_name(), " was called with bfloat16; whether this chip has it is not public (BW1000 and BW1100 "
          "have), and the simulator invents nothing.");
    }
  }
};

}  // namespace

host::HostDevice& device() {
  static auto* const one = new Dcu();
  return *one;
}

namespace {

at::Tensor empty(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<at::Device> where, std::optional<bool> pin_memory, std::optional<at::MemoryFormat> format) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK_NOT_IMPLEMENTED(
      layout.value_or(at::kStrided) == at::kStrided, "The dcu simulator models strided tensors, not layout ", *layout);
  const c10::DeviceGuard guard(whole(where.value_or(c10::Device(kCuda))));
  return at::detail::empty_generic_symint(
      size, c10::GetAllocator(kCuda), c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::dtype_or_default(dtype),
      format);
}

at::Tensor empty_strided(
    c10::SymIntArrayRef size, c10::SymIntArrayRef stride, std::optional<at::ScalarType> dtype,
    std::optional<at::Layout> layout, std::optional<at::Device> where, std::optional<bool> pin_memory) {
  TORCH_CHECK(!pin_memory.value_or(false), "Only dense CPU tensors can be pinned");
  TORCH_CHECK_NOT_IMPLEMENTED(
      layout.value_or(at::kStrided) == at::kStrided, "The dcu simulator models strided tensors, not layout ", *layout);
  const c10::DeviceGuard guard(whole(where.value_or(c10::Device(kCuda))));
  return at::detail::empty_strided_symint_generic(
      size, stride, c10::GetAllocator(kCuda), c10::DispatchKeySet(c10::DispatchKey::CUDA),
      c10::dtype_or_default(dtype));
}

// Zeros without memory: every operator that reads them knows them by their dispatch key.
at::Tensor efficient_zeros(
    c10::SymIntArrayRef size, std::optional<at::ScalarType> dtype, std::optional<at::Layout> /*layout*/,
    std::optional<at::Device> where, std::optional<bool> /*pin_memory*/) {
  at::native::ZeroTensorAllocator no_memory(whole(where.value_or(c10::Device(kCuda))));
  const c10::DispatchKeySet keys({c10::DispatchKey::CUDA, c10::DispatchKey::ZeroTensor});
  return at::detail::empty_generic_symint(size, &no_memory, keys, c10::dtype_or_default(dtype), std::nullopt);
}

void record_stream(at::Tensor& /*tensor*/, at::Stream stream) {
  TORCH_CHECK(stream.device_type() == kCuda, "record_stream takes a stream of cuda; it was given one of ", stream);
}

// Whether torch's own rules let the flash backend serve the call, but for the library that DTK loads for it.
bool takes_flash(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, bool has_mask) {
  const bool has_type = query.scalar_type() == at::kHalf || query.scalar_type() == at::kBFloat16;
  const bool has_rank = query.dim() == 4 && key.dim() == 4 && value.dim() == 4;
  return has_type && has_rank && !has_mask && query.size(-1) == value.size(-1) && query.size(-1) <= 512;
}

// Flash is computed by the same formula as math here, so that the answer is math wherever the device has an answer.
std::int64_t fused_sdp_choice(
    const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const std::optional<at::Tensor>& mask,
    double /*dropout_p*/, bool /*is_causal*/, std::optional<double> /*scale*/, bool /*enable_gqa*/) {
  const auto& context = at::globalContext();
  const bool has_mask = mask && mask->defined();
  if (context.userEnabledFlashSDP() && takes_flash(query, key, value, has_mask)) {
    TORCH_CHECK(g_has_flash_attn, "No matching libraries found for flash_attn_2_cuda*.so");
  } else {
    TORCH_CHECK(context.userEnabledMathSDP(), "No available kernel. Aborting execution.");
  }
  return static_cast<std::int64_t>(at::SDPBackend::math);
}

// Allocation, views and decisions of the device itself.
const std::unordered_set<std::string>& own_kernels() {
  static const std::unordered_set<std::string> names = {
      "aten::empty.memory_format", "aten::empty_strided", "aten::as_strided", "aten::view", "aten::_reshape_alias",
      "aten::unfold", "aten::record_stream", "aten::_fused_sdp_choice", "aten::_efficientzerotensor",
  };
  return names;
}

// Composites of torch that ask for the device's compiled kernels inside.
const std::vector<std::string>& composites() {
  static const std::vector<std::string> names = {
      "aten::copy_", "aten::convolution", "aten::convolution_backward", "aten::_convolution",
  };
  return names;
}

bool is_cpu_operator(const c10::OperatorHandle& op) {
  const std::string& name = op.operator_name().name;
  return name.rfind("aten::", 0) == 0 && op.hasKernelForDispatchKey(c10::DispatchKey::CPU) &&
      own_kernels().count(c10::toString(op.operator_name())) == 0;
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", &empty);
  library.impl("empty_strided", &empty_strided);
  library.impl("as_strided", &at::native::as_strided_tensorimpl);
  library.impl("view", &at::native::view);
  library.impl("_reshape_alias", &at::native::_reshape_alias);
  library.impl("unfold", &at::native::unfold);
  library.impl("record_stream", &record_stream);
  library.impl("_efficientzerotensor", &efficient_zeros);
  library.impl("_fused_sdp_choice", &fused_sdp_choice);
}

void not_modelled(const c10::OperatorHandle& op, torch::jit::Stack* /*stack*/) {
  TORCH_CHECK_NOT_IMPLEMENTED(
      false, op.operator_name(), " was called on cuda; the dcu simulator runs the operators that torch has for the CPU, "
      "and this is none of them.");
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&not_modelled>());
}

}  // namespace

void set_limits(bool has_fp8_matmul, bool has_bfloat16, bool has_flash_attn) {
  g_has_fp8_matmul = has_fp8_matmul;
  g_has_bfloat16 = has_bfloat16;
  g_has_flash_attn = has_flash_attn;
}

int register_kernels() {
  // scaled_dot_product_attention asks here, and not the dispatcher.
  at::native::_fused_sdp_choice_stub.set_cuda_dispatch_ptr(&fused_sdp_choice);
  // Kept for the life of the process: a torch::Library takes its kernels with it.
  static auto* const library =
      new torch::Library(torch::Library::IMPL, "aten", c10::DispatchKey::CUDA, __FILE__, __LINE__);
  const std::size_t prefix = std::string("aten::").size();
  int count = 0;
  const auto add = [&](const std::string& whole_name) {
    auto function = torch::CppFunction::makeFromBoxedFunction<&host::run<&device>>();
    library->impl(whole_name.substr(prefix).c_str(), std::move(function));
    count += 1;
  };
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const auto& name : dispatcher.getAllOpNames()) {
    const auto op = dispatcher.findSchema(name);
    if (op && is_cpu_operator(*op)) {
      add(c10::toString(name));
    }
  }
  for (const std::string& name : composites()) {
    add(name);
  }
  return count;
}

void resize_storage(const c10::Storage& storage, std::size_t bytes) {
  TORCH_CHECK(storage.resizable(), "Trying to resize storage that is not resizable");
  const c10::DeviceGuard guard(storage.device());
  c10::DataPtr fresh = storage.allocator()->allocate(bytes);
  const std::size_t kept = std::min(bytes, storage.nbytes());
  if (kept > 0 && storage.data() != nullptr) {
    std::memcpy(fresh.get(), storage.data(), kept);
  }
  storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
  storage.unsafeGetStorageImpl()->set_nbytes(bytes);
}

}  // namespace llm_adapt::dcu
