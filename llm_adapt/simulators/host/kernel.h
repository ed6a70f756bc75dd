// The host kernel: any operator of a simulated device, computed by torch's CPU kernel on the same bytes.
//
//   HostDevice& my_device();                                   // one instance, kept for the life of the process
//   TORCH_LIBRARY_IMPL(_, PrivateUse1, library) {
//     library.fallback(torch::CppFunction::makeFromBoxedFunction<&llm_adapt::host::run<&my_device>>());
//   }
//
// It runs below autograd and autocast. Allocation (empty.memory_format, empty_strided) must be the device's own.
#pragma once
#include <torch/library.h>

#include <optional>
#include <string>
#include <vector>

#include "device.h"
#include "mirror.h"
#include "placement.h"
#include "randomness.h"

namespace llm_adapt::host {

// One call of one operator, from the device's arguments on the stack to the device's results on the stack.
class Call {
 public:
  Call(HostDevice& device, const c10::OperatorHandle& op, torch::jit::Stack* stack);
  void run();

 private:
  void survey();
  void look_at_device(const c10::IValue& value);
  void convert();
  void compute();
  void report_written();
  void report_result(const at::Tensor& result);
  void convert_results();

  c10::IValue& argument(size_t index) { return (*stack_)[base_ + index]; }
  bool is_written(size_t index) const;
  c10::Device where() const;

  HostDevice& device_;
  const c10::OperatorHandle& op_;
  torch::jit::Stack* stack_;
  const size_t base_;
  Mirror mirror_;
  Placement placement_;
  std::optional<c10::Device> asked_;         // a device argument
  std::optional<at::Generator> generator_;   // a generator argument
  std::optional<size_t> generator_index_;
  std::vector<at::Tensor> written_;
};

inline Call::Call(HostDevice& device, const c10::OperatorHandle& op, torch::jit::Stack* stack)
    : device_(device), op_(op), stack_(stack), base_(stack->size() - op.schema().arguments().size()), mirror_(device) {}

inline void Call::run() {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  c10::impl::ExcludeDispatchKeyGuard below_autocast(c10::autocast_dispatch_keyset);
  const size_t count = op_.schema().arguments().size();
  survey();
  device_.check(op_, Arguments(stack_->data() + base_, count));
  check_placement(device_, op_, placement_);
  TORCH_CHECK_NOT_IMPLEMENTED(
      op_.hasComputedKernelForDispatchKey(c10::DispatchKey::CPU), "The ", device_.name(), " simulator computes ",
      op_.operator_name(), " with torch's CPU kernel, and torch has none. Use operators that the CPU has.");
  device_.before(op_, where());
  convert();
  compute();
  report_written();
  mirror_.write_back();
  convert_results();
}

inline bool Call::is_written(size_t index) const {
  const auto* alias = op_.schema().arguments()[index].alias_info();
  return alias != nullptr && alias->isWrite();
}

inline c10::Device Call::where() const {
  if (asked_) {
    return *asked_;
  }
  if (placement_.device) {
    return *placement_.device;
  }
  return c10::impl::getDeviceGuardImpl(device_.type())->getDevice();
}

// Find the devices, the generator and where the results belong, before anything is changed.
inline void Call::survey() {
  const auto& arguments = op_.schema().arguments();
  for (size_t index = 0; index < arguments.size(); ++index) {
    const c10::IValue& value = argument(index);
    if (value.isTensor()) {
      placement_.see(device_, value.toTensor(), is_written(index));
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) {
        placement_.see(device_, tensor, is_written(index));
      }
    } else if (value.isOptionalTensorList()) {
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        placement_.see(device_, tensor.value_or(at::Tensor()), is_written(index));
      }
    } else if (value.isDevice()) {
      look_at_device(value);
    } else if (value.isGenerator()) {
      generator_ = value.toGenerator();
    }
    if (arguments[index].name() == "generator") {
      generator_index_ = index;
    }
  }
}

inline void Call::look_at_device(const c10::IValue& value) {
  asked_ = value.toDevice();
  if (asked_->type() == device_.type() && !asked_->has_index()) {
    asked_ = c10::impl::getDeviceGuardImpl(device_.type())->getDevice();
  }
}

