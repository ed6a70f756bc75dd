// How an aclnn entry point of the emulated libopapi.so is written.
//
// CANN calls an operator in two phases: aclnnXGetWorkspaceSize(arguments..., &workspace_size, &executor) checks the
// arguments, and aclnnX(workspace, size, executor, stream) launches it. The arguments may be gone by then, so the
// first phase copies them (tensors keep only the address of their data, which the stream order keeps alive).
//
//     void rms_norm(Tensor x, Tensor gamma, double epsilon, Tensor y, Tensor rstd) { ... y.copy_(...); }
//     ACLNN(aclnnRmsNorm, rms_norm,
//           (const aclTensor* x, const aclTensor* gamma, double epsilon, const aclTensor* y, const aclTensor* rstd),
//           x, gamma, epsilon, y, rstd)
//
// `check(condition, text...)` in a function given by ACLNN_CHECKED runs in the first phase, where CANN refuses bad
// arguments; an exception in the function itself is an error of the launch.
#pragma once
#include <functional>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <vector>

#include "cann.h"

struct aclTensor {
  at::Tensor tensor;
  int format;
  std::vector<int64_t> storage_shape;
};
struct aclScalar {
  at::Scalar scalar;
};
struct aclIntArray {
  std::vector<int64_t> values;
};
struct aclFloatArray {
  std::vector<float> values;
};
struct aclBoolArray {
  std::vector<bool> values;
};
struct aclTensorList {
  std::vector<aclTensor*> tensors;
};
struct aclScalarList {
  std::vector<aclScalar*> scalars;
};
struct aclOpExecutor {
  const char* name;
  std::function<void()> run;
};

namespace llm_adapt::opapi {

using at::Tensor;
using Tensors = std::vector<Tensor>;
using Ints = std::optional<std::vector<int64_t>>;  // absent = a null pointer was given

constexpr int kParameterInvalid = 161002;  // ACLNN_ERR_PARAM_INVALID
constexpr int kRuntimeError = 361001;      // ACLNN_ERR_RUNTIME_ERROR

at::ScalarType scalar_type(int acl_dtype);
int acl_dtype(at::ScalarType dtype);

// Copies of the arguments, in the types that kernels here are written with. A null tensor is an undefined Tensor.
inline Tensor value(const aclTensor* given) { return given == nullptr ? Tensor() : given->tensor; }
inline at::Scalar value(const aclScalar* given) { return given->scalar; }
Tensors value(const aclTensorList* given);  // empty for a null pointer
Ints value(const aclIntArray* given);
std::optional<std::vector<float>> value(const aclFloatArray* given);
std::optional<std::vector<bool>> value(const aclBoolArray* given);
inline std::string value(const char* given) { return given == nullptr ? "" : given; }
inline std::string value(char* given) { return given == nullptr ? "" : given; }
template <typename Number, std::enable_if_t<std::is_arithmetic_v<Number>, int> = 0>
Number value(Number given) { return given; }

int refused(const char* name, const std::string& text);  // first phase: remembers the text, returns kParameterInvalid
int launch(aclOpExecutor* executor, void* stream);        // second phase: waits for the stream, runs, frees

struct Refusal : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Refuse the call, as CANN's own check of the arguments does.
template <typename... Text>
void check(bool condition, const Text&... text) {
  if (condition) return;
  std::ostringstream out;
  (out << ... << text);
  throw Refusal(out.str());
}

template <typename Check, typename Function, typename... Given>
int prepare(const char* name, uint64_t* workspace, aclOpExecutor** executor, Check checks, Function function, Given... given) {
  auto arguments = std::make_tuple(value(given)...);
  try {
    std::apply(checks, arguments);
  } catch (const std::exception& error) {
    return refused(name, error.what());
  }
  *workspace = 0;
  *executor = new aclOpExecutor{name, [=] { std::apply(function, arguments); }};
  return 0;
}

struct NoCheck {
  template <typename... Any>
  void operator()(const Any&...) const {}
};

// Compute in float32, in float64 where the tensor is.
inline Tensor wide(const Tensor& tensor) {
  if (!tensor.defined() || tensor.scalar_type() == at::kDouble) return tensor;
  return tensor.to(at::kFloat);
}

}  // namespace llm_adapt::opapi

#define ACLNN_UNPACK(...) __VA_ARGS__
#define ACLNN_CHECKED(NAME, CHECKS, FUNCTION, PARAMETERS, ...)                                                   \
  extern "C" NPUSIM_EXPORT int NAME##GetWorkspaceSize(ACLNN_UNPACK PARAMETERS, uint64_t* workspace_size_,        \
                                                      aclOpExecutor** executor_) {                               \
    return llm_adapt::opapi::prepare(#NAME, workspace_size_, executor_, CHECKS, FUNCTION, __VA_ARGS__);          \
  }                                                                                                              \
  extern "C" NPUSIM_EXPORT int NAME(void*, uint64_t, aclOpExecutor* executor_, void* stream_) {                  \
    return llm_adapt::opapi::launch(executor_, stream_);                                                         \
  }
#define ACLNN(NAME, FUNCTION, PARAMETERS, ...) \
  ACLNN_CHECKED(NAME, llm_adapt::opapi::NoCheck{}, FUNCTION, PARAMETERS, __VA_ARGS__)
