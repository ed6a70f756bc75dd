// A communicator and its worker.
#include "hccl_communicator.h"

#include <unistd.h>

#include <chrono>
#include <thread>

namespace llm_adapt::hccl {
namespace {

// Long enough for a call whose peers are all there, short enough for a process that ends after an error.
constexpr auto kCloseGrace = std::chrono::seconds(2);

bool is_collective(Operation operation) {
  return operation != Operation::kSend && operation != Operation::kReceive && operation != Operation::kBatch;
}

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (char c : text) {
    if (c == '"' || c == '\\') {
      result += '\\';
    }
    result += static_cast<unsigned char>(c) < 0x20 ? ' ' : c;
  }
  return result + "\"";
}

}  // namespace

Communicator::Communicator(const Settings& settings)
    : settings_(settings),
      process_(getpid()),
      mesh_(connect_all(settings.token, settings.rank, settings.size, settings.connect_timeout_s), settings.rank,
            settings.exec_timeout_s) {}

Communicator::~Communicator() = default;

void Communicator::start() {
  // Detached, so that a process which ends without destroying its communicators is not held up.
  std::thread([self = shared_from_this()] { self->run(); }).detach();
}

std::string Communicator::title(const Call& call) const {
  return describe(call) + " on communicator " + settings_.name + ", rank " + std::to_string(settings_.rank) + " of " +
         std::to_string(settings_.size);
}

int Communicator::submit(void* stream, Call call, Work work) {
  if (getpid() != process_) {
    return fail(HCCL_E_UNAVAIL, title(call) + " was asked in a forked process; a communicator's worker does not " +
                                    "survive a fork. Start processes with spawn");
  }
  Task task{{}, std::move(work), stream_pending(stream), std::make_shared<Completion>()};
  std::lock_guard<std::mutex> lock(mutex_);
  bool counts = is_collective(call.operation);
  call.sequence = counts ? sequence_ : Call::kUncounted;
  if (code_ != HCCL_SUCCESS) {
    return fail(code_, title(call) + " was asked; an earlier call failed: " + reason_);
  }
  if (closing_) {
    return fail(HCCL_E_UNAVAIL, title(call) + " was asked; the communicator is destroyed");
  }
  sequence_ += counts ? 1 : 0;
  task.call = call;
  stream_add(stream, task.done);
  tasks_.push_back(std::move(task));
  changed_.notify_all();
  return HCCL_SUCCESS;
}

void Communicator::run() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (true) {
    changed_.wait(lock, [this] { return closing_ || !tasks_.empty(); });
    if (tasks_.empty()) {
      return;
    }
    Task task = std::move(tasks_.front());
    tasks_.pop_front();
    busy_ = true;
    bool alive = code_ == HCCL_SUCCESS;
    std::string reason = reason_;
    lock.unlock();
    if (alive) {
      perform(task);
    } else {
      task.done->finish(title(task.call) + ": an earlier call failed: " + reason);
    }
    lock.lock();
    busy_ = false;
    changed_.notify_all();
  }
}

void Communicator::perform(Task& task) {
  for (auto& earlier : task.before) {
    std::string error = earlier->wait();
    if (!error.empty()) {
      fail_task(task, HCCL_E_RUNTIME, "not started, because earlier work on its stream failed: " + error);
      return;
    }
  }
  try {
    mesh_.begin(task.call);
    task.work(mesh_, task.call);
  } catch (const Failure& failure) {
    fail_task(task, failure.code, failure.what());
    return;
  } catch (const std::exception& error) {
    fail_task(task, HCCL_E_INTERNAL, error.what());
    return;
  }
  {
    std::lock_guard<std::mutex> lock(mutex_);
    calls_[static_cast<int>(task.call.operation)] += 1;
    bytes_out_ = mesh_.bytes_out();
    bytes_in_ = mesh_.bytes_in();
  }
  task.done->finish();
}

void Communicator::fail_task(Task& task, HcclResult code, const std::string& reason) {
  std::string text = title(task.call) + ": " + reason;
  {
    std::lock_guard<std::mutex> lock(mutex_);
    code_ = code;
    reason_ = text;
  }
  mesh_.give_up(text);
  task.done->finish(text);
}

HcclResult Communicator::failure(std::string* text) {
  std::lock_guard<std::mutex> lock(mutex_);
  *text = reason_;
  return code_;
}

void Communicator::close() {
  if (getpid() != process_) {
    return;
  }
  std::unique_lock<std::mutex> lock(mutex_);
  closing_ = true;
  changed_.notify_all();
  auto idle = [this] { return tasks_.empty() && !busy_; };
  if (!changed_.wait_for(lock, kCloseGrace, idle)) {
    mesh_.cancel();
    changed_.wait_for(lock, kCloseGrace, idle);  // the caller may free what the worker still writes to
  }
}

uint64_t Communicator::uses_of(uint64_t id) {
  std::lock_guard<std::mutex> lock(mutex_);
  return children_[id]++;
}

std::string Communicator::report() {
  std::lock_guard<std::mutex> lock(mutex_);
  std::string calls;
  for (int i = 0; i < kOperations; ++i) {
    if (calls_[i] > 0) {
      calls += (calls.empty() ? "" : ", ") + quoted(name_of(static_cast<Operation>(i))) + ": " +
               std::to_string(calls_[i]);
    }
  }
  return "{\"name\": " + quoted(settings_.name) + ", \"rank\": " + std::to_string(settings_.rank) +
         ", \"ranks\": " + std::to_string(settings_.size) + ", \"device\": " + std::to_string(settings_.device) +
         ", \"buffer_bytes\": " + std::to_string(settings_.buffer_bytes) +
         ", \"alive\": " + (closing_ ? "false" : "true") + ", \"calls\": {" + calls +
         "}, \"bytes_sent\": " + std::to_string(bytes_out_) + ", \"bytes_received\": " + std::to_string(bytes_in_) +
         ", \"error\": " + quoted(reason_) + "}";
}

}  // namespace llm_adapt::hccl
