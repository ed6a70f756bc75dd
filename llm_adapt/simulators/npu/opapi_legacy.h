// How a GE operator is written: torch_npu takes it where an operator has no aclnn function, or none on the chip.
//
//     LegacyOperator swish("Swish", [](const LegacyArguments& given) { store(given.outputs[0], ...); });
#pragma once
#include <functional>

#include "legacy.h"
#include "opapi_dense.h"

namespace llm_adapt::opapi {

struct LegacyArguments {
  Tensors inputs, outputs;
  std::map<std::string, LegacyAttribute> attributes;

  // An attribute that must be there.
  template <typename Value>
  Value attribute(const std::string& name) const {
    const auto found = attributes.find(name);
    check(found != attributes.end(), "attribute ", name, " is not given");
    const Value* value = std::get_if<Value>(&found->second);
    check(value != nullptr, "attribute ", name, " has another type");
    return *value;
  }
};

// Registers an operator while libopapi.so is loaded. Limits are checked in the function itself: GE has no first phase.
struct LegacyOperator {
  LegacyOperator(const char* name, std::function<void(const LegacyArguments&)> function);
};

}  // namespace llm_adapt::opapi
