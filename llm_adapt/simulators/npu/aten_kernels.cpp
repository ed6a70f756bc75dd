// The extension module llm_adapt_npu_kernels: host kernels in the place of the NPU's aten kernels.
//
// What makes torch_npu torch_npu stays its own: allocation, views, copies, storage, streams. Every other aten kernel
// becomes torch's CPU kernel on the same bytes. An operator without an NPU kernel goes to the CPU on real hardware
// too, slowly and with a warning: those calls are counted.
#include <ATen/native/CPUFallback.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <string_view>

#include "cann.h"
#include "acl/acl.h"
#include "kernel.h"
#include "torch_npu/csrc/core/NPUStorageImpl.h"
#include "torch_npu/csrc/core/npu/NPUStream.h"

namespace llm_adapt {
namespace {

constexpr auto kKey = c10::DispatchKey::PrivateUse1;

class Npu : public host::HostDevice {
 public:
  Npu() : HostDevice(c10::DeviceType::PrivateUse1, "npu") {}

  // A1 and 310P have no bfloat16: such tensors can be allocated and copied, but nothing is computed with them.
  void check(const c10::OperatorHandle& op, host::Arguments arguments) override {
    static const bool has_bfloat16 = family() != Family::kA1 && family() != Family::k310P;
    if (has_bfloat16) return;
    for (const c10::IValue& value : arguments) {
      if (value.isTensor()) check_dtype(op, value.toTensor());
      if (!value.isTensorList()) continue;
      for (const at::Tensor& tensor : value.toTensorList()) check_dtype(op, tensor);
    }
  }

  void before(const c10::OperatorHandle& op, c10::Device where) override {
    // stream() waits for torch_npu's own task queue, stream_drain for collectives.
    const c10::DeviceGuard guard(where);  // the first use of a device makes its streams
    void* stream = c10_npu::getCurrentNPUStream(where.index()).stream();
    if (stream_pending(stream).empty()) {
      const std::string refused = queue_error();
      TORCH_CHECK(refused.empty(), refused);
      return;
    }
    std::optional<pybind11::gil_scoped_release> released;
    if (PyGILState_Check()) released.emplace();
    TORCH_CHECK(stream_drain(stream) == 0, "work before ", op.schema().name(), " on its stream failed: ", aclGetRecentErrMsg());
  }

  at::Tensor new_tensor(const c10::Storage& storage, const at::Tensor& on_host, const at::Tensor& base) override {
    if (base.defined()) return at::as_strided(base, on_host.sizes(), on_host.strides(), on_host.storage_offset());
    at::Tensor tensor = at::empty({0}, at::TensorOptions().dtype(on_host.dtype()).device(storage.device()));
    auto* impl = tensor.unsafeGetTensorImpl();
    impl->set_storage_keep_dtype(storage);
    set_layout(tensor, on_host);
    if (on_host.is_conj()) impl->_set_conj(true);
    if (on_host.is_neg()) impl->_set_neg(true);
    if (on_host.unsafeGetTensorImpl()->is_wrapped_number()) impl->set_wrapped_number(true);
    return tensor;
  }

  // torch_npu keeps a second description of each storage, from which it makes the tensors of CANN.
  void set_layout(const at::Tensor& tensor, const at::Tensor& on_host) override {
    HostDevice::set_layout(tensor, on_host);
    const c10::Storage& storage = tensor.storage();
    if (storage.data() == nullptr && storage.nbytes() > 0) return;  // of a zero tensor: not one of torch_npu's
    auto& described = static_cast<torch_npu::NPUStorageImpl*>(storage.unsafeGetStorageImpl())->npu_desc_;
    described.base_sizes_.assign(on_host.sizes().begin(), on_host.sizes().end());
    described.base_strides_.assign(on_host.strides().begin(), on_host.strides().end());
    described.storage_sizes_ = described.base_sizes_;
    described.origin_format_ = described.npu_format_ = ACL_FORMAT_ND;
    described.data_type_ = on_host.dtype();
  }

