// A device whose memory is host memory: what the shared host kernel must know about it, and may be told by it.
#pragma once
#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <string>
#include <utility>

namespace llm_adapt::host {

using Arguments = c10::ArrayRef<c10::IValue>;

// Subclassed once by each simulator. The defaults make a plain device over torch's own StorageImpl.
class HostDevice {
 public:
  HostDevice(c10::DeviceType type, std::string name) : type_(type), name_(std::move(name)) {}
  virtual ~HostDevice() = default;

  c10::DeviceType type() const { return type_; }
  // As messages spell it, e.g. "mlu".
  const std::string& name() const { return name_; }
  c10::DispatchKey key() const { return c10::computeDispatchKey(std::nullopt, std::nullopt, type_); }
  bool owns(const at::Tensor& tensor) const { return tensor.defined() && tensor.device().type() == type_; }
  std::string spell(c10::Device device) const;

  // Each operator on its original arguments; throws what the device cannot do.
  virtual void check(const c10::OperatorHandle& op, Arguments arguments) {}
  // After the check, before memory is read: for a device whose own work may be outstanding.
  virtual void before(const c10::OperatorHandle& op, c10::Device where) {}
  // After the CPU kernel, for each tensor that it made or wrote (views of arguments left out), as the CPU sees it.
  virtual void written(const at::Tensor& on_host) {}

  // Memory of `where`, readable by the host. Throws torch.OutOfMemoryError when there is none.
  virtual c10::Storage new_storage(size_t bytes, c10::Device where);
  // A tensor over the device's storage, laid out as `on_host` is. `base`: the argument it is a view of, if it is one.
  virtual at::Tensor new_tensor(const c10::Storage& storage, const at::Tensor& on_host, const at::Tensor& base);
  // Give a tensor the layout of `on_host`; its storage is right already. For devices that describe layouts twice.
  virtual void set_layout(const at::Tensor& tensor, const at::Tensor& on_host);

 private:
  c10::DeviceType type_;
  std::string name_;
};

inline std::string HostDevice::spell(c10::Device device) const {
  if (device.type() != type_) {
    return device.str();
  }
  return device.has_index() ? name_ + ":" + std::to_string(device.index()) : name_;
}

inline c10::Storage HostDevice::new_storage(size_t bytes, c10::Device where) {
  auto options = at::TensorOptions().dtype(at::kByte).device(where);
  return at::empty({static_cast<int64_t>(bytes)}, options).storage();
}

inline at::Tensor HostDevice::new_tensor(
    const c10::Storage& storage, const at::Tensor& on_host, const at::Tensor& base) {
  // A view is an inference tensor exactly where its base is one, whatever mode is on now.
  c10::DispatchKeySet keys = base.defined() ? base.key_set() : c10::DispatchKeySet(key());
  for (auto bit : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor}) {
    keys = on_host.key_set().has(bit) ? keys.add(bit) : keys.remove(bit);
  }
  c10::Storage shared = storage;
  auto tensor = base.defined()
      ? at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, std::move(shared), keys, on_host.dtype())
      : at::detail::make_tensor<c10::TensorImpl>(std::move(shared), keys, on_host.dtype());
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(on_host.sizes(), on_host.strides(), on_host.storage_offset());
  if (on_host.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  return tensor;
}

inline void HostDevice::set_layout(const at::Tensor& tensor, const at::Tensor& on_host) {
  auto* impl = tensor.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(on_host.sizes(), on_host.strides(), on_host.storage_offset());
}

}  // namespace llm_adapt::host
