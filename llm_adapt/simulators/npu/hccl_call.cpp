// Names, sizes and limits of HCCL calls.
#include "hccl_call.h"

#include <map>
#include <set>

namespace llm_adapt::hccl {
namespace {

struct Dtype {
  const char* name;
  size_t bytes;
};

// int128, hif8 and fp8e8m0 are in the enumeration, but no collective is documented to take them.
const std::map<HcclDataType, Dtype> kDtypes = {
    {HCCL_DATA_TYPE_INT8, {"int8", 1}},          {HCCL_DATA_TYPE_UINT8, {"uint8", 1}},
    {HCCL_DATA_TYPE_INT16, {"int16", 2}},        {HCCL_DATA_TYPE_UINT16, {"uint16", 2}},
    {HCCL_DATA_TYPE_INT32, {"int32", 4}},        {HCCL_DATA_TYPE_UINT32, {"uint32", 4}},
    {HCCL_DATA_TYPE_INT64, {"int64", 8}},        {HCCL_DATA_TYPE_UINT64, {"uint64", 8}},
    {HCCL_DATA_TYPE_FP16, {"fp16", 2}},          {HCCL_DATA_TYPE_BFP16, {"bf16", 2}},
    {HCCL_DATA_TYPE_FP32, {"fp32", 4}},          {HCCL_DATA_TYPE_FP64, {"fp64", 8}},
    {HCCL_DATA_TYPE_FP8E4M3, {"fp8e4m3", 1}},    {HCCL_DATA_TYPE_FP8E5M2, {"fp8e5m2", 1}},
};

const std::set<HcclDataType> kReducible = {
    HCCL_DATA_TYPE_INT8, HCCL_DATA_TYPE_INT16, HCCL_DATA_TYPE_INT32, HCCL_DATA_TYPE_INT64,
    HCCL_DATA_TYPE_FP16, HCCL_DATA_TYPE_BFP16, HCCL_DATA_TYPE_FP32,
};

// Reducible on the 950 only.
const std::set<HcclDataType> kReducibleOnA5 = {HCCL_DATA_TYPE_UINT64, HCCL_DATA_TYPE_FP64};

constexpr const char* kNames[kOperations] = {
    "all_reduce", "reduce",  "reduce_scatter", "reduce_scatter_v", "all_gather", "all_gather_v", "broadcast",
    "scatter",    "all_to_all", "all_to_all_v", "barrier",         "send",       "recv",         "batch_send_recv",
};

bool has_root(Operation operation) {
  return operation == Operation::kReduce || operation == Operation::kBroadcast || operation == Operation::kScatter;
}

}  // namespace

const char* name_of(Operation operation) { return kNames[static_cast<int>(operation)]; }

std::string name_of(HcclDataType dtype) {
  auto found = kDtypes.find(dtype);
  return found == kDtypes.end() ? "dtype " + std::to_string(static_cast<int>(dtype)) : found->second.name;
}

const char* name_of(HcclReduceOp reduction) {
  switch (reduction) {
    case HCCL_REDUCE_SUM:
      return "sum";
    case HCCL_REDUCE_PROD:
      return "prod";
    case HCCL_REDUCE_MAX:
      return "max";
    case HCCL_REDUCE_MIN:
      return "min";
    default:
      return "unknown reduction";
  }
}

std::string describe(const Call& call) {
  std::string text = name_of(call.operation);
  if (call.sequence != Call::kUncounted) {
    text += " #" + std::to_string(call.sequence);
  }
  if (call.operation == Operation::kBarrier || call.operation == Operation::kBatch) {
    return text;
  }
  text += " (";
  if (call.count > 0) {
    text += std::to_string(call.count) + " x ";
  }
  text += name_of(call.dtype);
  if (call.reduction != HCCL_REDUCE_RESERVED) {
    text += std::string(", ") + name_of(call.reduction);
  }
  if (has_root(call.operation)) {
    text += ", root " + std::to_string(call.root);
  }
  return text + ")";
}

bool same_call(const Call& one, const Call& other) {
  return one.operation == other.operation && one.dtype == other.dtype && one.reduction == other.reduction &&
         one.root == other.root && one.count == other.count && one.sequence == other.sequence;
}

size_t element_bytes(HcclDataType dtype) {
  auto found = kDtypes.find(dtype);
  return found == kDtypes.end() ? 0 : found->second.bytes;
}

std::string refuses_copy(HcclDataType dtype) {
  if (element_bytes(dtype) != 0) {
    return "";
  }
  return name_of(dtype) + " was asked; HCCL takes no such elements";
}

std::string refuses_reduction(HcclDataType dtype, HcclReduceOp reduction) {
  bool known = reduction == HCCL_REDUCE_SUM || reduction == HCCL_REDUCE_PROD || reduction == HCCL_REDUCE_MAX ||
               reduction == HCCL_REDUCE_MIN;
  if (!known) {
    return "reduction " + std::to_string(static_cast<int>(reduction)) + " was asked; HCCL has sum, prod, max and min";
  }
  bool fits = kReducible.count(dtype) > 0 || (family() == Family::kA5 && kReducibleOnA5.count(dtype) > 0);
  if (fits) {
    return "";
  }
  std::string reducible = "int8, int16, int32, int64, fp16, bf16, fp32";
  reducible += family() == Family::kA5 ? ", uint64, fp64" : "";
  return "a reduction of " + name_of(dtype) + " was asked; on " + soc_name() + " HCCL reduces " + reducible +
         ". Cast before the call";
}

}  // namespace llm_adapt::hccl
