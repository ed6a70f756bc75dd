// What the emulated CANN libraries share: streams whose work may be outstanding, and calls that are not modelled.
//
// Kernels run in the thread that launches them, once everything before them on their stream is done; collectives
// run in a worker of their communicator. So a stream is the list of completions that later work on it waits for.
#pragma once
#include <condition_variable>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#define NPUSIM_EXPORT __attribute__((visibility("default")))
#define ACL_DEPRECATED_MESSAGE(text)

namespace llm_adapt {

// Print that `name` is not modelled and throw std::runtime_error saying so.
[[noreturn]] NPUSIM_EXPORT void not_modelled(const char* name);

// Remember `text` as the thread's recent error, which torch_npu puts into its exception; returns `code`.
NPUSIM_EXPORT int fail(int code, const std::string& text);

// Work in flight. Finished once, with an error text or without.
class NPUSIM_EXPORT Completion {
 public:
  void finish(std::string error = "");
  bool done();
  bool succeeded();    // done, and without an error
  std::string wait();  // returns the error text, "" when all went well

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  bool done_ = false;
  std::string error_;
};
using Completions = std::vector<std::shared_ptr<Completion>>;

// A launch failed. In the thread of torch_npu's task queue that stops the queue: torch_npu raises once and then drops
// every later operator without a word. The simulator refuses everything from then on.
NPUSIM_EXPORT void launch_failed(const std::string& text);
// Why everything is refused, "" while it is not; in the queue's own thread always "".
NPUSIM_EXPORT std::string queue_error();

// What work launched on `stream` now must wait for. nullptr is the default stream of the current device.
NPUSIM_EXPORT Completions stream_pending(void* stream);
// Later work on `stream` waits for `work` too.
NPUSIM_EXPORT void stream_add(void* stream, std::shared_ptr<Completion> work);
// Wait for all work on `stream`; returns 0 or an aclError with its text set.
NPUSIM_EXPORT int stream_drain(void* stream);

// The chip that is simulated, e.g. "Ascend910B3" (NPU_SIM_SOC), and its family.
NPUSIM_EXPORT const std::string& soc_name();
enum class Family { kA1, k310P, kA2, kA3, kA5 };
NPUSIM_EXPORT Family family();

}  // namespace llm_adapt
