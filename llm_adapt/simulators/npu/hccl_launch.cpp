// Groups: between HcclGroupStart and HcclGroupEnd calls are collected; at the end the messages of one communicator
// go as one batch, in which no order can deadlock, and collectives one after the other.
#include "hccl_launch.h"

#include "acl/acl.h"
#include "hccl/hccl.h"

namespace llm_adapt::hccl {
namespace {

struct Pending {
  std::shared_ptr<Communicator> communicator;
  void* stream;
  Call call;
  Work work;                      // of a collective
  std::vector<Message> messages;  // of anything else
};

thread_local int group_depth = 0;
thread_local std::vector<Pending> group;

// A rank can send to itself only where both sides are in one batch.
bool own_messages_pair(const std::vector<Message>& messages, int own) {
  std::vector<size_t> sends;
  std::vector<size_t> receives;
  for (const Message& message : messages) {
    if (message.peer == own) {
      (message.is_send ? sends : receives).push_back(message.bytes());
    }
  }
  return sends == receives;
}

int submit(Pending& pending) {
  if (pending.work) {
    return pending.communicator->submit(pending.stream, pending.call, pending.work);
  }
  int own = pending.communicator->settings().rank;
  if (!own_messages_pair(pending.messages, own)) {
    return fail(HCCL_E_PARA, std::string(name_of(pending.call.operation)) + " with the own rank " +
                                 std::to_string(own) + " was asked; it needs a send and a recv of the same size in " +
                                 "one batch");
  }
  auto pass = [messages = pending.messages](Mesh& mesh, const Call&) { mesh.pass_messages(messages); };
  return pending.communicator->submit(pending.stream, pending.call, pass);
}

int collect(Pending pending) {
  if (group_depth == 0) {
    return submit(pending);
  }
  bool is_messages = !pending.work;
  for (auto last = group.rbegin(); is_messages && last != group.rend(); ++last) {
    if (last->communicator != pending.communicator) {
      continue;
    }
    bool joins = !last->work && last->stream == pending.stream;
    if (joins) {
      last->call.operation = Operation::kBatch;
      last->messages.insert(last->messages.end(), pending.messages.begin(), pending.messages.end());
      return HCCL_SUCCESS;
    }
    break;
  }
  group.push_back(std::move(pending));
  return HCCL_SUCCESS;
}

std::string refuses(const Communicator& communicator, const Message& message) {
  std::string refusal = refuses_copy(message.dtype);
  int size = communicator.settings().size;
  if (refusal.empty() && (message.peer < 0 || message.peer >= size)) {
    return "rank " + std::to_string(message.peer) + " was asked; the communicator has " + std::to_string(size) +
           " ranks";
  }
  if (refusal.empty() && message.count > 0 && message.data == nullptr) {
    return "a null buffer was given";
  }
  return refusal;
}

}  // namespace

int launch(void* handle, void* stream, const Call& call, Work work) {
  auto communicator = find(handle);
  if (!communicator) {
    return fail(HCCL_E_PARA, std::string(name_of(call.operation)) + " was asked on a communicator that is not alive");
  }
  return collect(Pending{communicator, stream, call, std::move(work), {}});
}

int launch_messages(void* handle, void* stream, Operation operation, const std::vector<Message>& messages) {
  auto communicator = find(handle);
  if (!communicator) {
    return fail(HCCL_E_PARA, std::string(name_of(operation)) + " was asked on a communicator that is not alive");
  }
  for (const Message& message : messages) {
    std::string refusal = refuses(*communicator, message);
    if (!refusal.empty()) {
      return fail(HCCL_E_PARA, std::string(name_of(operation)) + ": " + refusal);
    }
  }
  Call call;
  call.operation = operation;
  if (messages.size() == 1) {
    call.dtype = messages[0].dtype;
    call.count = messages[0].count;
  }
  return collect(Pending{communicator, stream, call, nullptr, messages});
}

int start_group() {
  ++group_depth;
  return HCCL_SUCCESS;
}

int end_group() {
  if (group_depth == 0) {
    return fail(HCCL_E_PARA, "HcclGroupEnd was called; no HcclGroupStart came before it on this thread");
  }
  if (--group_depth > 0) {
    return HCCL_SUCCESS;
  }
  std::vector<Pending> collected;
  collected.swap(group);
  for (Pending& pending : collected) {
    int result = submit(pending);
    if (result != HCCL_SUCCESS) {
      return result;
    }
  }
  return HCCL_SUCCESS;
}

}  // namespace llm_adapt::hccl

extern "C" {

NPUSIM_EXPORT HcclResult HcclGroupStart() { return static_cast<HcclResult>(llm_adapt::hccl::start_group()); }

NPUSIM_EXPORT HcclResult HcclGroupEnd() { return static_cast<HcclResult>(llm_adapt::hccl::end_group()); }
}
