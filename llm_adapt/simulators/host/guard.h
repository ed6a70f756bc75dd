// Current device, streams and events of a simulated device. Kernels run in the thread that calls them, so every
// stream is always drained; what is kept is who is current, and when an event was recorded.
#pragma once
#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <atomic>
#include <chrono>
#include <unordered_map>

#include "fleet.h"

namespace llm_adapt::host {

class Guard : public c10::impl::DeviceGuardImplInterface {
 public:
  explicit Guard(const Fleet& fleet) : fleet_(fleet) {}

  c10::DeviceType type() const override { return fleet_.type; }
  c10::DeviceIndex deviceCount() const noexcept override { return fleet_.count; }
  c10::Device getDevice() const override { return {fleet_.type, current()}; }
  void setDevice(c10::Device device) const override {
    fleet_.check_index(device.index());
    current() = device.index();
  }
  void uncheckedSetDevice(c10::Device device) const noexcept override { current() = device.index(); }
  c10::Device exchangeDevice(c10::Device device) const override {
    const c10::Device before = getDevice();
    if (device != before) {
      setDevice(device);
    }
    return before;
  }

  c10::Stream getStream(c10::Device device) const override;
  c10::Stream getDefaultStream(c10::Device device) const override {
    return c10::Stream(c10::Stream::DEFAULT, full(device));
  }
  c10::Stream getStreamFromGlobalPool(c10::Device device, bool is_high_priority) const override {
    return getNewStream(device, is_high_priority ? -1 : 0);
  }
  c10::Stream getNewStream(c10::Device device, int priority) const override;
  c10::Stream exchangeStream(c10::Stream stream) const override;
  bool queryStream(const c10::Stream& stream) const override { return true; }
  void synchronizeStream(const c10::Stream& stream) const override {}
  void synchronizeDevice(c10::DeviceIndex device) const override { fleet_.check_index(device); }

  void record(
      void** event, const c10::Stream& stream, c10::DeviceIndex device, c10::EventFlag flag) const override;
  void block(void* event, const c10::Stream& stream) const override {}
  bool queryEvent(void* event) const override { return true; }
  void synchronizeEvent(void* event) const override {}
  void destroyEvent(void* event, c10::DeviceIndex device) const noexcept override { delete static_cast<Event*>(event); }
  double elapsedTime(void* start, void* end, c10::DeviceIndex device) const override;

 private:
  using Clock = std::chrono::steady_clock;
  struct Event {
    Clock::time_point recorded;
    bool is_timed;
  };

  static c10::DeviceIndex& current() {
    static thread_local c10::DeviceIndex index = 0;
    return index;
  }
  static std::unordered_map<int, c10::StreamId>& current_streams() {
    static thread_local std::unordered_map<int, c10::StreamId> streams;
    return streams;
  }
  c10::Device full(c10::Device device) const { return device.has_index() ? device : getDevice(); }

  const Fleet& fleet_;
};

inline c10::Stream Guard::getStream(c10::Device device) const {
  const c10::Device where = full(device);
  auto found = current_streams().find(where.index());
  const c10::StreamId id = found == current_streams().end() ? 0 : found->second;
  return c10::Stream(c10::Stream::UNSAFE, where, id);
}

inline c10::Stream Guard::getNewStream(c10::Device device, int priority) const {
  static std::atomic<c10::StreamId> made{0};
  const c10::Device where = full(device);
  fleet_.check_index(where.index());
  return c10::Stream(c10::Stream::UNSAFE, where, ++made);
}

inline c10::Stream Guard::exchangeStream(c10::Stream stream) const {
  const c10::Stream before = getStream(stream.device());
  current_streams()[stream.device_index()] = stream.id();
  return before;
}

inline void Guard::record(
    void** event, const c10::Stream& stream, c10::DeviceIndex device, c10::EventFlag flag) const {
  if (*event == nullptr) {
    *event = new Event;
  }
  auto* record = static_cast<Event*>(*event);
  record->recorded = Clock::now();
  record->is_timed = flag == c10::EventFlag::BACKEND_DEFAULT;
}

inline double Guard::elapsedTime(void* start, void* end, c10::DeviceIndex device) const {
  TORCH_CHECK(
      start != nullptr && end != nullptr, "Both events must be recorded before calculating elapsed time.");
  const auto* first = static_cast<Event*>(start);
  const auto* last = static_cast<Event*>(end);
  TORCH_CHECK_VALUE(
      first->is_timed && last->is_timed, "Both events must be created with argument 'enable_timing=True'.");
  return std::chrono::duration<double, std::milli>(last->recorded - first->recorded).count();
}

}  // namespace llm_adapt::host
