// Devices, contexts, identity and errors of the emulated runtime.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <sstream>
#include <stdexcept>
#include <vector>

#include "runtime_state.h"

namespace llm_adapt {
namespace {

struct Context {
  int device;
};
Context contexts[kMaxDevices];
std::atomic<bool> has_context[kMaxDevices];
thread_local int this_device = -1;
thread_local std::string recent_error;

[[noreturn]] void refuse(const std::string& text) {
  std::fprintf(stderr, "%s\n", text.c_str());
  recent_error = text;
  throw std::runtime_error(text);
}

// Numbers of the devices that ASCEND_RT_VISIBLE_DEVICES leaves; what CANN makes of another spelling is not known.
std::vector<int> read_visible(int there) {
  std::vector<int> visible;
  const char* mask = std::getenv("ASCEND_RT_VISIBLE_DEVICES");
  if (mask == nullptr) {
    for (int device = 0; device < there; ++device) visible.push_back(device);
    return visible;
  }
  std::istringstream parts(mask);
  for (std::string part; std::getline(parts, part, ',');) {
    char* end = nullptr;
    const long device = std::strtol(part.c_str(), &end, 10);
    const bool is_number = end != part.c_str() && *end == '\0';
    if (!is_number || device < 0 || device >= there || (!visible.empty() && device <= visible.back())) {
      refuse(std::string("ASCEND_RT_VISIBLE_DEVICES=\"") + mask + "\" was set; the NPU simulator takes ascending numbers" +
             " below " + std::to_string(there) + " (NPU_SIM_DEVICES), separated by commas");
    }
    visible.push_back(static_cast<int>(device));
  }
  return visible;
}

const std::vector<int>& visible_devices() {
  static const std::vector<int> visible =
      read_visible(std::clamp(std::atoi(variable("NPU_SIM_DEVICES", "8")), 0, kMaxDevices));
  return visible;
}

bool starts_with(const std::string& text, const char* prefix) { return text.rfind(prefix, 0) == 0; }

}  // namespace

void not_modelled(const char* name) {
  refuse(std::string("the NPU simulator of llm_adapt does not model ") + name);
}

int fail(int code, const std::string& text) {
  recent_error = text;
  return code;
}

const char* variable(const char* name, const char* otherwise) {
  const char* given = std::getenv(name);
  return given != nullptr && *given != '\0' ? given : otherwise;
}

int device_count() { return static_cast<int>(visible_devices().size()); }

int current_device() { return this_device; }

const std::string& soc_name() {
  static const std::string name = variable("NPU_SIM_SOC", "Ascend910B3");
  return name;
}

// Families as torch_npu groups the names: "Ascend910B" without a digit is an A1 chip.
Family family() {
  const std::string& soc = soc_name();
  if (starts_with(soc, "Ascend950")) return Family::kA5;
  if (starts_with(soc, "Ascend910_93")) return Family::kA3;
  if (starts_with(soc, "Ascend310P")) return Family::k310P;
  if (starts_with(soc, "Ascend910B") && soc.size() > 10) return Family::kA2;
  return Family::kA1;
}

}  // namespace llm_adapt

using namespace llm_adapt;

extern "C" {

NPUSIM_EXPORT aclError aclInit(const char*) {
  for (int device = 0; device < kMaxDevices; ++device) contexts[device].device = device;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclFinalize() { return ACL_SUCCESS; }

NPUSIM_EXPORT const char* aclGetRecentErrMsg() { return recent_error.empty() ? nullptr : recent_error.c_str(); }

NPUSIM_EXPORT void aclAppLog(aclLogLevel, const char*, const char*, uint32_t, const char*, ...) {}

NPUSIM_EXPORT const char* aclrtGetSocName() { return soc_name().c_str(); }

NPUSIM_EXPORT aclError aclrtGetDeviceCount(uint32_t* count) {
  *count = static_cast<uint32_t>(device_count());
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) {
    return fail(kInvalidDevice, "EE1001: device " + std::to_string(device) + " was asked; the simulator has " +
                                    std::to_string(device_count()) + " (NPU_SIM_DEVICES, ASCEND_RT_VISIBLE_DEVICES)");
  }
  this_device = device;
  has_context[device] = true;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtResetDevice(int32_t) {
  this_device = -1;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetDevice(int32_t* device) {
  if (this_device < 0) return kNoContext;
  *device = this_device;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetCurrentContext(aclrtContext* context) {
  if (this_device < 0) return kNoContext;
  *context = &contexts[this_device];
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSetCurrentContext(aclrtContext context) {
  if (context == nullptr) return kNoContext;
  this_device = static_cast<Context*>(context)->device;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetPrimaryCtxState(int32_t device, uint32_t* flags, int32_t* active) {
  if (device < 0 || device >= device_count()) return kInvalidDevice;
  if (flags != nullptr) *flags = 0;
  if (active != nullptr) *active = has_context[device] ? 1 : 0;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetLogicDevIdByUserDevId(int32_t user_device, int32_t* logic_device) {
  if (user_device < 0 || user_device >= device_count()) return kInvalidDevice;
  *logic_device = visible_devices()[user_device];
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtDeviceCanAccessPeer(int32_t* answer, int32_t, int32_t) {
  *answer = 1;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }

NPUSIM_EXPORT aclError aclrtDeviceGetBareTgid(int32_t* pid) {
  *pid = getpid();
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetDeviceInfo(uint32_t, aclrtDevAttr attribute, int64_t* value) {
  switch (attribute) {
    case ACL_DEV_ATTR_AICPU_CORE_NUM:
      *value = 6;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_AICORE_CORE_NUM:
    case ACL_DEV_ATTR_CUBE_CORE_NUM:
      *value = 20;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_VECTOR_CORE_NUM:
      *value = 40;
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_TOTAL_GLOBAL_MEM_SIZE:
      *value = memory_limit();
      return ACL_SUCCESS;
    case ACL_DEV_ATTR_L2_CACHE_SIZE:
      *value = 192L << 20;
      return ACL_SUCCESS;
    default:
      return fail(kInvalidParameter, "device attribute " + std::to_string(attribute) + " is not modelled");
  }
}

NPUSIM_EXPORT aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo, int64_t* value) {
  *value = 20;  // AI cores, the only capability that torch_npu asks
  return ACL_SUCCESS;
}

// Looked up by name, so that the stubs do not have it.
NPUSIM_EXPORT aclError aclrtGetDeviceUtilizationRate(int32_t, aclrtUtilizationInfo*) {
  not_modelled("aclrtGetDeviceUtilizationRate");
}

NPUSIM_EXPORT aclError aclGetCannAttributeList(const aclCannAttr** attributes, size_t* count) {
  static const aclCannAttr one[1] = {};  // ACL_CANN_ATTR_INF_NAN: IEEE infinities
  *attributes = one;
  *count = 1;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclGetCannAttribute(aclCannAttr, int32_t* value) {
  *value = 1;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclsysGetCANNVersion(aclCANNPackageName name, aclCANNPackageVersion* version) {
  std::memset(version, 0, sizeof *version);
  const char* text = name == ACL_PKG_NAME_DRIVER ? "25.5.0" : variable("NPU_SIM_CANN_VERSION", "8.5.0");
  std::snprintf(version->version, sizeof version->version, "%s", text);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclsysGetVersionStr(char*, char* version) {
  std::strcpy(version, variable("NPU_SIM_CANN_VERSION", "8.5.0"));
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }

}  // extern "C"
