// The table of GE operators, and the entry point through which libascendcl.so calls them.
#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

using Function = std::function<void(const LegacyArguments&)>;

std::map<std::string, Function>& table() {
  static std::map<std::string, Function> operators;
  return operators;
}

Tensor on_host(const LegacyTensor& given) {
  return at::from_blob(given.data, at::IntArrayRef(given.sizes), scalar_type(given.dtype));
}

Tensors on_host(const std::vector<LegacyTensor>& given) {
  Tensors found;
  for (const LegacyTensor& one : given) found.push_back(on_host(one));
  return found;
}

void check_chip(const LegacyArguments& given) {
  for (const Tensor& tensor : given.inputs) check_no_bfloat16_on_older_chip(tensor, "an input");
  for (const Tensor& tensor : given.outputs) check_no_bfloat16_on_older_chip(tensor, "an output");
}

}  // namespace

LegacyOperator::LegacyOperator(const char* name, Function function) { table()[name] = std::move(function); }

}  // namespace llm_adapt::opapi

extern "C" NPUSIM_EXPORT llm_adapt::LegacyAnswer llm_adapt_legacy_operator(const llm_adapt::LegacyCall& call,
                                                                           std::string* error) {
  using namespace llm_adapt::opapi;
  const auto found = table().find(call.name);
  if (found == table().end()) return llm_adapt::LegacyAnswer::kUnknown;
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  try {
    const LegacyArguments given{on_host(call.inputs), on_host(call.outputs), call.attributes};
    check_chip(given);
    found->second(given);
  } catch (const std::exception& problem) {
    const std::string text = problem.what();
    *error = call.name + ": " + text.substr(0, text.find("\nException raised"));
    return llm_adapt::LegacyAnswer::kFailed;
  }
  return llm_adapt::LegacyAnswer::kDone;
}
