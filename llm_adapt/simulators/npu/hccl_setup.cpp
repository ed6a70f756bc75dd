// Communicators of the HCCL C API: making, asking and destroying them.
#include "hccl_communicator.h"

#include <stdlib.h>
#include <sys/random.h>

#include <cstring>
#include <map>

#include "acl/acl.h"
#include "hccl/hccl.h"

namespace llm_adapt {

// Of the runtime: count `bytes` of a device's memory as taken (given back when negative). 0 or an aclError.
NPUSIM_EXPORT int device_reserve(int device, long bytes);

}  // namespace llm_adapt

using namespace llm_adapt;
using namespace llm_adapt::hccl;

namespace {

constexpr long kMiB = 1024 * 1024;
// Each communicator has a buffer for what comes in and one for what goes out.
constexpr long kBuffers = 2;
constexpr double kDefaultExecTimeout = 1836;
constexpr double kDefaultConnectTimeout = 120;
constexpr int kTokenBytes = 16;

HcclResult failed(HcclResult code, const std::string& text) { return static_cast<HcclResult>(fail(code, text)); }

// Throws Failure where the variable is set to something that is no number of at least `least`.
double number_of(const char* variable, double standard, double least) {
  const char* text = getenv(variable);
  if (text == nullptr || *text == '\0') {
    return standard;
  }
  char* end = nullptr;
  double value = strtod(text, &end);
  if (*end != '\0' || !(value >= least)) {
    throw Failure(HCCL_E_PARA, std::string(variable) + " is \"" + text + "\"; it must be a number of at least " +
                                   std::to_string(static_cast<long>(least)));
  }
  return value;
}

bool is_set(const HcclCommConfig* config, size_t offset, size_t bytes) {
  // The caller's struct may be an older, shorter one; it begins with its size.
  size_t size = 0;
  if (config != nullptr) {
    std::memcpy(&size, config, sizeof(size));
  }
  return size >= offset + bytes;
}
#define HAS_FIELD(config, field) \
  is_set(config, offsetof(HcclCommConfig, field), sizeof(static_cast<HcclCommConfig*>(nullptr)->field))

long buffer_bytes(const HcclCommConfig* config) {
  bool given = HAS_FIELD(config, hcclBufferSize) && config->hcclBufferSize != HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET;
  double megabytes = given ? config->hcclBufferSize : number_of("HCCL_BUFFSIZE", HCCL_COMM_DEFAULT_BUFFSIZE, 1);
  return kBuffers * static_cast<long>(megabytes * kMiB);
}

double exec_timeout_s(const HcclCommConfig* config) {
  bool given = HAS_FIELD(config, hcclExecTimeOut) && config->hcclExecTimeOut != HCCL_COMM_EXECTIMEOUT_CONFIG_NOT_SET;
  return given ? config->hcclExecTimeOut : number_of("HCCL_EXEC_TIMEOUT", kDefaultExecTimeout, 0);
}

// Communicators of one device that are given the same buffer name share the buffers of the first; they are counted
// until that one is destroyed.
bool shares_buffer(int device, const HcclCommConfig* config) {
  if (!HAS_FIELD(config, hcclBufferName) || config->hcclBufferName[0] == '\0') {
    return false;
  }
  static std::mutex mutex;
  static auto* users = new std::map<std::pair<int, std::string>, int>;
  std::lock_guard<std::mutex> lock(mutex);
  return (*users)[{device, config->hcclBufferName}]++ > 0;
}

HcclResult make(const std::string& token, uint32_t size, uint32_t rank, const HcclCommConfig* config, HcclComm* comm) {
  if (size == 0 || rank >= size || comm == nullptr) {
    return failed(HCCL_E_PARA, "a communicator was asked for rank " + std::to_string(rank) + " of " +
                                   std::to_string(size));
  }
  try {
    Settings settings;
    if (aclrtGetDevice(&settings.device) != ACL_SUCCESS) {
      return failed(HCCL_E_RUNTIME, "a communicator was asked for; the thread has no current device");
    }
    bool named = HAS_FIELD(config, hcclCommName) && config->hcclCommName[0] != '\0';
    settings.token = token;
    settings.name = named ? config->hcclCommName : token;
    settings.rank = static_cast<int>(rank);
    settings.size = static_cast<int>(size);
    settings.buffer_bytes = shares_buffer(settings.device, config) ? 0 : buffer_bytes(config);
    settings.exec_timeout_s = exec_timeout_s(config);
    settings.connect_timeout_s = number_of("HCCL_CONNECT_TIMEOUT", kDefaultConnectTimeout, 0);
    if (device_reserve(settings.device, settings.buffer_bytes) != 0) {
      // "Failed to allocate" is what torch_npu looks for to raise its OutOfMemoryError.
      return failed(HCCL_E_MEMORY, "EL0004: Failed to allocate " + std::to_string(settings.buffer_bytes) +
                                       " bytes for the buffers of communicator " + settings.name +
                                       " (2 x HCCL_BUFFSIZE) on device " + std::to_string(settings.device));
    }
    std::shared_ptr<Communicator> communicator;
    try {
      communicator = std::make_shared<Communicator>(settings);
    } catch (const Failure&) {
      device_reserve(settings.device, -settings.buffer_bytes);
      throw;
    }
    communicator->start();
    *comm = remember(communicator);
    return HCCL_SUCCESS;
  } catch (const Failure& failure) {
    return failed(failure.code, failure.what());
  }
}

std::string token_of(const HcclRootInfo* info) {
  return std::string(info->internal, strnlen(info->internal, HCCL_ROOT_INFO_BYTES));
}

}  // namespace

