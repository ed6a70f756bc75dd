// Pinned host memory: ordinary memory that remembers to be pinned.
#pragma once
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>

#include <map>
#include <memory>
#include <mutex>

namespace llm_adapt::host {

class PinnedMemory final : public c10::Allocator {
 public:
  static PinnedMemory& instance() {
    static auto* one = new PinnedMemory;
    return *one;
  }

  c10::DataPtr allocate(size_t bytes) override {
    c10::DataPtr data = c10::GetCPUAllocator()->allocate(bytes);
    void* address = data.get();
    if (address == nullptr) {
      return data;
    }
    std::lock_guard<std::mutex> lock(mutex_);
    blocks_[reinterpret_cast<uintptr_t>(address)] = bytes;
    auto* held = new Held{std::move(data)};
    return c10::DataPtr(address, held, &PinnedMemory::release, c10::Device(c10::kCPU));
  }

  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }

  bool owns(const void* address) {
    std::lock_guard<std::mutex> lock(mutex_);
    const auto place = reinterpret_cast<uintptr_t>(address);
    auto next = blocks_.upper_bound(place);
    return next != blocks_.begin() && place < std::prev(next)->first + std::prev(next)->second;
  }

 private:
  struct Held {
    c10::DataPtr data;
  };

  static void release(void* context) {
    std::unique_ptr<Held> held(static_cast<Held*>(context));
    std::lock_guard<std::mutex> lock(instance().mutex_);
    instance().blocks_.erase(reinterpret_cast<uintptr_t>(held->data.get()));
  }

  std::mutex mutex_;
  std::map<uintptr_t, size_t> blocks_;
};

}  // namespace llm_adapt::host
