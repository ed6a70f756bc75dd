// Copies of the older way, which chips with jit_compile take: casts, and the operators that make views contiguous.
//
// Source: op-plugin 517f2e7d CastKernelNpu, ViewcopyKernelNpu, AsStridedKernelNpu, TransposeKernelNpu, SliceKernelNpu,
// IndexingKernelNpu, BroadcastKernelNpu.
#include "opapi_legacy.h"

namespace llm_adapt::opapi {
namespace {

// An argument that is a small tensor of whole numbers.
std::vector<int64_t> numbers(const Tensor& given) {
  const Tensor listed = given.to(at::kLong).contiguous();
  return {listed.data_ptr<int64_t>(), listed.data_ptr<int64_t>() + listed.numel()};
}

// The memory of `base`, seen with other sizes and strides.
Tensor seen(const Tensor& base, const Tensor& sizes, const Tensor& strides, const Tensor& offset) {
  char* start = static_cast<char*>(base.data_ptr()) + numbers(offset).at(0) * base.element_size();
  return at::from_blob(start, numbers(sizes), numbers(strides), base.scalar_type());
}

const LegacyOperator cast("Cast", [](const LegacyArguments& given) {
  const at::ScalarType asked = scalar_type(static_cast<int>(given.attribute<int64_t>("dst_type")));
  const Tensor& output = given.outputs[0];
  check(asked == output.scalar_type(), asked, " was asked of an output of ", output.scalar_type());
  store(output, given.inputs[0].to(asked));
});

const LegacyOperator identity("Identity", [](const LegacyArguments& given) {
  store(given.outputs[0], given.inputs[0]);
});

// Inputs: target, its sizes, strides and offset, then the same of the source. The target is the output too.
const LegacyOperator view_copy("ViewCopy", [](const LegacyArguments& given) {
  const Tensors& in = given.inputs;
  seen(in[0], in[1], in[2], in[3]).copy_(seen(in[4], in[5], in[6], in[7]));
});

const LegacyOperator as_strided("AsStrided", [](const LegacyArguments& given) {
  const Tensors& in = given.inputs;
  store(given.outputs[0], seen(in[0], in[1], in[2], in[3]));
});

const LegacyOperator broadcast("BroadcastTo", [](const LegacyArguments& given) {
  store(given.outputs[0], given.inputs[0].expand(numbers(given.inputs[1])));
});

const LegacyOperator transpose("Transpose", [](const LegacyArguments& given) {
  store(given.outputs[0], given.inputs[0].permute(numbers(given.inputs[1])));
});

// From each offset as many as the size says; -1 is all that follow.
const LegacyOperator slice("Slice", [](const LegacyArguments& given) {
  Tensor part = given.inputs[0];
  const auto offsets = numbers(given.inputs[1]), sizes = numbers(given.inputs[2]);
  for (int64_t axis = 0; axis < part.dim(); ++axis) {
    const int64_t size = sizes.at(axis) < 0 ? part.size(axis) - offsets.at(axis) : sizes.at(axis);
    part = part.narrow(axis, offsets.at(axis), size);
  }
  store(given.outputs[0], part);
});

// Begin, end and step for each axis; a bit of shrink_axis_mask drops that axis.
const LegacyOperator strided_slice("StridedSlice", [](const LegacyArguments& given) {
  for (const char* mask : {"begin_mask", "end_mask", "ellipsis_mask", "new_axis_mask"}) {
    check(given.attribute<int64_t>(mask) == 0, mask, " is not modelled, only 0");
  }
  const int64_t dropped = given.attribute<int64_t>("shrink_axis_mask");
  const auto begins = numbers(given.inputs[1]), ends = numbers(given.inputs[2]), steps = numbers(given.inputs[3]);
  Tensor part = given.inputs[0];
  for (int64_t axis = part.dim() - 1; axis >= 0; --axis) {
    const bool drops = (dropped >> axis) & 1;
    part = drops ? part.select(axis, begins.at(axis))
                 : part.slice(axis, begins.at(axis), ends.at(axis), steps.at(axis));
  }
  store(given.outputs[0], part);
});

}  // namespace
}  // namespace llm_adapt::opapi
