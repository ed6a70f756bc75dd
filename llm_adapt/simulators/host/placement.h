// Which devices the tensors of one operator may live on together, as on CUDA.
#pragma once
#include <unordered_set>

#include "device.h"

namespace llm_adapt::host {

// Where the tensors of one operator were found.
struct Placement {
  std::optional<c10::Device> device;    // of the first tensor on the simulated device
  std::optional<c10::Device> other;     // a second simulated device
  std::optional<c10::Device> foreign;   // of a tensor with dimensions that is elsewhere
  bool foreign_number = false;          // a 0-dim tensor of the host, not a Python number
  bool foreign_written = false;         // the operator writes a tensor that is elsewhere
  bool first_is_foreign = false;        // the first tensor of the call is elsewhere

  void see(const HostDevice& simulated, const at::Tensor& tensor, bool is_written);

 private:
  bool any_ = false;
};

inline void Placement::see(const HostDevice& simulated, const at::Tensor& tensor, bool is_written) {
  if (!tensor.defined()) {
    return;
  }
  const bool is_first = !any_;
  any_ = true;
  if (simulated.owns(tensor)) {
    if (!device) {
      device = tensor.device();
    } else if (*device != tensor.device()) {
      other = tensor.device();
    }
    return;
  }
  first_is_foreign |= is_first;
  foreign_written |= is_written;
  if (tensor.dim() > 0) {
    foreign = tensor.device();
  } else if (!tensor.unsafeGetTensorImpl()->is_wrapped_number()) {
    foreign_number = true;
  }
}

// Operators that exist to cross devices.
inline bool moves_between_devices(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::copy_", "aten::copy", "aten::_copy_from", "aten::_copy_from_and_resize", "aten::_to_copy",
      "aten::_foreach_copy_", "aten::is_set_to", "aten::is_same_size", "aten::resize_as_",
  };
  return names.count(name) > 0;
}

// Operators that take some arguments from the host although the first one is on the device.
inline bool takes_host_arguments(const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::index", "aten::_unsafe_index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl",
      "aten::_index_put_impl_", "aten::_unsafe_index_put",
  };
  return names.count(name) > 0;
}

// Operators, besides pointwise ones, that read a 0-dim tensor of the host as they would read a number.
inline bool takes_host_numbers(const c10::OperatorHandle& op, const std::string& name) {
  static const std::unordered_set<std::string> names = {
      "aten::masked_fill", "aten::masked_fill_", "aten::fill", "aten::fill_", "aten::linspace", "aten::logspace",
      "aten::index_fill", "aten::index_fill_", "aten::_foreach_add", "aten::_foreach_add_", "aten::_foreach_mul",
      "aten::_foreach_mul_", "aten::_foreach_div", "aten::_foreach_div_",
  };
  return op.hasTag(at::Tag::pointwise) || names.count(name) > 0;
}

// Throws what torch says of tensors on several devices.
inline void check_placement(const HostDevice& simulated, const c10::OperatorHandle& op, const Placement& found) {
  const bool any_foreign = found.foreign || found.foreign_number;
  if (!found.device || (!any_foreign && !found.other)) {
    return;
  }
  const std::string& name = op.schema().name();
  if (moves_between_devices(name)) {
    return;
  }
  TORCH_CHECK(
      !found.other, "Expected all tensors to be on the same device, but found at least two devices, ",
      simulated.spell(*found.device), " and ", simulated.spell(*found.other), "! (in ", name, ")");
  if (takes_host_arguments(name) && !found.first_is_foreign) {
    return;
  }
  if (!found.foreign && !found.foreign_written && takes_host_numbers(op, name)) {
    return;
  }
  const std::string elsewhere = found.foreign ? found.foreign->str() : "cpu";
  TORCH_CHECK(
      false, "Expected all tensors to be on the same device, but found at least two devices, ",
      simulated.spell(*found.device), " and ", elsewhere, "! (in ", name, ")");
}

}  // namespace llm_adapt::host
