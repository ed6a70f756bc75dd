// Device tensors as the CPU sees them, for the length of one operator: the same bytes, another device.
//
// One CPU storage stands for each device storage, so that what aliased on the device aliases on the host, and a
// kernel that swaps a storage (out= that must grow, set_) is seen afterwards.
#pragma once
#include <c10/core/CPUAllocator.h>

#include <cstring>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "device.h"

namespace llm_adapt::host {

class Mirror {
 public:
  explicit Mirror(HostDevice& device) : device_(device) {}

  at::Tensor to_host(const at::Tensor& tensor);
  c10::Storage to_host(const c10::Storage& storage);

  // After the kernel: storages and layouts that it changed are changed on the device too.
  void write_back();

  // A result as the caller must get it: the original where the kernel returned an argument, a view of it where it
  // returned a view, else memory of `where`.
  at::Tensor to_device(const at::Tensor& result, c10::Device where);
  // Neither an argument nor a view of one.
  bool is_new(const at::Tensor& result) const;

 private:
  struct Pair {
    at::Tensor on_host;
    at::Tensor original;
  };
  struct Memory {
    c10::Storage on_host;
    c10::Storage original;
  };

  void write_back(Memory& memory);
  void write_back(const Pair& pair);
  const c10::Storage& adopt(const c10::Storage& on_host, c10::Device where);
  c10::Storage moved(const c10::Storage& on_host, c10::Device where);
  at::Tensor argument_over(const c10::Storage& original) const;

  HostDevice& device_;
  std::vector<Pair> pairs_;
  std::vector<Memory> memories_;
  std::unordered_map<const c10::TensorImpl*, size_t> pair_of_host_;
  std::unordered_map<const c10::StorageImpl*, size_t> memory_of_original_;
  std::unordered_map<const c10::StorageImpl*, size_t> memory_of_host_;
  std::unordered_set<const c10::TensorImpl*> foreign_;
};

inline c10::Storage Mirror::to_host(const c10::Storage& storage) {
  auto found = memory_of_original_.find(storage.unsafeGetStorageImpl());
  if (found != memory_of_original_.end()) {
    return memories_[found->second].on_host;
  }
  // No deleter: the device's storage owns the bytes and outlives the operator.
  c10::DataPtr bytes(storage.mutable_data(), c10::Device(c10::kCPU));
  c10::Storage on_host(
      c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(bytes), c10::GetCPUAllocator(), /*resizable=*/true);
  memory_of_original_.emplace(storage.unsafeGetStorageImpl(), memories_.size());
  memory_of_host_.emplace(on_host.unsafeGetStorageImpl(), memories_.size());
  memories_.push_back({on_host, storage});
  return on_host;
}

inline at::Tensor Mirror::to_host(const at::Tensor& tensor) {
  if (!device_.owns(tensor)) {
    foreign_.insert(tensor.unsafeGetTensorImpl());
    return tensor;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      tensor.layout() == c10::kStrided && !tensor.is_quantized(),
      "The ", device_.name(), " simulator models strided tensors; it was given one with layout ", tensor.layout(), ".");
  c10::DispatchKeySet keys(c10::DispatchKey::CPU);
  for (auto bit : {c10::DispatchKey::Conjugate, c10::DispatchKey::Negative, c10::DispatchKey::ZeroTensor}) {
    if (tensor.key_set().has(bit)) {
      keys = keys.add(bit);
    }
  }
  auto on_host = at::detail::make_tensor<c10::TensorImpl>(to_host(tensor.storage()), keys, tensor.dtype());
  auto* impl = on_host.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    impl->set_wrapped_number(true);
  }
  pair_of_host_.emplace(impl, pairs_.size());
  pairs_.push_back({on_host, tensor});
  return on_host;
}

inline void Mirror::write_back() {
  for (auto& memory : memories_) {
    write_back(memory);
  }
  for (const auto& pair : pairs_) {
    write_back(pair);
  }
}

inline void Mirror::write_back(Memory& memory) {
  const size_t bytes = memory.on_host.nbytes();
  if (memory.on_host.data() == memory.original.data() && bytes == memory.original.nbytes()) {
    return;
  }
  c10::Storage fresh = device_.new_storage(bytes, memory.original.device());
  if (bytes > 0) {
    std::memcpy(fresh.mutable_data(), memory.on_host.data(), bytes);
  }
  auto* impl = memory.original.unsafeGetStorageImpl();
  impl->set_data_ptr_noswap(std::move(fresh.unsafeGetStorageImpl()->_mutable_data_ptr_no_checks()));
  impl->set_nbytes(bytes);
}

