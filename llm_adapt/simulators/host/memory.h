// Memory of simulated devices: host memory, counted for each device and refused beyond its size.
//
// What is freed stays reserved until empty_cache(), as with a caching allocator; blocks are not rounded and never
// fragment, so a simulator can run where hardware is out of memory by a few per cent.
#pragma once
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <vector>

#include "fleet.h"

namespace llm_adapt::host {

using Stats = c10::CachingDeviceAllocator::DeviceStats;

class Memory final : public c10::DeviceAllocator {
 public:
  explicit Memory(const Fleet& fleet) : fleet_(fleet), books_(fleet.count) {}

  c10::DataPtr allocate(size_t bytes) override;
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t pool = {0, 0}) override;
  void recordStream(const c10::DataPtr& data, c10::Stream stream) override {}
  Stats getDeviceStats(c10::DeviceIndex device) override;
  void resetAccumulatedStats(c10::DeviceIndex device) override;
  void resetPeakStats(c10::DeviceIndex device) override;
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex device) override;

  void set_fraction(c10::DeviceIndex device, double fraction);
  // The device that owns an address, if one does.
  std::optional<c10::DeviceIndex> owner_of(const void* address);

 private:
  struct Books {
    Stats stats;
    double fraction = 1.0;
  };
  struct Block {
    Memory* memory;
    void* data;
    size_t bytes;
    c10::DeviceIndex device;
  };

  static void release(void* block);
  static void count(Stats& stats, int64_t blocks, int64_t bytes);
  Books& books(c10::DeviceIndex device);
  void reserve(c10::DeviceIndex device, size_t bytes);
  [[noreturn]] void out_of_memory(Books& books, c10::DeviceIndex device, size_t bytes, const char* why);

  const Fleet& fleet_;
  std::mutex mutex_;
  std::vector<Books> books_;
  std::map<uintptr_t, Block*> blocks_;
};

inline Memory::Books& Memory::books(c10::DeviceIndex device) {
  fleet_.check_index(device);
  return books_[device];
}

inline c10::DataPtr Memory::allocate(size_t bytes) {
  const c10::Device where = c10::impl::getDeviceGuardImpl(fleet_.type)->getDevice();
  if (bytes == 0) {
    return c10::DataPtr(nullptr, where);
  }
  std::lock_guard<std::mutex> lock(mutex_);
  reserve(where.index(), bytes);
  void* data = nullptr;
  if (posix_memalign(&data, 64, bytes) != 0) {
    out_of_memory(books(where.index()), where.index(), bytes, " The host that simulates it has no such block.");
  }
  count(books(where.index()).stats, 1, static_cast<int64_t>(bytes));
  auto* block = new Block{this, data, bytes, where.index()};
  blocks_.emplace(reinterpret_cast<uintptr_t>(data), block);
  return c10::DataPtr(data, block, &Memory::release, where);
}

inline void Memory::reserve(c10::DeviceIndex device, size_t bytes) {
  Books& book = books(device);
  auto& reserved = book.stats.reserved_bytes[0];
  const int64_t wanted = book.stats.allocated_bytes[0].current + static_cast<int64_t>(bytes);
  if (static_cast<double>(wanted) > book.fraction * static_cast<double>(fleet_.bytes_each)) {
    out_of_memory(book, device, bytes, "");
  }
  if (wanted > reserved.current) {
    reserved.increase(static_cast<size_t>(wanted - reserved.current));
    ++book.stats.num_device_alloc;
  }
}

inline void Memory::out_of_memory(Books& book, c10::DeviceIndex device, size_t bytes, const char* why) {
  ++book.stats.num_ooms;
  const double mib = 1024.0 * 1024.0;
  TORCH_CHECK_WITH(
      OutOfMemoryError, false, fleet_.title, " out of memory. Tried to allocate ", static_cast<double>(bytes) / mib,
      " MiB. ", fleet_.title, " ", static_cast<int>(device), " has a total capacity of ",
      static_cast<double>(fleet_.bytes_each) / mib, " MiB, a limit of ", book.fraction, " of it, and ",
      static_cast<double>(book.stats.allocated_bytes[0].current) / mib, " MiB allocated.", why);
}

