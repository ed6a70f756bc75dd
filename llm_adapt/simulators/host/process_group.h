// Collectives of a simulated device: torch's gloo on the bytes of the device's tensors.
//
// A vendor's library says in a subclass which reductions and dtypes it has. Not for speed: lists that gloo lacks go
// through one flat buffer.
#pragma once
#include <torch/csrc/distributed/c10d/Backend.hpp>

#include <string>
#include <vector>

#include "device.h"

namespace llm_adapt::host {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using Tensors = std::vector<at::Tensor>;

class ProcessGroup : public c10d::Backend {
 public:
  ProcessGroup(HostDevice& device, std::string name, c10::intrusive_ptr<c10d::Backend> gloo)
      : Backend(gloo->getRank(), gloo->getSize()), device_(device), name_(std::move(name)), gloo_(std::move(gloo)) {}

  const std::string getBackendName() const override { return name_; }
  bool supportsCoalescing() const override { return true; }
  void startCoalescing() override;
  WorkPtr endCoalescing() override;
  void setSequenceNumberForGroup() override { gloo_->setSequenceNumberForGroup(); }
  uint64_t getSequenceNumberForGroup() override { return gloo_->getSequenceNumberForGroup(); }
  void setTimeout(std::chrono::milliseconds timeout) override { gloo_->setTimeout(timeout); }

  WorkPtr broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) override;
  WorkPtr allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) override;
  WorkPtr allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) override;
  WorkPtr reduce(Tensors& tensors, const c10d::ReduceOptions& options) override;
  WorkPtr allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) override;
  WorkPtr _allgather_base(at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& options) override;
  WorkPtr allgather_into_tensor_coalesced(
      Tensors& to, Tensors& from, const c10d::AllgatherOptions& options) override;
  WorkPtr gather(std::vector<Tensors>& to, Tensors& from, const c10d::GatherOptions& options) override;
  WorkPtr scatter(Tensors& to, std::vector<Tensors>& from, const c10d::ScatterOptions& options) override;
  WorkPtr reduce_scatter(
      Tensors& to, std::vector<Tensors>& from, const c10d::ReduceScatterOptions& options) override;
  WorkPtr _reduce_scatter_base(
      at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& options) override;
  WorkPtr reduce_scatter_tensor_coalesced(
      Tensors& to, Tensors& from, const c10d::ReduceScatterOptions& options) override;
  WorkPtr alltoall_base(
      at::Tensor& to, at::Tensor& from, std::vector<int64_t>& to_sizes, std::vector<int64_t>& from_sizes,
      const c10d::AllToAllOptions& options) override;
  WorkPtr alltoall(Tensors& to, Tensors& from, const c10d::AllToAllOptions& options) override;
  WorkPtr send(Tensors& tensors, int to, int tag) override;
  WorkPtr recv(Tensors& tensors, int from, int tag) override;
  WorkPtr barrier(const c10d::BarrierOptions& options) override;

 protected:
  // The dtype that travels for `dtype`; throws for what the library does not carry.
  virtual at::ScalarType wire_dtype(at::ScalarType dtype) const = 0;
  // What the library makes of a reduction of this dtype; throws for what it lacks. AVG is divided here.
  virtual c10d::ReduceOp reduction(const c10d::ReduceOp& asked, at::ScalarType dtype) const = 0;

 private:
  class Wire;

  WorkPtr launch(std::vector<WorkPtr> parts, Tensors results, Wire& wire);
  template <typename Asked>
  Asked reduced(const Asked& options, const at::Tensor& tensor, Wire& wire, Tensors written) const;

  HostDevice& device_;
  std::string name_;
  c10::intrusive_ptr<c10d::Backend> gloo_;
  bool is_coalescing_ = false;
  std::vector<WorkPtr> coalesced_;
};

}  // namespace llm_adapt::host
