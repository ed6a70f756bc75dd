// State of the emulated runtime (libascendcl.so), shared by its sources.
#pragma once
#include <cstdint>
#include <cstdlib>

#include "cann.h"
#include "acl/acl.h"

namespace llm_adapt {

// aclError codes that torch_npu tells apart (acl/error_codes).
constexpr int kInvalidParameter = 107000;
constexpr int kInvalidDevice = 107001;
constexpr int kNoContext = 107002;
constexpr int kOutOfMemory = 207001;
constexpr int kAsyncFailure = 507899;

constexpr int kMaxDevices = 16;

struct Stream {
  int id;
  int device;
  std::mutex mutex;
  Completions outstanding;
};

int device_count();                // NPU_SIM_DEVICES, default 8, less what ASCEND_RT_VISIBLE_DEVICES hides
int current_device();              // -1 before aclrtSetDevice
long memory_limit();               // NPU_SIM_HBM_GB, default 64, in bytes
Stream* stream_of(aclrtStream stream);
std::vector<Stream*> streams_of_device(int device);
const char* variable(const char* name, const char* otherwise);

}  // namespace llm_adapt