 private:
  void check_dtype(const c10::OperatorHandle& op, const at::Tensor& tensor) {
    TORCH_CHECK(!owns(tensor) || tensor.scalar_type() != at::kBFloat16, op.schema().name(), " was called with a ",
                "bfloat16 tensor, which ", soc_name(), " does not support. Use float16 or float32.");
  }
};

host::HostDevice& npu() {
  static auto* device = new Npu;
  return *device;
}

// Kernels of torch_npu that stay: memory, storage, streams, and moving between devices.
constexpr auto kKept = std::to_array<std::string_view>({
    "aten::empty", "aten::empty_like", "aten::empty_strided", "aten::new_empty", "aten::new_empty_strided",
    "aten::empty_with_format", "aten::set_", "aten::resize_", "aten::resize_as_", "aten::_resize_output_",
    "aten::record_stream", "aten::is_pinned", "aten::_pin_memory", "aten::pin_memory", "aten::is_set_to",
    "aten::copy_", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy", "aten::as_strided",
    "aten::view", "aten::_reshape_alias", "aten::unfold", "aten::_unsafe_view", "aten::_has_same_storage_numel",
    "aten::_has_compatible_shallow_copy_type", "aten::_efficientzerotensor", "aten::tensor_split",
    "aten::_local_scalar_dense", "aten::_fused_adamw_", "aten::_fused_adam_", "aten::gelu", "aten::gelu_backward",
});

bool stays(const c10::OperatorHandle& op) {
  if (!op.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU)) return true;  // torch_npu's own, made of others
  for (const auto& result : op.schema().returns()) {
    if (result.alias_info() != nullptr && !result.alias_info()->isWrite()) return true;  // a view
  }
  if (op.hasTag(at::Tag::inplace_view)) return true;
  return std::find(kKept.begin(), kKept.end(), op.schema().name()) != kKept.end();
}

// Attention reaches aclnn through torch_npu's own choice of a backend; replaced by a CPU kernel it would not.
bool is_attention(const c10::OperatorHandle& op) {
  return op.schema().name().find("scaled_dot_product") != std::string::npos;
}

std::mutex fallbacks_mutex;
std::map<std::string, int64_t> fallbacks;

// What torch_npu does with an operator that the NPU lacks, with a count.
void fall_back(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  static const bool disabled = std::string_view(std::getenv("TORCH_NPU_FALLBACK_CPU_DISABLE") ?: "0") == "1";
  const std::string& name = op.schema().name();
  TORCH_CHECK(!disabled, "the operator '", name, "' is not supported on the NPU (TORCH_NPU_FALLBACK_CPU_DISABLE=1)");
  bool is_first = false;
  {
    std::lock_guard<std::mutex> lock(fallbacks_mutex);
    is_first = fallbacks[name]++ == 0;
  }
  if (is_first) {
    TORCH_WARN("The operator '", name, "' is not supported on the NPU backend and will fall back to run on the CPU: "
               "slow on real hardware. (NPU simulator)");
  }
  npu().before(op, c10::impl::getDeviceGuardImpl(npu().type())->getDevice());
  at::native::cpu_fallback(op, stack);
}

bool goes_to_the_cpu(const c10::OperatorHandle& op) {
  using Key = c10::DispatchKey;
  for (Key composite : {Key::CompositeImplicitAutograd, Key::CompositeExplicitAutograd, Key::CompositeExplicitAutogradNonFunctional}) {
    if (op.hasKernelForDispatchKey(composite)) return false;
  }
  return op.hasKernelForDispatchKey(Key::CPU);
}

std::map<std::string, int64_t> install() {
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", kKey, __FILE__, __LINE__);
  std::map<std::string, int64_t> counts;
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames()) {
    const auto op = c10::Dispatcher::singleton().findSchema(name);
    const std::string full = c10::toString(name);
    if (!op || full.rfind("aten::", 0) != 0) continue;
    const std::string local = full.substr(6);
    if (op->hasKernelForDispatchKey(kKey)) {
      const bool kept = stays(*op) || is_attention(*op);
      ++counts[kept ? "kept" : "replaced"];
      if (!kept) library->impl(local.c_str(), torch::CppFunction::makeFromBoxedFunction<&host::run<&npu>>());
    } else if (goes_to_the_cpu(*op)) {
      ++counts["counted"];
      library->impl(local.c_str(), torch::CppFunction::makeFromBoxedFunction<&fall_back>());
    }
  }
  return counts;
}

std::map<std::string, int64_t> fallback_counts() {
  std::lock_guard<std::mutex> lock(fallbacks_mutex);
  return fallbacks;
}

}  // namespace
}  // namespace llm_adapt

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  module.def("install", &llm_adapt::install, "Replace the kernels; counts of what was replaced, kept and counted.");
  module.def("fallback_counts", &llm_adapt::fallback_counts, "Calls of each operator that the NPU lacks.");
}
