// Which reductions and dtypes RCCL has: those of torch's ProcessGroupNCCL. Its limits on float8 and on reductions in
// DTK are not public, so that both raise where torch's own rules for other devices say nothing either.
#include "rccl.h"

#include "operators.h"
#include "process_group.h"

namespace llm_adapt::dcu {

namespace {

using c10d::ReduceOp;

class ProcessGroupNCCL final : public host::ProcessGroup {
 public:
  // How many thread blocks a communicator takes: accepted, since it changes no result.
  struct Config {
    int blocking = 1;
    int cga_cluster_size = 0;
    int min_ctas = 0;
    int max_ctas = 0;
  };

  struct Options : c10d::Backend::Options {
    explicit Options(bool is_high_priority)
        : c10d::Backend::Options("nccl", kBackendDefaultTimeout), is_high_priority_stream(is_high_priority) {}

    bool is_high_priority_stream;
    Config config;
  };

  ProcessGroupNCCL(c10::intrusive_ptr<c10d::Backend> gloo, c10::intrusive_ptr<Options> options)
      : host::ProcessGroup(device(), "nccl", std::move(gloo)), options_(std::move(options)) {}

  c10::intrusive_ptr<c10d::Backend::Options> getBackendOptions() override {
    return options_;
  }

  host::WorkPtr recvAnysource(host::Tensors& /*tensors*/, int /*tag*/) override {
    TORCH_CHECK_NOT_IMPLEMENTED(false, "ProcessGroupNCCL does not support recvAnysource: name the sending rank.");
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
      case at::kDouble:
        return dtype;
      case at::kBool:
        return at::kByte;
      default:
        TORCH_CHECK_TYPE(
            false, "Unconvertible NCCL type ", dtype, ": it was given to a collective of RCCL. Cast it, or view "
            "float8 as uint8 to move it.");
    }
  }

  ReduceOp reduction(const ReduceOp& asked, at::ScalarType dtype) const override {
    switch (asked) {
      case ReduceOp::SUM:
        return dtype == at::kBool ? ReduceOp::MAX : ReduceOp::SUM;  // so that 1 + 1 is true
      case ReduceOp::AVG:
        TORCH_CHECK_TYPE(dtype != at::kBool, "Cannot use ReduceOp.AVG with Boolean inputs");
        return asked;
      case ReduceOp::MIN:
      case ReduceOp::MAX:
      case ReduceOp::PRODUCT:
        return asked;
      case ReduceOp::PREMUL_SUM:
        TORCH_CHECK_NOT_IMPLEMENTED(false, "ReduceOp.PREMUL_SUM: whether RCCL of DTK has it is not public.");
      default:
        TORCH_CHECK_VALUE(false, "Cannot use ReduceOp.BAND, BOR or BXOR with NCCL");
    }
  }

 private:
  c10::intrusive_ptr<Options> options_;
};

namespace py = pybind11;

// torch makes it of a store, a rank, a size and options; gloo wants the timeout of them.
c10::intrusive_ptr<ProcessGroupNCCL> make_group(
    const py::object& store, int rank, int size, c10::intrusive_ptr<ProcessGroupNCCL::Options> options) {
  const py::module_ c10d_names = py::module_::import("torch._C._distributed_c10d");
  const py::object timeout = py::cast(options).attr("_timeout");
  const py::object gloo = c10d_names.attr("ProcessGroupGloo")(store, rank, size, timeout);
  return c10::make_intrusive<ProcessGroupNCCL>(gloo.cast<c10::intrusive_ptr<c10d::Backend>>(), std::move(options));
}

}  // namespace

void bind_rccl(py::module_& module) {
  using Config = ProcessGroupNCCL::Config;
  using Options = ProcessGroupNCCL::Options;
  py::class_<ProcessGroupNCCL, c10d::Backend, c10::intrusive_ptr<ProcessGroupNCCL>> group(module, "ProcessGroupNCCL");
  py::class_<Config>(group, "NCCLConfig")
      .def(py::init<>())
      .def_readwrite("blocking", &Config::blocking)
      .def_readwrite("cga_cluster_size", &Config::cga_cluster_size)
      .def_readwrite("min_ctas", &Config::min_ctas)
      .def_readwrite("max_ctas", &Config::max_ctas);
  py::class_<Options, c10d::Backend::Options, c10::intrusive_ptr<Options>>(group, "Options")
      .def(py::init<bool>(), py::arg("is_high_priority_stream") = false)
      .def_readwrite("is_high_priority_stream", &Options::is_high_priority_stream)
      .def_readwrite("config", &Options::config);
  group
      .def(py::init(&make_group), py::arg("store"), py::arg("rank"), py::arg("size"), py::arg("options"))
      .def_property_readonly("uid", &c10d::Backend::getID);
}

}  // namespace llm_adapt::dcu
