// Streams, events and callbacks of the emulated runtime.
#include <pthread.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <set>

#include "runtime_state.h"

namespace llm_adapt {
namespace {

double now_ms() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec * 1e3 + now.tv_nsec / 1e6;
}

struct Event {
  std::mutex mutex;
  double recorded_ms = -1;
  Completions before;
};

std::atomic<int> next_stream_id{0};
std::mutex streams_mutex;
std::set<Stream*> streams;
Stream* default_streams[kMaxDevices];

// Handles of events that have been destroyed are refused: torch_npu may still hold one in its queue.
std::mutex events_mutex;
std::set<Event*> events;

bool exists(aclrtEvent handle) {
  std::lock_guard<std::mutex> lock(events_mutex);
  return events.count(static_cast<Event*>(handle)) > 0;
}

// Why nothing may go on, as the caller's error; ACL_SUCCESS while all is well.
int queue_refusal() {
  const std::string refused = queue_error();
  return refused.empty() ? ACL_SUCCESS : fail(kAsyncFailure, refused);
}

int no_such_event() { return fail(kInvalidParameter, "an event was used that does not exist, or has been destroyed"); }

Stream* new_stream(int device) {
  auto* stream = new Stream{next_stream_id++, device};
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams.insert(stream);
  return stream;
}

std::mutex queue_mutex;
std::string queue_failure;

bool in_queue_thread() {
  char name[16] = "";
  pthread_getname_np(pthread_self(), name, sizeof name);
  return std::string(name) == "acl_thread";
}

// Wait for work; the first error becomes the caller's.
int wait_for(const Completions& work) {
  int status = ACL_SUCCESS;
  for (const auto& one : work) {
    const std::string error = one->wait();
    if (!error.empty() && status == ACL_SUCCESS) status = fail(kAsyncFailure, error);
  }
  return status;
}

bool all_done(const Completions& work) {
  return std::all_of(work.begin(), work.end(), [](const auto& one) { return one->done(); });
}

}  // namespace

void Completion::finish(std::string error) {
  std::lock_guard<std::mutex> lock(mutex_);
  done_ = true;
  error_ = std::move(error);
  changed_.notify_all();
}

bool Completion::done() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_;
}

bool Completion::succeeded() {
  std::lock_guard<std::mutex> lock(mutex_);
  return done_ && error_.empty();
}

std::string Completion::wait() {
  std::unique_lock<std::mutex> lock(mutex_);
  changed_.wait(lock, [this] { return done_; });
  return error_;
}

void launch_failed(const std::string& text) {
  if (!in_queue_thread()) return;
  std::lock_guard<std::mutex> lock(queue_mutex);
  if (queue_failure.empty()) queue_failure = text;
}

std::string queue_error() {
  std::lock_guard<std::mutex> lock(queue_mutex);
  if (queue_failure.empty() || in_queue_thread()) return "";
  return "an operator failed in torch_npu's task queue, which drops every later one: " + queue_failure +
         ". Start the process again; with TASK_QUEUE_ENABLE=0 an operator fails where it is called.";
}

Stream* stream_of(aclrtStream stream) {
  if (stream != nullptr) return static_cast<Stream*>(stream);
  const int device = std::max(current_device(), 0);
  static std::mutex mutex;
  std::lock_guard<std::mutex> lock(mutex);
  if (default_streams[device] == nullptr) default_streams[device] = new_stream(device);
  return default_streams[device];
}

std::vector<Stream*> streams_of_device(int device) {
  std::lock_guard<std::mutex> lock(streams_mutex);
  std::vector<Stream*> found;
  for (Stream* stream : streams) {
    if (stream->device == device) found.push_back(stream);
  }
  return found;
}

// What is finished without an error need not be waited for.
Completions stream_pending(void* handle) {
  Stream* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(stream->mutex);
  auto& all = stream->outstanding;
  all.erase(std::remove_if(all.begin(), all.end(), [](const auto& one) { return one->succeeded(); }), all.end());
  return all;
}

void stream_add(void* handle, std::shared_ptr<Completion> work) {
  Stream* stream = stream_of(handle);
  std::lock_guard<std::mutex> lock(stream->mutex);
  auto& all = stream->outstanding;
  if (std::find(all.begin(), all.end(), work) == all.end()) all.push_back(std::move(work));
}

// An error stays on its stream until somebody has been told.
int stream_drain(void* handle) {
  if (const int refused = queue_refusal()) return refused;
  Stream* stream = stream_of(handle);
  const Completions work = stream_pending(stream);
  if (work.empty()) return ACL_SUCCESS;
  const int status = wait_for(work);
  std::lock_guard<std::mutex> lock(stream->mutex);
  auto& left = stream->outstanding;
  left.erase(std::remove_if(left.begin(), left.end(),
                            [&](const auto& one) { return std::find(work.begin(), work.end(), one) != work.end(); }),
             left.end());
  return status;
}

}  // namespace llm_adapt

using namespace llm_adapt;