extern "C" {

NPUSIM_EXPORT HcclResult HcclGetRootInfo(HcclRootInfo* info) {
  unsigned char bytes[kTokenBytes];
  if (info == nullptr || getrandom(bytes, sizeof(bytes), 0) != sizeof(bytes)) {
    return failed(HCCL_E_PTR, "HcclGetRootInfo was called with a null pointer, or there are no random bytes");
  }
  std::memset(info, 0, sizeof(*info));
  std::string token = "npusim-hccl-";
  for (unsigned char byte : bytes) {
    constexpr const char* kHex = "0123456789abcdef";
    token += kHex[byte >> 4];
    token += kHex[byte & 15];
  }
  std::memcpy(info->internal, token.data(), token.size());
  return HCCL_SUCCESS;
}

NPUSIM_EXPORT HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo* info, uint32_t rank, HcclComm* comm) {
  return make(token_of(info), size, rank, nullptr, comm);
}

NPUSIM_EXPORT HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo* info, uint32_t rank,
                                                    const HcclCommConfig* config, HcclComm* comm) {
  return make(token_of(info), size, rank, config, comm);
}

// `ranks` are ranks of the parent; every rank of the child calls with the same list and id.
NPUSIM_EXPORT HcclResult HcclCreateSubCommConfig(HcclComm* parent, uint32_t size, uint32_t* ranks, uint64_t id,
                                                 uint32_t rank, HcclCommConfig* config, HcclComm* comm) {
  auto from = parent == nullptr ? nullptr : find(*parent);
  if (!from || ranks == nullptr || rank >= size || static_cast<int>(ranks[rank]) != from->settings().rank) {
    return failed(HCCL_E_PARA, "a sub-communicator was asked for; its parent must be alive, and ranks[" +
                                   std::to_string(rank) + "] must be the parent's rank of this process");
  }
  std::string token = from->settings().token + "-" + std::to_string(id) + "-" + std::to_string(from->uses_of(id));
  return make(token, size, rank, config, comm);
}

NPUSIM_EXPORT HcclResult HcclCommDestroy(HcclComm comm) {
  auto communicator = forget(comm);
  if (!communicator) {
    return failed(HCCL_E_PARA, "HcclCommDestroy was called on a communicator that is not alive");
  }
  communicator->close();
  device_reserve(communicator->settings().device, -communicator->settings().buffer_bytes);
  remember_past(communicator->report());
  return HCCL_SUCCESS;
}

NPUSIM_EXPORT HcclResult HcclGetCommName(HcclComm comm, char* name) {
  auto communicator = find(comm);
  if (!communicator || name == nullptr) {
    return failed(HCCL_E_PARA, "HcclGetCommName was called on a communicator that is not alive");
  }
  strncpy(name, communicator->settings().name.c_str(), COMM_NAME_MAX_LENGTH - 1);
  name[COMM_NAME_MAX_LENGTH - 1] = '\0';
  return HCCL_SUCCESS;
}

NPUSIM_EXPORT HcclResult HcclGetRankSize(HcclComm comm, uint32_t* size) {
  auto communicator = find(comm);
  if (!communicator || size == nullptr) {
    return failed(HCCL_E_PARA, "HcclGetRankSize was called on a communicator that is not alive");
  }
  *size = communicator->settings().size;
  return HCCL_SUCCESS;
}

NPUSIM_EXPORT HcclResult HcclGetRankId(HcclComm comm, uint32_t* rank) {
  auto communicator = find(comm);
  if (!communicator || rank == nullptr) {
    return failed(HCCL_E_PARA, "HcclGetRankId was called on a communicator that is not alive");
  }
  *rank = communicator->settings().rank;
  return HCCL_SUCCESS;
}

// torch_npu's watchdog asks this, and then puts the thread's recent error text into what it raises.
NPUSIM_EXPORT HcclResult HcclGetCommAsyncError(HcclComm comm, HcclResult* error) {
  auto communicator = find(comm);
  if (!communicator || error == nullptr) {
    return failed(HCCL_E_PARA, "HcclGetCommAsyncError was called on a communicator that is not alive");
  }
  std::string text;
  *error = communicator->failure(&text);
  if (*error != HCCL_SUCCESS) {
    fail(*error, text);
  }
  return HCCL_SUCCESS;
}

// All fields of HcclCommConfig may be given; those that only tune speed change nothing here.
NPUSIM_EXPORT uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }

// The reductions here are deterministic either way; other settings are not modelled.
NPUSIM_EXPORT HcclResult HcclSetConfig(HcclConfig config, HcclConfigValue value) {
  if (config != HCCL_DETERMINISTIC) {
    return failed(HCCL_E_NOT_SUPPORT, "HcclSetConfig of setting " + std::to_string(config) + " is not modelled");
  }
  if (value.value != 0 && value.value != 1) {
    return failed(HCCL_E_PARA, "HcclSetConfig: HCCL_DETERMINISTIC is 0 or 1, not " + std::to_string(value.value));
  }
  return HCCL_SUCCESS;
}
}
