// libacl_op_compiler.so: compile options and system parameters, remembered and read back.
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#include "cann.h"
#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

namespace {
std::mutex mutex;
std::map<int, std::string> options;

// What CANN says before anybody has set it. Operators are compiled for each shape on A1 and 310P, and for none later.
std::string default_of(aclCompileOpt option) {
  if (option != ACL_OP_JIT_COMPILE) return "";
  const llm_adapt::Family family = llm_adapt::family();
  return family == llm_adapt::Family::kA1 || family == llm_adapt::Family::k310P ? "enable" : "disable";
}

// Under the mutex.
const std::string& value_of(aclCompileOpt option) { return options.try_emplace(option, default_of(option)).first->second; }

std::map<int, int64_t> parameters;
}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT aclError aclSetCompileopt(aclCompileOpt option, const char* value) {
  std::lock_guard<std::mutex> lock(mutex);
  options[option] = value;
  return ACL_SUCCESS;
}

EXPORT size_t aclGetCompileoptSize(aclCompileOpt option) {
  std::lock_guard<std::mutex> lock(mutex);
  return value_of(option).size() + 1;
}

EXPORT aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t room) {
  std::lock_guard<std::mutex> lock(mutex);
  const std::string& found = value_of(option);
  if (found.size() + 1 > room) return ACL_ERROR_INVALID_PARAM;
  std::memcpy(value, found.c_str(), found.size() + 1);
  return ACL_SUCCESS;
}

EXPORT aclError aclrtSetSysParamOpt(aclSysParamOpt parameter, int64_t value) {
  std::lock_guard<std::mutex> lock(mutex);
  parameters[parameter] = value;
  return ACL_SUCCESS;
}

EXPORT aclError aclrtCtxSetSysParamOpt(aclSysParamOpt parameter, int64_t value) {
  return aclrtSetSysParamOpt(parameter, value);
}

EXPORT aclError aclrtGetSysParamOpt(aclSysParamOpt parameter, int64_t* value) {
  std::lock_guard<std::mutex> lock(mutex);
  *value = parameters[parameter];
  return ACL_SUCCESS;
}