// Swap the device's arguments for the host's.
inline void Call::convert() {
  const auto& arguments = op_.schema().arguments();
  for (size_t index = 0; index < arguments.size(); ++index) {
    c10::IValue& value = argument(index);
    const size_t before = written_.size();
    if (value.isTensor()) {
      if (value.toTensor().defined()) {
        value = mirror_.to_host(value.toTensor());
        written_.push_back(value.toTensor());
      }
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors = value.toTensorVector();
      for (at::Tensor& tensor : tensors) {
        tensor = tensor.defined() ? mirror_.to_host(tensor) : tensor;
      }
      written_.insert(written_.end(), tensors.begin(), tensors.end());
      value = c10::IValue(std::move(tensors));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<at::Tensor>> tensors;
      for (const std::optional<at::Tensor>& tensor : value.toOptionalTensorList()) {
        const bool is_there = tensor && tensor->defined();
        tensors.push_back(is_there ? std::optional<at::Tensor>(mirror_.to_host(*tensor)) : tensor);
      }
      value = tensors;
    } else if (value.isStorage()) {
      const c10::Storage storage = value.toStorage();
      value = storage.device_type() == device_.type() ? c10::IValue(mirror_.to_host(storage)) : value;
    } else if (value.isDevice() && value.toDevice().type() == device_.type()) {
      value = c10::Device(c10::kCPU);
    } else if (arguments[index].name() == "pin_memory" && value.isBool()) {
      value = c10::IValue();
    }
    if (!is_written(index)) {
      written_.resize(before);
    }
  }
}

inline void Call::compute() {
  std::optional<DefaultGeneratorSwap> swap;
  if (generator_index_ || op_.hasTag(at::Tag::nondeterministic_seeded)) {
    const bool on_host = asked_ && asked_->is_cpu();
    if (!on_host) {
      const at::Generator source = draw(device_, generator_, where());
      if (generator_index_) {
        argument(*generator_index_) = source;
      } else {
        swap.emplace(source);
      }
    }
  }
  // CUDA and the vendors have histc of integers; torch's CPU kernel has not. Mixture-of-experts code counts with it.
  std::optional<at::ScalarType> counted;
  if (op_.schema().name() == "aten::histc" && c10::isIntegralType(argument(0).toTensor().scalar_type(), false)) {
    counted = argument(0).toTensor().scalar_type();
    argument(0) = argument(0).toTensor().to(at::kDouble);
  }
  op_.callBoxed(stack_);
  if (counted && op_.schema().overload_name().empty()) {
    stack_->back() = stack_->back().toTensor().to(*counted);
  }
}

inline void Call::report_written() {
  for (const at::Tensor& tensor : written_) {
    if (tensor.defined() && tensor.layout() == c10::kStrided) {
      device_.written(tensor);
    }
  }
  const size_t count = op_.schema().returns().size();
  const size_t first = stack_->size() - count;
  for (size_t index = 0; index < count; ++index) {
    const c10::IValue& value = (*stack_)[first + index];
    if (value.isTensor()) {
      report_result(value.toTensor());
    } else if (value.isTensorList()) {
      for (const at::Tensor& tensor : value.toTensorList()) {
        report_result(tensor);
      }
    }
  }
}

inline void Call::report_result(const at::Tensor& result) {
  if (result.defined() && result.layout() == c10::kStrided && mirror_.is_new(result)) {
    device_.written(result);
  }
}

inline void Call::convert_results() {
  if (asked_ && asked_->is_cpu()) {
    return;
  }
  const size_t count = op_.schema().returns().size();
  const size_t first = stack_->size() - count;
  for (size_t index = 0; index < count; ++index) {
    c10::IValue& value = (*stack_)[first + index];
    if (value.isTensor()) {
      value = mirror_.to_device(value.toTensor(), where());
    } else if (value.isTensorList()) {
      std::vector<at::Tensor> tensors = value.toTensorVector();
      for (at::Tensor& tensor : tensors) {
        tensor = mirror_.to_device(tensor, where());
      }
      value = c10::IValue(std::move(tensors));
    }
  }
}

// The boxed kernel of one device.
template <HostDevice& (*kDevice)()>
void run(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  Call(kDevice(), op, stack).run();
}

}  // namespace llm_adapt::host
