// Device and pinned memory of the emulated runtime: host memory with a limit for each device.
#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <map>

#include "runtime_state.h"

namespace llm_adapt {
namespace {

struct Block {
  size_t bytes;
  int device;
};
struct Physical {
  int file;
  size_t bytes;
  int device;
};

std::mutex mutex;
std::map<char*, Block> device_blocks;
std::map<char*, size_t> host_blocks;
std::map<void*, size_t> reserved, mapped;
long used[kMaxDevices];

int device_or_first() { return current_device() < 0 ? 0 : current_device(); }

// Account for `bytes` on a device; the mutex is held.
int take(int device, long bytes) {
  if (used[device] + bytes > memory_limit()) {
    return fail(kOutOfMemory, "EL0004: " + std::to_string(bytes) + " bytes were asked on device " +
                                  std::to_string(device) + "; " + std::to_string(memory_limit() - used[device]) +
                                  " of " + std::to_string(memory_limit()) + " are free (NPU_SIM_HBM_GB)");
  }
  used[device] += bytes;
  return ACL_SUCCESS;
}

aclError allocate(void** pointer, size_t bytes) {
  const int device = device_or_first();
  std::lock_guard<std::mutex> lock(mutex);
  if (const int status = take(device, static_cast<long>(bytes))) return status;
  void* block = nullptr;
  if (posix_memalign(&block, 512, bytes == 0 ? 512 : bytes) != 0) {
    used[device] -= static_cast<long>(bytes);
    return fail(kOutOfMemory, "the host has no memory left for the simulated device");
  }
  // What a kernel leaves unwritten must not look like numbers.
  static const bool poisoned = *variable("NPU_SIM_POISON", "0") == '1';
  if (poisoned) std::memset(block, 0xFF, bytes);
  device_blocks[static_cast<char*>(block)] = {bytes, device};
  *pointer = block;
  return ACL_SUCCESS;
}

template <typename Blocks>
typename Blocks::iterator block_around(Blocks& blocks, const void* pointer) {
  auto after = blocks.upper_bound(static_cast<char*>(const_cast<void*>(pointer)));
  return after == blocks.begin() ? blocks.end() : std::prev(after);
}

}  // namespace

long memory_limit() {
  static const long limit = static_cast<long>(std::atof(variable("NPU_SIM_HBM_GB", "64")) * (1L << 30));
  return limit;
}

// Memory that a library takes for itself (HCCL's buffers); negative bytes give it back.
NPUSIM_EXPORT int device_reserve(int device, long bytes) {
  std::lock_guard<std::mutex> lock(mutex);
  return take(device, bytes);
}

}  // namespace llm_adapt

using namespace llm_adapt;

