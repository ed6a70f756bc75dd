// libacl_op_compiler.so: compile options and system parameters, remembered and read back.
#include <cstring>
#include <map>
#include <mutex>
#include <string>

#define ACL_DEPRECATED_MESSAGE(text)
#include "acl/acl.h"
#include "acl/acl_op_compiler.h"

namespace {
std::mutex mutex;
std::map<int, std::string> options;
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
  return options[option].size() + 1;
}

EXPORT aclError aclGetCompileopt(aclCompileOpt option, char* value, size_t room) {
  std::lock_guard<std::mutex> lock(mutex);
  const std::string& found = options[option];
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
