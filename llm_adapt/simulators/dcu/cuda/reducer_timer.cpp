// DistributedDataParallel takes the times of its steps by a timer of the device; here that is the host's clock.
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>

#include "devices.h"

namespace llm_adapt::dcu {

namespace {

class HostTimer final : public c10d::Timer {
 public:
  explicit HostTimer(c10::Device /*device*/) {}

  std::optional<int64_t> measureDifference(Event start, Event end) override {
    const std::optional<int64_t> first = getTimestamp(start);
    const std::optional<int64_t> last = getTimestamp(end);
    if (!first || !last) {
      return std::nullopt;
    }
    return *last - *first;
  }
};

// The macro names the registry's classes without their namespace.
using c10d::RegistererTimerRegistry;
using c10d::TimerRegistry;
C10_REGISTER_TYPED_CLASS(TimerRegistry, kCuda, HostTimer)

}  // namespace
}  // namespace llm_adapt::dcu
