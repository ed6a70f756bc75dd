// CNCL: which reductions and dtypes it has (process_group_cncl.cpp of torch_mlu d578002).
#include <torch/csrc/utils/pybind.h>

#include "mlu.h"
#include "process_group.h"

namespace llm_adapt::mlu {
namespace {

using c10d::ReduceOp;

const char* spell(const ReduceOp& op) {
  switch (op) {
    case ReduceOp::AVG:
      return "AVG";
    case ReduceOp::BAND:
      return "BAND";
    case ReduceOp::BOR:
      return "BOR";
    case ReduceOp::BXOR:
      return "BXOR";
    default:
      return "PREMUL_SUM";
  }
}

class ProcessGroupCNCL final : public host::ProcessGroup {
 public:
  explicit ProcessGroupCNCL(c10::intrusive_ptr<c10d::Backend> gloo)
      : host::ProcessGroup(device(), "cncl", std::move(gloo)) {}

  host::WorkPtr allgather_coalesced(
      std::vector<host::Tensors>& to, host::Tensors& from, const c10d::AllgatherOptions& options) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "ProcessGroupCNCL does not support allgather_coalesced: Not supported yet");
  }
  host::WorkPtr recvAnysource(host::Tensors& tensors, int tag) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "ProcessGroupCNCL does not support recvAnysource: name the sending rank");
  }
  // A handle for torch_mlu_ops; it stands for the group and for nothing else.
  int64_t get_cncl_comm(int rank) const {
    TORCH_CHECK_VALUE(rank == getRank(), "get_cncl_comm takes this rank, ", getRank(), "; ", rank, " was given.");
    return getID();
  }

 protected:
  at::ScalarType wire_dtype(at::ScalarType dtype) const override {
    switch (dtype) {
      case at::kChar:
      case at::kByte:
      case at::kInt:
      case at::kLong:
      case at::kHalf:
      case at::kBFloat16:
      case at::kFloat:
        return dtype;
      case at::kBool:
        return at::kByte;
      case at::kDouble:
        return at::kFloat;
      default:
        TORCH_CHECK_TYPE(
            false, "Input tensor data type is not supported for CNCL process group: ", dtype,
            ". Cast it, or view float8 as uint8 to move it.");
    }
  }

  ReduceOp reduction(const ReduceOp& asked, at::ScalarType dtype) const override {
    switch (asked) {
      case ReduceOp::SUM:
        return dtype == at::kBool ? ReduceOp::MAX : ReduceOp::SUM;
      case ReduceOp::MIN:
      case ReduceOp::MAX:
      case ReduceOp::PRODUCT:
        return asked;
      default:
        TORCH_CHECK_VALUE(false, "Cannot use ReduceOp.", spell(asked), " with CNCL");
    }
  }
};

}  // namespace

void bind_cncl(pybind11::module_& module) {
  namespace py = pybind11;
  py::module_::import("torch.distributed");
  py::class_<ProcessGroupCNCL, c10d::Backend, c10::intrusive_ptr<ProcessGroupCNCL>>(module, "ProcessGroupCNCL")
      .def(py::init<c10::intrusive_ptr<c10d::Backend>>(), py::arg("gloo"))
      .def("get_cncl_comm", &ProcessGroupCNCL::get_cncl_comm, py::arg("rank"));
}

}  // namespace llm_adapt::mlu
