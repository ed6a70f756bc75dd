// The communicators of this process, and their report.
#include <map>
#include <vector>

#include "hccl_communicator.h"

namespace llm_adapt::hccl {
namespace {

struct Registry {
  std::mutex mutex;
  std::map<void*, std::shared_ptr<Communicator>> alive;
  std::vector<std::string> past;
};

Registry& registry() {
  // Never destroyed: torch_npu may ask while the process ends.
  static Registry* all = new Registry;
  return *all;
}

}  // namespace

std::shared_ptr<Communicator> find(void* handle) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.alive.find(handle);
  return found == all.alive.end() ? nullptr : found->second;
}

void* remember(std::shared_ptr<Communicator> communicator) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  void* handle = communicator.get();
  all.alive[handle] = std::move(communicator);
  return handle;
}

std::shared_ptr<Communicator> forget(void* handle) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  auto found = all.alive.find(handle);
  if (found == all.alive.end()) {
    return nullptr;
  }
  auto communicator = found->second;
  all.alive.erase(found);
  return communicator;
}

void remember_past(const std::string& report) {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  all.past.push_back(report);
}

std::string report_all() {
  Registry& all = registry();
  std::lock_guard<std::mutex> lock(all.mutex);
  std::vector<std::string> lines = all.past;
  for (auto& [handle, communicator] : all.alive) {
    lines.push_back(communicator->report());
  }
  std::string text = "{\"communicators\": [";
  for (size_t i = 0; i < lines.size(); ++i) {
    text += (i == 0 ? "" : ", ") + lines[i];
  }
  return text + "]}";
}

}  // namespace llm_adapt::hccl

// What Python reads: JSON, valid until the thread's next call.
extern "C" NPUSIM_EXPORT const char* npusim_hccl_report() {
  static thread_local std::string text;
  text = llm_adapt::hccl::report_all();
  return text.c_str();
}
