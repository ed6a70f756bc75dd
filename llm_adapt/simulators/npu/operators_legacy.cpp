// The older way to an operator (aclop, GE): its arguments are gathered here, libopapi.so computes it (opapi_legacy.h).
//
// torch_npu takes it for operators that libopapi.so does not have, and for some on chips before Ascend 950. One that is
// not modelled is refused by name: a launch that claimed success would leave the outputs unwritten.
#include <dlfcn.h>

#include <vector>

#include "legacy.h"
#include "runtime_state.h"
#include "acl/acl_op_compiler.h"

using namespace llm_adapt;

struct aclTensorDesc {
  aclDataType dtype;
  std::vector<int64_t> sizes;
  aclFormat format;
};
struct aclDataBuffer {
  void* data;
  size_t bytes;
};
struct aclopAttr {
  std::map<std::string, LegacyAttribute> values;
};

namespace {

aclError remember(aclopAttr* attributes, const char* name, LegacyAttribute value) {
  attributes->values[name] = std::move(value);
  return ACL_SUCCESS;
}

template <typename Buffer, typename Description>
std::vector<LegacyTensor> gathered(int count, Description* const descriptions[], Buffer* const buffers[]) {
  std::vector<LegacyTensor> found;
  for (int place = 0; place < count; ++place) {
    found.push_back({descriptions[place]->dtype, descriptions[place]->sizes, buffers[place]->data});
  }
  return found;
}

aclError execute(const LegacyCall& call, aclrtStream stream) {
  static const auto entry = reinterpret_cast<LegacyEntry>(dlsym(dlopen("libopapi.so", RTLD_NOW), kLegacyEntry));
  const int status = stream_drain(stream);
  if (status != 0) return status;
  std::string error;
  const LegacyAnswer answer = entry == nullptr ? LegacyAnswer::kUnknown : entry(call, &error);
  if (answer == LegacyAnswer::kDone) return ACL_SUCCESS;
  if (answer == LegacyAnswer::kUnknown) {
    error = "the NPU simulator of llm_adapt does not model the GE operator " + call.name;
  }
  launch_failed(error);
  return fail(ACL_ERROR_OP_NOT_FOUND, error);
}

}  // namespace

extern "C" {

NPUSIM_EXPORT aclTensorDesc* aclCreateTensorDesc(aclDataType dtype, int rank, const int64_t* sizes, aclFormat format) {
  return new aclTensorDesc{dtype, std::vector<int64_t>(sizes, sizes + rank), format};
}
NPUSIM_EXPORT void aclDestroyTensorDesc(const aclTensorDesc* description) { delete description; }
NPUSIM_EXPORT aclDataBuffer* aclCreateDataBuffer(void* data, size_t bytes) { return new aclDataBuffer{data, bytes}; }
NPUSIM_EXPORT aclError aclDestroyDataBuffer(const aclDataBuffer* buffer) { return delete buffer, ACL_SUCCESS; }
NPUSIM_EXPORT void aclSetTensorDescName(aclTensorDesc*, const char*) {}
NPUSIM_EXPORT aclError aclSetTensorFormat(aclTensorDesc*, aclFormat) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclSetTensorShape(aclTensorDesc*, int, const int64_t*) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclSetTensorPlaceMent(aclTensorDesc*, aclMemType) { return ACL_SUCCESS; }

NPUSIM_EXPORT aclDataType aclGetTensorDescType(const aclTensorDesc* description) { return description->dtype; }
NPUSIM_EXPORT aclFormat aclGetTensorDescFormat(const aclTensorDesc* description) { return description->format; }
NPUSIM_EXPORT size_t aclGetTensorDescNumDims(const aclTensorDesc* description) { return description->sizes.size(); }

NPUSIM_EXPORT aclError aclGetTensorDescDimV2(const aclTensorDesc* description, size_t index, int64_t* size) {
  *size = description->sizes.at(index);
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclopAttr* aclopCreateAttr() { return new aclopAttr; }
NPUSIM_EXPORT void aclopDestroyAttr(const aclopAttr* attributes) { delete attributes; }
NPUSIM_EXPORT aclError aclopSetAttrBool(aclopAttr* attributes, const char* name, uint8_t value) {
  return remember(attributes, name, value != 0);
}
NPUSIM_EXPORT aclError aclopSetAttrDataType(aclopAttr* attributes, const char* name, aclDataType value) {
  return remember(attributes, name, static_cast<int64_t>(value));
}
NPUSIM_EXPORT aclError aclopSetAttrFloat(aclopAttr* attributes, const char* name, float value) {
  return remember(attributes, name, static_cast<double>(value));
}
NPUSIM_EXPORT aclError aclopSetAttrInt(aclopAttr* attributes, const char* name, int64_t value) {
  return remember(attributes, name, value);
}
NPUSIM_EXPORT aclError aclopSetAttrString(aclopAttr* attributes, const char* name, const char* value) {
  return remember(attributes, name, std::string(value));
}
NPUSIM_EXPORT aclError aclopSetAttrListInt(aclopAttr* attributes, const char* name, int count, const int64_t* values) {
  return remember(attributes, name, std::vector<int64_t>(values, values + count));
}
// No operator that is modelled has a list of another type: theirs are not kept.
NPUSIM_EXPORT aclError aclopSetAttrListBool(aclopAttr*, const char*, int, const uint8_t*) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclopSetAttrListFloat(aclopAttr*, const char*, int, const float*) { return ACL_SUCCESS; }
NPUSIM_EXPORT aclError aclopSetAttrListListInt(aclopAttr*, const char*, int, const int*, const int64_t* const[]) {
  return ACL_SUCCESS;
}

NPUSIM_EXPORT aclError aclopCompileAndExecute(const char* name, int input_count, const aclTensorDesc* const inputs[],
                                              const aclDataBuffer* const input_data[], int output_count,
                                              const aclTensorDesc* const outputs[], aclDataBuffer* const output_data[],
                                              const aclopAttr* attributes, aclopEngineType, aclopCompileType,
                                              const char*, aclrtStream stream) {
  return execute({name, gathered(input_count, inputs, input_data), gathered(output_count, outputs, output_data),
                  attributes == nullptr ? std::map<std::string, LegacyAttribute>() : attributes->values},
                 stream);
}

NPUSIM_EXPORT aclError aclopCompileAndExecuteV2(const char* name, int input_count, aclTensorDesc* inputs[],
                                                aclDataBuffer* input_data[], int output_count, aclTensorDesc* outputs[],
                                                aclDataBuffer* output_data[], aclopAttr* attributes,
                                                aclopEngineType engine, aclopCompileType compile, const char* extra,
                                                aclrtStream stream) {
  return aclopCompileAndExecute(name, input_count, inputs, input_data, output_count, outputs, output_data, attributes,
                                engine, compile, extra, stream);
}

}  // extern "C"