extern "C" {

NPUSIM_EXPORT aclError aclrtCreateStream(aclrtStream* stream) {
  if (current_device() < 0) return kNoContext;
  *stream = new_stream(current_device());
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtCreateStreamWithConfig(aclrtStream* stream, uint32_t, uint32_t) {
  return aclrtCreateStream(stream);
}

NPUSIM_EXPORT aclError aclrtDestroyStream(aclrtStream handle) {
  const int status = stream_drain(handle);
  std::lock_guard<std::mutex> lock(streams_mutex);
  streams.erase(static_cast<Stream*>(handle));
  delete static_cast<Stream*>(handle);
  return status;
}

NPUSIM_EXPORT aclError aclrtDestroyStreamForce(aclrtStream handle) { return aclrtDestroyStream(handle); }

NPUSIM_EXPORT aclError aclrtStreamGetId(aclrtStream handle, int32_t* id) {
  *id = stream_of(handle)->id;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSynchronizeStream(aclrtStream handle) { return stream_drain(handle); }

NPUSIM_EXPORT aclError aclrtSynchronizeStreamWithTimeout(aclrtStream handle, int32_t) { return stream_drain(handle); }

NPUSIM_EXPORT aclError aclrtStreamQuery(aclrtStream handle, aclrtStreamStatus* status) {
  *status = all_done(stream_pending(handle)) ? ACL_STREAM_STATUS_COMPLETE : ACL_STREAM_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSynchronizeDevice() {
  int status = ACL_SUCCESS;
  for (Stream* stream : streams_of_device(std::max(current_device(), 0))) {
    if (const int found = stream_drain(stream)) status = found;
  }
  return status;
}

NPUSIM_EXPORT aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }

// After a failure in the queue torch_npu never records an event, and its synchronize would wait for that for ever.
// Those of its allocators are made, though: nobody waits for them, and they are made where nothing may be thrown.
NPUSIM_EXPORT aclError aclrtCreateEventWithFlag(aclrtEvent* event, uint32_t flag) {
  const int refused = queue_refusal();
  if (refused != ACL_SUCCESS && flag != ACL_EVENT_CAPTURE_STREAM_PROGRESS) return refused;
  auto* made = new Event;
  std::lock_guard<std::mutex> lock(events_mutex);
  events.insert(made);
  *event = made;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtCreateEventExWithFlag(aclrtEvent* event, uint32_t flag) {
  return aclrtCreateEventWithFlag(event, flag);
}

NPUSIM_EXPORT aclError aclrtDestroyEvent(aclrtEvent event) {
  {
    std::lock_guard<std::mutex> lock(events_mutex);
    if (events.erase(static_cast<Event*>(event)) == 0) return no_such_event();
  }
  delete static_cast<Event*>(event);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtRecordEvent(aclrtEvent handle, aclrtStream stream) {
  if (!exists(handle)) return no_such_event();
  auto* event = static_cast<Event*>(handle);
  Completions before = stream_pending(stream);
  std::lock_guard<std::mutex> lock(event->mutex);
  event->before = std::move(before);
  event->recorded_ms = now_ms();
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtResetEvent(aclrtEvent handle, aclrtStream) {
  if (!exists(handle)) return no_such_event();
  auto* event = static_cast<Event*>(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  event->before.clear();
  event->recorded_ms = -1;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtStreamWaitEvent(aclrtStream stream, aclrtEvent handle) {
  if (!exists(handle)) return no_such_event();
  auto* event = static_cast<Event*>(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  for (const auto& one : event->before) {
    if (!one->succeeded()) stream_add(stream, one);
  }
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtSynchronizeEvent(aclrtEvent handle) {
  if (!exists(handle)) return no_such_event();
  if (const int refused = queue_refusal()) return refused;
  auto* event = static_cast<Event*>(handle);
  Completions before;
  {
    std::lock_guard<std::mutex> lock(event->mutex);
    before = event->before;
  }
  return wait_for(before);
}

NPUSIM_EXPORT aclError aclrtQueryEventStatus(aclrtEvent handle, aclrtEventRecordedStatus* status) {
  if (!exists(handle)) return no_such_event();
  auto* event = static_cast<Event*>(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  const bool complete = event->recorded_ms >= 0 && all_done(event->before);
  *status = complete ? ACL_EVENT_RECORDED_STATUS_COMPLETE : ACL_EVENT_RECORDED_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtQueryEventWaitStatus(aclrtEvent handle, aclrtEventWaitStatus* status) {
  if (!exists(handle)) return no_such_event();
  auto* event = static_cast<Event*>(handle);
  std::lock_guard<std::mutex> lock(event->mutex);
  *status = all_done(event->before) ? ACL_EVENT_WAIT_STATUS_COMPLETE : ACL_EVENT_WAIT_STATUS_NOT_READY;
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtEventElapsedTime(float* ms, aclrtEvent start, aclrtEvent end) {
  if (!exists(start) || !exists(end)) return no_such_event();
  const double from = static_cast<Event*>(start)->recorded_ms, to = static_cast<Event*>(end)->recorded_ms;
  if (from < 0 || to < 0) return fail(kInvalidParameter, "elapsed time was asked of an event that is not recorded");
  *ms = static_cast<float>(to - from);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtEventGetTimestamp(aclrtEvent event, uint64_t* microseconds) {
  if (!exists(event)) return no_such_event();
  *microseconds = static_cast<uint64_t>(static_cast<Event*>(event)->recorded_ms * 1000);
  return ACL_SUCCESS;
}

// Functions that the host runs in stream order.
NPUSIM_EXPORT aclError aclrtLaunchHostFunc(aclrtStream stream, aclrtHostFunc function, void* argument) {
  if (const int status = stream_drain(stream)) return status;
  function(argument);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclrtLaunchCallback(aclrtCallback function, void* argument, aclrtCallbackBlockType,
                                           aclrtStream stream) {
  return aclrtLaunchHostFunc(stream, function, argument);
}

NPUSIM_EXPORT aclError aclrtSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclrtUnSubscribeReport(uint64_t, aclrtStream) { return ACL_SUCCESS; }

NPUSIM_EXPORT aclError aclrtProcessReport(int32_t timeout_ms) {
  usleep(1000 * std::clamp(timeout_ms, 1, 100));  // callbacks have run already: there is never one to report
  return 107018;                                  // ACL_ERROR_RT_REPORT_TIMEOUT
}

}  // extern "C"
