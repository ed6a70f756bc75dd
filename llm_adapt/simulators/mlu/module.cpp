// Python module of the mlu simulator's C++.
#include <ATen/core/GeneratorForPrivateuseone.h>
#include <torch/csrc/utils/pybind.h>

#include "mlu.h"

namespace llm_adapt::mlu {

void register_device();
void bind_cncl(pybind11::module_& module);

namespace {

const c10::impl::DeviceGuardImplInterface& current() { return *c10::impl::getDeviceGuardImpl(kDevice); }

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
  register_device();
  module.def("device_count", [] { return static_cast<int>(fleet().count); });
  module.def("current_device", [] { return static_cast<int>(current().getDevice().index()); });
  module.def("exchange_device", [](int index) {
    return static_cast<int>(current().exchangeDevice({kDevice, static_cast<c10::DeviceIndex>(index)}).index());
  });
  module.def("major_capability", &major_capability);
  module.def("total_memory", [] { return fleet().bytes_each; });
  module.def("default_generator", [](int index) { return default_generator(static_cast<c10::DeviceIndex>(index)); });
  module.def("set_memory_fraction", [](int index, double fraction) {
    memory().set_fraction(static_cast<c10::DeviceIndex>(index), fraction);
  });
  bind_cncl(module);
}

}  // namespace llm_adapt::mlu
