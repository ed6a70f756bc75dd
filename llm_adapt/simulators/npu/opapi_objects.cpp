// The objects that aclnn arguments are made of, and the two phases of a call.
#include <cstdio>

#include "opapi.h"

namespace llm_adapt::opapi {
namespace {

struct Pair {
  int acl;
  at::ScalarType torch;
};
// aclDataType of acl/acl_base.h.
constexpr Pair kTypes[] = {
    {0, at::kFloat},          {1, at::kHalf},           {2, at::kChar},          {3, at::kInt},
    {4, at::kByte},           {6, at::kShort},          {7, at::kUInt16},        {8, at::kUInt32},
    {9, at::kLong},           {10, at::kUInt64},        {11, at::kDouble},       {12, at::kBool},
    {16, at::kComplexFloat},  {17, at::kComplexDouble}, {27, at::kBFloat16},     {33, at::kComplexHalf},
    {35, at::kFloat8_e5m2},   {36, at::kFloat8_e4m3fn},
};

}  // namespace

at::ScalarType scalar_type(int acl_dtype) {
  for (const Pair& pair : kTypes) {
    if (pair.acl == acl_dtype) return pair.torch;
  }
  throw Refusal("aclDataType " + std::to_string(acl_dtype) + " is not modelled");
}

int acl_dtype(at::ScalarType dtype) {
  for (const Pair& pair : kTypes) {
    if (pair.torch == dtype) return pair.acl;
  }
  throw Refusal(std::string("torch.") + c10::toString(dtype) + " has no aclDataType here");
}

Tensors value(const aclTensorList* given) {
  Tensors found;
  if (given == nullptr) return found;
  for (const aclTensor* one : given->tensors) found.push_back(value(one));
  return found;
}

Ints value(const aclIntArray* given) { return given == nullptr ? Ints() : Ints(given->values); }

std::optional<std::vector<float>> value(const aclFloatArray* given) {
  if (given == nullptr) return std::nullopt;
  return given->values;
}

std::optional<std::vector<bool>> value(const aclBoolArray* given) {
  if (given == nullptr) return std::nullopt;
  return given->values;
}

int refused(const char* name, const std::string& text) {
  const std::string said = std::string(name) + ": " + text.substr(0, text.find("\nException raised"));
  launch_failed(said);  // the first phase runs in the queue with TASK_QUEUE_ENABLE=2
  return fail(kParameterInvalid, said);
}

int launch(aclOpExecutor* executor, void* stream) {
  std::unique_ptr<aclOpExecutor> owned(executor);
  const int status = stream_drain(stream);
  if (status != 0) return status;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    owned->run();
  } catch (const std::exception& error) {
    const std::string text = error.what();
    const std::string said = std::string(owned->name) + ": " + text.substr(0, text.find("\nException raised"));
    launch_failed(said);
    return fail(kRuntimeError, said);
  }
  return 0;
}

}  // namespace llm_adapt::opapi

using namespace llm_adapt::opapi;

extern "C" {

NPUSIM_EXPORT aclTensor* aclCreateTensor(const int64_t* sizes, uint64_t rank, int dtype, const int64_t* strides,
                                         int64_t offset, int format, const int64_t* storage_sizes,
                                         uint64_t storage_rank, void* data) {
  const at::ScalarType type = scalar_type(dtype);
  char* start = static_cast<char*>(data) + offset * static_cast<int64_t>(c10::elementSize(type));
  at::Tensor tensor = at::from_blob(start, at::IntArrayRef(sizes, rank), at::IntArrayRef(strides, rank), type);
  return new aclTensor{tensor, format, std::vector<int64_t>(storage_sizes, storage_sizes + storage_rank)};
}

NPUSIM_EXPORT aclScalar* aclCreateScalar(void* data, int dtype) {
  return new aclScalar{at::from_blob(data, {}, scalar_type(dtype)).item()};
}

NPUSIM_EXPORT aclIntArray* aclCreateIntArray(const int64_t* values, uint64_t size) {
  return new aclIntArray{{values, values + size}};
}

NPUSIM_EXPORT aclFloatArray* aclCreateFloatArray(const float* values, uint64_t size) {
  return new aclFloatArray{{values, values + size}};
}

NPUSIM_EXPORT aclBoolArray* aclCreateBoolArray(const bool* values, uint64_t size) {
  return new aclBoolArray{{values, values + size}};
}

NPUSIM_EXPORT aclTensorList* aclCreateTensorList(aclTensor* const* tensors, uint64_t size) {
  return new aclTensorList{{tensors, tensors + size}};
}

NPUSIM_EXPORT aclScalarList* aclCreateScalarList(aclScalar* const* scalars, uint64_t size) {
  return new aclScalarList{{scalars, scalars + size}};
}

NPUSIM_EXPORT int aclDestroyTensor(const aclTensor* tensor) { return delete tensor, 0; }
NPUSIM_EXPORT int aclDestroyScalar(const aclScalar* scalar) { return delete scalar, 0; }
NPUSIM_EXPORT int aclDestroyIntArray(const aclIntArray* array) { return delete array, 0; }
NPUSIM_EXPORT int aclDestroyFloatArray(const aclFloatArray* array) { return delete array, 0; }
NPUSIM_EXPORT int aclDestroyBoolArray(const aclBoolArray* array) { return delete array, 0; }

NPUSIM_EXPORT int aclDestroyTensorList(const aclTensorList* list) {
  for (aclTensor* tensor : list->tensors) delete tensor;
  return delete list, 0;
}

NPUSIM_EXPORT int aclDestroyScalarList(const aclScalarList* list) {
  for (aclScalar* scalar : list->scalars) delete scalar;
  return delete list, 0;
}

}  // extern "C"