inline void Memory::count(Stats& stats, int64_t blocks, int64_t bytes) {
  for (auto* amounts : {&stats.allocated_bytes, &stats.active_bytes, &stats.requested_bytes}) {
    bytes > 0 ? (*amounts)[0].increase(bytes) : (*amounts)[0].decrease(-bytes);
  }
  for (auto* numbers : {&stats.allocation, &stats.active}) {
    blocks > 0 ? (*numbers)[0].increase(blocks) : (*numbers)[0].decrease(-blocks);
  }
}

inline void Memory::release(void* held) {
  std::unique_ptr<Block> block(static_cast<Block*>(held));
  Memory& memory = *block->memory;
  std::lock_guard<std::mutex> lock(memory.mutex_);
  count(memory.books_[block->device].stats, -1, -static_cast<int64_t>(block->bytes));
  memory.blocks_.erase(reinterpret_cast<uintptr_t>(block->data));
  std::free(block->data);
}

inline void Memory::emptyCache(c10::MempoolId_t pool) {
  std::lock_guard<std::mutex> lock(mutex_);
  for (Books& book : books_) {
    auto& reserved = book.stats.reserved_bytes[0];
    const int64_t unused = reserved.current - book.stats.allocated_bytes[0].current;
    if (unused > 0) {
      reserved.decrease(static_cast<size_t>(unused));
      ++book.stats.num_device_free;
    }
  }
}

inline Stats Memory::getDeviceStats(c10::DeviceIndex device) {
  std::lock_guard<std::mutex> lock(mutex_);
  return books(device).stats;
}

inline void Memory::resetAccumulatedStats(c10::DeviceIndex device) {
  std::lock_guard<std::mutex> lock(mutex_);
  Stats& stats = books(device).stats;
  for (auto* each : {&stats.allocation, &stats.active, &stats.allocated_bytes, &stats.reserved_bytes,
                     &stats.active_bytes, &stats.requested_bytes}) {
    (*each)[0].reset_accumulated();
  }
  stats.num_ooms = 0;
  stats.num_device_alloc = 0;
  stats.num_device_free = 0;
}

inline void Memory::resetPeakStats(c10::DeviceIndex device) {
  std::lock_guard<std::mutex> lock(mutex_);
  Stats& stats = books(device).stats;
  for (auto* each : {&stats.allocation, &stats.active, &stats.allocated_bytes, &stats.reserved_bytes,
                     &stats.active_bytes, &stats.requested_bytes}) {
    (*each)[0].reset_peak();
  }
}

inline std::pair<size_t, size_t> Memory::getMemoryInfo(c10::DeviceIndex device) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto reserved = static_cast<size_t>(books(device).stats.reserved_bytes[0].current);
  return {fleet_.bytes_each - reserved, fleet_.bytes_each};
}

inline void Memory::set_fraction(c10::DeviceIndex device, double fraction) {
  TORCH_CHECK_VALUE(
      fraction >= 0.0 && fraction <= 1.0, "A memory fraction lies between 0 and 1; ", fraction, " was asked.");
  std::lock_guard<std::mutex> lock(mutex_);
  books(device).fraction = fraction;
}

inline std::optional<c10::DeviceIndex> Memory::owner_of(const void* address) {
  std::lock_guard<std::mutex> lock(mutex_);
  const auto place = reinterpret_cast<uintptr_t>(address);
  auto next = blocks_.upper_bound(place);
  if (next == blocks_.begin()) {
    return std::nullopt;
  }
  const Block& block = *std::prev(next)->second;
  const bool inside = place < reinterpret_cast<uintptr_t>(block.data) + block.bytes;
  return inside ? std::optional<c10::DeviceIndex>(block.device) : std::nullopt;
}

}  // namespace llm_adapt::host
