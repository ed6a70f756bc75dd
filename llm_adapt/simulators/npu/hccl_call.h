// What one rank asks of a communicator, in the form in which it travels to the other ranks to be compared.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>

#include "cann.h"
#include "hccl/hccl_types.h"

namespace llm_adapt::hccl {

enum class Operation : uint32_t {
  kAllReduce,
  kReduce,
  kReduceScatter,
  kReduceScatterV,
  kAllGather,
  kAllGatherV,
  kBroadcast,
  kScatter,
  kAllToAll,
  kAllToAllV,
  kBarrier,
  kSend,
  kReceive,
  kBatch,
};
constexpr int kOperations = static_cast<int>(Operation::kBatch) + 1;

// One call. Plain data: it is sent as it lies in memory, between processes of one host and one build.
struct Call {
  Operation operation = Operation::kBarrier;
  HcclDataType dtype = HCCL_DATA_TYPE_RESERVED;
  HcclReduceOp reduction = HCCL_REDUCE_RESERVED;
  uint32_t root = 0;
  uint64_t count = 0;     // elements; 0 where ranks may differ (the *V calls)
  uint64_t sequence = kUncounted;  // of the collectives of a communicator, or of the messages from rank to rank

  static constexpr uint64_t kUncounted = UINT64_MAX;
};

// Ends the work of a communicator: every later call on it fails with the same text.
struct Failure : std::runtime_error {
  Failure(HcclResult result, const std::string& text) : std::runtime_error(text), code(result) {}
  HcclResult code;
};

const char* name_of(Operation operation);
std::string name_of(HcclDataType dtype);
const char* name_of(HcclReduceOp reduction);

// "all_reduce #3 (4 x fp32, sum)".
std::string describe(const Call& call);
// Whether two ranks' calls can meet.
bool same_call(const Call& one, const Call& other);

// Bytes of an element; 0 for a dtype that no collective takes.
size_t element_bytes(HcclDataType dtype);
// Why a call with these cannot be, "" when it can. A reduction has fewer dtypes than a copy.
std::string refuses_copy(HcclDataType dtype);
std::string refuses_reduction(HcclDataType dtype, HcclReduceOp reduction);

}  // namespace llm_adapt::hccl
