// From a call of the C API to the worker of its communicator, or to the group that is open.
#pragma once
#include <vector>

#include "hccl_communicator.h"

namespace llm_adapt::hccl {

// Each returns an HcclResult, and sets the thread's error text unless it is HCCL_SUCCESS.
int launch(void* communicator, void* stream, const Call& call, Work work);
int launch_messages(void* communicator, void* stream, Operation operation, const std::vector<Message>& messages);

}  // namespace llm_adapt::hccl
