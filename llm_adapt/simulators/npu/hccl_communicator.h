// A communicator: its connections, its memory, and the worker that does its calls one after the other.
#pragma once
#include <array>
#include <condition_variable>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>

#include "cann.h"
#include "hccl_mesh.h"

namespace llm_adapt::hccl {

struct Settings {
  std::string token;  // shared by the ranks, unlike that of any other communicator
  std::string name;
  int rank = 0;
  int size = 1;
  int device = 0;
  long buffer_bytes = 0;     // device memory that is this communicator's alone
  double exec_timeout_s = 0;  // 0: never
  double connect_timeout_s = 0;
};

// What the worker is to do for a call.
using Work = std::function<void(Mesh&, const Call&)>;

class Communicator : public std::enable_shared_from_this<Communicator> {
 public:
  // Connects to the other ranks. Throws Failure.
  explicit Communicator(const Settings& settings);
  ~Communicator();

  // Start the worker.
  void start();
  // Do `work` after what is on `stream` now; what comes on `stream` later waits for it. Returns an HcclResult.
  int submit(void* stream, Call call, Work work);
  // The failure that ended this communicator's work, HCCL_SUCCESS without one.
  HcclResult failure(std::string* text);
  // Give work in progress a moment, then end it.
  void close();

  const Settings& settings() const { return settings_; }
  // How many sub-communicators were made of this one with that id, this one not counted: a part of the next's token.
  uint64_t uses_of(uint64_t id);
  // One line of JSON: name, ranks, buffer, calls and bytes.
  std::string report();

 private:
  struct Task {
    Call call;
    Work work;
    Completions before;
    std::shared_ptr<Completion> done;
  };
  void run();
  void perform(Task& task);
  void fail_task(Task& task, HcclResult code, const std::string& reason);
  std::string title(const Call& call) const;

  Settings settings_;
  int process_;
  Mesh mesh_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<Task> tasks_;
  bool busy_ = false;
  bool closing_ = false;
  HcclResult code_ = HCCL_SUCCESS;
  std::string reason_;
  uint64_t sequence_ = 0;
  std::map<uint64_t, uint64_t> children_;
  std::array<uint64_t, kOperations> calls_{};
  uint64_t bytes_out_ = 0;
  uint64_t bytes_in_ = 0;
};

// Live communicators by the handle that torch_npu holds.
std::shared_ptr<Communicator> find(void* handle);
void* remember(std::shared_ptr<Communicator> communicator);
std::shared_ptr<Communicator> forget(void* handle);
// Keep the report of a communicator that was destroyed.
void remember_past(const std::string& report);
// JSON of all communicators that this process made, those destroyed included.
std::string report_all();

}  // namespace llm_adapt::hccl