extern "C" {

NPUSIM_EXPORT aclError aclrtMalloc(void** pointer, size_t bytes, aclrtMemMallocPolicy) { return allocate(pointer, bytes); }

NPUSIM_EXPORT aclError aclrtMallocAlign32(void** pointer, size_t bytes, aclrtMemMallocPolicy) {
  return allocate(pointer, bytes);
}

NPUSIM_EXPORT aclError aclrtFree(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = device_blocks.find(static_cast<char*>(pointer));
  if (found == device_blocks.end()) return fail(kInvalidParameter, "aclrtFree of what aclrtMalloc did not give");
  used[found->second.device] -= static_cast<long>(found->second.bytes);
  device_blocks.erase(found);
  std::free(pointer);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMallocHost(void** pointer, size_t bytes) {
  if (posix_memalign(pointer, 4096, bytes == 0 ? 64 : bytes) != 0) return fail(kOutOfMemory, "no pinned memory left");
  std::lock_guard<std::mutex> lock(mutex);
  host_blocks[static_cast<char*>(*pointer)] = bytes;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMallocHostWithCfg(void** pointer, uint64_t bytes, aclrtMallocConfig*) {
  return aclrtMallocHost(pointer, bytes);
}

NPUSIM_EXPORT aclError aclrtFreeHost(void* pointer) {
  {
    std::lock_guard<std::mutex> lock(mutex);
    if (host_blocks.erase(static_cast<char*>(pointer)) == 0) {
      return fail(kInvalidParameter, "aclrtFreeHost of what aclrtMallocHost did not give");
    }
  }
  std::free(pointer);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtHostRegister(void* pointer, uint64_t bytes, aclrtHostRegisterType, void** device_pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  host_blocks[static_cast<char*>(pointer)] = bytes;
  if (device_pointer != nullptr) *device_pointer = pointer;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtHostRegisterV2(void* pointer, uint64_t bytes, uint32_t) {
  return aclrtHostRegister(pointer, bytes, {}, nullptr);
}

NPUSIM_EXPORT aclError aclrtHostUnregister(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  if (host_blocks.erase(static_cast<char*>(pointer)) == 0) {
    return fail(kInvalidParameter, "aclrtHostUnregister of what aclrtHostRegister did not get");
  }
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtGetMemInfo(aclrtMemAttr, size_t* free, size_t* total) {
  std::lock_guard<std::mutex> lock(mutex);
  *total = static_cast<size_t>(memory_limit());
  *free = static_cast<size_t>(memory_limit() - used[device_or_first()]);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtPointerGetAttributes(const void* pointer, aclrtPtrAttributes* attributes) {
  std::memset(attributes, 0, sizeof *attributes);
  attributes->location.type = ACL_MEM_LOCATION_TYPE_UNREGISTERED;
  std::lock_guard<std::mutex> lock(mutex);
  const char* address = static_cast<const char*>(pointer);
  const auto host = block_around(host_blocks, pointer);
  if (host != host_blocks.end() && address < host->first + host->second) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_HOST;
  }
  const auto device = block_around(device_blocks, pointer);
  if (device != device_blocks.end() && address < device->first + device->second.bytes) {
    attributes->location.type = ACL_MEM_LOCATION_TYPE_DEVICE;
    attributes->location.id = static_cast<uint32_t>(device->second.device);
  }
  return ACL_SUCCESS;
}

// A copy without a stream is not ordered with any stream, as on the device.
NPUSIM_EXPORT aclError aclrtMemcpy(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind) {
  if (bytes > room) return fail(kInvalidParameter, "aclrtMemcpy of more bytes than its destination has");
  if (bytes > 0) std::memmove(to, from, bytes);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMemcpyAsync(void* to, size_t room, const void* from, size_t bytes, aclrtMemcpyKind kind,
                                        aclrtStream stream) {
  if (const int status = stream_drain(stream)) return status;
  return aclrtMemcpy(to, room, from, bytes, kind);
}

NPUSIM_EXPORT aclError aclrtMemcpyAsyncWithCondition(void* to, size_t room, const void* from, size_t bytes,
                                                     aclrtMemcpyKind kind, aclrtStream stream) {
  return aclrtMemcpyAsync(to, room, from, bytes, kind, stream);
}

NPUSIM_EXPORT aclError aclrtMemset(void* to, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return fail(kInvalidParameter, "aclrtMemset of more bytes than its destination has");
  std::memset(to, value, bytes);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMemsetAsync(void* to, size_t room, int32_t value, size_t bytes, aclrtStream stream) {
  if (const int status = stream_drain(stream)) return status;
  return aclrtMemset(to, room, value, bytes);
}

// Virtual memory: what expandable segments are made of.
NPUSIM_EXPORT aclError aclrtReserveMemAddress(void** pointer, size_t bytes, size_t, void* hint, uint64_t) {
  *pointer = mmap(hint, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (*pointer == MAP_FAILED) return fail(kOutOfMemory, "no address range of that size is free");
  std::lock_guard<std::mutex> lock(mutex);
  reserved[*pointer] = bytes;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtReleaseMemAddress(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = reserved.find(pointer);
  if (found == reserved.end()) {
    return fail(kInvalidParameter, "aclrtReleaseMemAddress of what aclrtReserveMemAddress did not give");
  }
  munmap(pointer, found->second);
  reserved.erase(found);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMallocPhysical(aclrtDrvMemHandle* handle, size_t bytes, const aclrtPhysicalMemProp*, uint64_t) {
  const int device = device_or_first();
  std::lock_guard<std::mutex> lock(mutex);
  if (const int status = take(device, static_cast<long>(bytes))) return status;
  const int file = memfd_create("llm_adapt_npu", 0);
  if (file < 0 || ftruncate(file, static_cast<off_t>(bytes)) != 0) {
    used[device] -= static_cast<long>(bytes);
    if (file >= 0) close(file);
    return fail(kOutOfMemory, "the host has no memory left for the simulated device");
  }
  *handle = reinterpret_cast<aclrtDrvMemHandle>(new Physical{file, bytes, device});
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtFreePhysical(aclrtDrvMemHandle handle) {
  auto* physical = reinterpret_cast<Physical*>(handle);
  std::lock_guard<std::mutex> lock(mutex);
  used[physical->device] -= static_cast<long>(physical->bytes);
  close(physical->file);
  delete physical;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtMapMem(void* pointer, size_t bytes, size_t offset, aclrtDrvMemHandle handle, uint64_t) {
  auto* physical = reinterpret_cast<Physical*>(handle);
  const int access = PROT_READ | PROT_WRITE;
  if (mmap(pointer, bytes, access, MAP_SHARED | MAP_FIXED, physical->file, static_cast<off_t>(offset)) == MAP_FAILED) {
    return fail(kOutOfMemory, "the host refused to map simulated device memory");
  }
  std::lock_guard<std::mutex> lock(mutex);
  mapped[pointer] = bytes;
  device_blocks[static_cast<char*>(pointer)] = {bytes, physical->device};
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtUnmapMem(void* pointer) {
  std::lock_guard<std::mutex> lock(mutex);
  const auto found = mapped.find(pointer);
  if (found == mapped.end()) return fail(kInvalidParameter, "aclrtUnmapMem of what aclrtMapMem did not map");
  mmap(pointer, found->second, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0);
  mapped.erase(found);
  device_blocks.erase(static_cast<char*>(pointer));
  return ACL_SUCCESS;
}

}  // extern "C"
