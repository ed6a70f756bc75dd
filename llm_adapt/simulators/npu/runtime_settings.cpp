// Switches that torch_npu sets and reads back, and graph capture, which is never active.
//
// A switch without an effect on host memory is accepted: time limits, overflow flags, core limits, dumps.
#include "runtime_state.h"

using namespace llm_adapt;

namespace {
constexpr uint32_t kCubeCores = 20, kVectorCores = 40;
uint32_t cores(aclrtDevResLimitType type) { return type == ACL_RT_DEV_RES_CUBE_CORE ? kCubeCores : kVectorCores; }
}  // namespace

extern "C" {

NPUSIM_EXPORT aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }

NPUSIM_EXPORT aclError aclrtSetOpExecuteTimeOutV2(uint64_t timeout, uint64_t* actual) {
  *actual = timeout;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtSetStreamAttribute(aclrtStream, aclrtStreamAttr, aclrtStreamAttrValue*) { return ACL_SUCCESS; }

NPUSIM_EXPORT aclError aclrtGetStreamOverflowSwitch(aclrtStream, uint32_t* flag) {
  *flag = 0;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetDeviceResLimit(int32_t, aclrtDevResLimitType type, uint32_t* value) {
  *value = cores(type);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetStreamResLimit(aclrtStream, aclrtDevResLimitType type, uint32_t* value) {
  *value = cores(type);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetResInCurrentThread(aclrtDevResLimitType type, uint32_t* value) {
  *value = cores(type);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclmdlRICaptureGetInfo(aclrtStream, aclmdlRICaptureStatus* status, aclmdlRI* graph) {
  if (status != nullptr) *status = ACL_MODEL_RI_CAPTURE_STATUS_NONE;
  if (graph != nullptr) *graph = nullptr;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclmdlRICaptureThreadExchangeMode(aclmdlRICaptureMode*) { return ACL_SUCCESS; }

}  // extern "C"
