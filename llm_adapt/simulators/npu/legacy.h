// A call of a GE operator (aclop): operators_legacy.cpp gathers it, libopapi.so answers it.
#pragma once
#include <cstdint>
#include <map>
#include <string>
#include <variant>
#include <vector>

namespace llm_adapt {

struct LegacyTensor {
  int dtype;  // aclDataType
  std::vector<int64_t> sizes;
  void* data;
};
using LegacyAttribute = std::variant<bool, int64_t, double, std::string, std::vector<int64_t>>;
struct LegacyCall {
  std::string name;
  std::vector<LegacyTensor> inputs, outputs;
  std::map<std::string, LegacyAttribute> attributes;
};

enum class LegacyAnswer { kDone, kUnknown, kFailed };

// The function of libopapi.so, under this name; `error` is set where it failed.
constexpr const char* kLegacyEntry = "llm_adapt_legacy_operator";
using LegacyEntry = LegacyAnswer (*)(const LegacyCall& call, std::string* error);

}  // namespace llm_adapt
