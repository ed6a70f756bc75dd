// The simulated devices of one type: how many, how large, and what a message calls them.
#pragma once
#include <c10/core/Device.h>
#include <c10/util/Exception.h>

#include <string>

namespace llm_adapt::host {

struct Fleet {
  c10::DeviceType type;
  std::string name;          // as users spell the device, e.g. "mlu"
  std::string title;         // as the vendor's messages spell it, e.g. "MLU"
  std::string error_prefix;  // what the runtime's errors start with, e.g. "CNRT error: "
  c10::DeviceIndex count = 0;
  size_t bytes_each = 0;

  void check_index(c10::DeviceIndex index) const {
    TORCH_CHECK(
        index >= 0 && index < count, error_prefix, "invalid device ordinal: ", name, ":", static_cast<int>(index),
        " was asked, and there are ", static_cast<int>(count), " devices.");
  }
};

}  // namespace llm_adapt::host