inline void Mirror::write_back(const Pair& pair) {
  const auto& [on_host, original] = pair;
  const auto* now = on_host.storage().unsafeGetStorageImpl();
  auto known = memory_of_host_.find(now);
  if (known == memory_of_host_.end()) {
    original.unsafeGetTensorImpl()->set_storage_keep_dtype(adopt(on_host.storage(), original.device()));
  } else if (memories_[known->second].original.unsafeGetStorageImpl() != original.storage().unsafeGetStorageImpl()) {
    original.unsafeGetTensorImpl()->set_storage_keep_dtype(memories_[known->second].original);
  }
  const bool same = on_host.sizes() == original.sizes() && on_host.strides() == original.strides() &&
      on_host.storage_offset() == original.storage_offset();
  if (!same) {
    device_.set_layout(original, on_host);
  }
}

inline c10::Storage Mirror::moved(const c10::Storage& on_host, c10::Device where) {
  if (on_host.data() == nullptr && on_host.nbytes() > 0) {
    // Of a zero tensor: it has a size and no bytes.
    c10::DataPtr nothing(nullptr, where);
    return c10::Storage(c10::Storage::use_byte_size_t(), on_host.nbytes(), std::move(nothing), nullptr, false);
  }
  c10::Storage fresh = device_.new_storage(on_host.nbytes(), where);
  if (on_host.nbytes() > 0) {
    std::memcpy(fresh.mutable_data(), on_host.data(), on_host.nbytes());
  }
  return fresh;
}

// The device's storage for one of the host; a new one, filled, for a storage that the kernel made.
inline const c10::Storage& Mirror::adopt(const c10::Storage& on_host, c10::Device where) {
  auto known = memory_of_host_.find(on_host.unsafeGetStorageImpl());
  if (known != memory_of_host_.end()) {
    return memories_[known->second].original;
  }
  c10::Storage fresh = moved(on_host, where);
  memory_of_host_.emplace(on_host.unsafeGetStorageImpl(), memories_.size());
  memories_.push_back({on_host, fresh});
  return memories_.back().original;
}

inline bool Mirror::is_new(const at::Tensor& result) const {
  return foreign_.count(result.unsafeGetTensorImpl()) == 0 &&
      memory_of_host_.count(result.storage().unsafeGetStorageImpl()) == 0;
}

inline at::Tensor Mirror::to_device(const at::Tensor& result, c10::Device where) {
  if (!result.defined() || !result.device().is_cpu() || foreign_.count(result.unsafeGetTensorImpl()) > 0) {
    return result;
  }
  auto pair = pair_of_host_.find(result.unsafeGetTensorImpl());
  if (pair != pair_of_host_.end()) {
    return pairs_[pair->second].original;
  }
  TORCH_CHECK_NOT_IMPLEMENTED(
      result.layout() == c10::kStrided && !result.is_quantized(),
      "The ", device_.name(), " simulator models strided tensors; an operator returned layout ", result.layout(), ".");
  const c10::Storage storage = adopt(result.storage(), where);
  return device_.new_tensor(storage, result, argument_over(storage));
}

inline at::Tensor Mirror::argument_over(const c10::Storage& original) const {
  for (const Pair& pair : pairs_) {
    if (pair.original.storage().unsafeGetStorageImpl() == original.unsafeGetStorageImpl()) {
      return pair.original;
    }
  }
  return at::Tensor();
}

// A CPU tensor over the bytes of a device tensor that keeps the device's storage alive, for work that outlives a call.
inline at::Tensor host_alias(const at::Tensor& tensor) {
  auto* owner = new c10::Storage(tensor.storage());
  c10::DataPtr bytes(
      owner->mutable_data(), owner, [](void* held) { delete static_cast<c10::Storage*>(held); },
      c10::Device(c10::kCPU));
  c10::Storage storage(
      c10::Storage::use_byte_size_t(), owner->nbytes(), std::move(bytes), /*allocator=*/nullptr, /*resizable=*/false);
  auto alias = at::detail::make_tensor<c10::TensorImpl>(
      std::move(storage), c10::DispatchKeySet(c10::DispatchKey::CPU), tensor.dtype());
  auto* impl = alias.unsafeGetTensorImpl();
  impl->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  return alias;
}

}  // namespace llm_adapt::host
