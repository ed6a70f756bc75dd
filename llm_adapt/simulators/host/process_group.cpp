#include "process_group.h"

#include <ATen/ATen.h>

#include "mirror.h"
#include "work.h"

namespace llm_adapt::host {

// Tensors of one collective as gloo takes them, and what must be copied back once it is done.
class ProcessGroup::Wire {
 public:
  explicit Wire(const ProcessGroup& group) : group_(group) {}

  at::Tensor read(const at::Tensor& tensor) { return convert(tensor, false); }
  at::Tensor write(const at::Tensor& tensor) { return convert(tensor, true); }
  Tensors read(const Tensors& tensors) { return convert(tensors, false); }
  Tensors write(const Tensors& tensors) { return convert(tensors, true); }
  // Run after the transfer; the last added runs first, so that temporaries go home in the end.
  void after(Finish act) { finish_.insert(finish_.begin(), std::move(act)); }
  std::vector<Finish> take() { return std::move(finish_); }

 private:
  at::Tensor convert(const at::Tensor& tensor, bool is_written);
  Tensors convert(const Tensors& tensors, bool is_written);

  const ProcessGroup& group_;
  std::vector<Finish> finish_;
};

at::Tensor ProcessGroup::Wire::convert(const at::Tensor& tensor, bool is_written) {
  TORCH_CHECK(
      group_.device_.owns(tensor), "Backend ", group_.name_, " takes tensors on ", group_.device_.name(),
      "; it was given one on ", tensor.device(), ".");
  TORCH_CHECK(
      tensor.is_contiguous(), "Tensors must be contiguous: backend ", group_.name_, " was given sizes ",
      tensor.sizes(), " with strides ", tensor.strides(), ".");
  const at::ScalarType dtype = group_.wire_dtype(tensor.scalar_type());
  at::Tensor on_host = host_alias(tensor);
  if (dtype == tensor.scalar_type()) {
    return on_host;
  }
  if (c10::elementSize(dtype) == c10::elementSize(tensor.scalar_type())) {
    return on_host.view(dtype);
  }
  at::Tensor travelling = on_host.to(dtype);
  if (is_written) {
    finish_.push_back([on_host, travelling] { on_host.copy_(travelling); });
  }
  return travelling;
}

Tensors ProcessGroup::Wire::convert(const Tensors& tensors, bool is_written) {
  Tensors converted;
  for (const at::Tensor& tensor : tensors) {
    converted.push_back(convert(tensor, is_written));
  }
  return converted;
}

namespace {

Tensors flat(const std::vector<Tensors>& lists) {
  Tensors all;
  for (const Tensors& list : lists) {
    all.insert(all.end(), list.begin(), list.end());
  }
  return all;
}

at::Tensor packed(const Tensors& tensors, std::vector<int64_t>* sizes) {
  Tensors rows;
  for (const at::Tensor& tensor : tensors) {
    rows.push_back(tensor.reshape({-1}));
    sizes->push_back(tensor.numel());
  }
  return at::cat(rows);
}

void unpack(const at::Tensor& from, const Tensors& to) {
  int64_t start = 0;
  for (const at::Tensor& tensor : to) {
    tensor.copy_(from.narrow(0, start, tensor.numel()).view(tensor.sizes()));
    start += tensor.numel();
  }
}

}  // namespace

WorkPtr ProcessGroup::launch(std::vector<WorkPtr> parts, Tensors results, Wire& wire) {
  auto work = c10::make_intrusive<HostWork>(std::move(parts), std::move(results), wire.take());
  if (is_coalescing_) {
    coalesced_.push_back(work);
  }
  return work;
}

void ProcessGroup::startCoalescing() {
  TORCH_CHECK(!is_coalescing_, "Coalescing on backend ", name_, " has begun already.");
  is_coalescing_ = true;
}

WorkPtr ProcessGroup::endCoalescing() {
  TORCH_CHECK(is_coalescing_, "Coalescing on backend ", name_, " has not begun.");
  is_coalescing_ = false;
  Tensors results;
  for (const WorkPtr& work : coalesced_) {
    const Tensors more = work->result();
    results.insert(results.end(), more.begin(), more.end());
  }
  return c10::make_intrusive<HostWork>(std::exchange(coalesced_, {}), std::move(results), std::vector<Finish>());
}

// The options with gloo's reduction; `written` is divided afterwards where the average was asked.
template <typename Asked>
Asked ProcessGroup::reduced(const Asked& options, const at::Tensor& tensor, Wire& wire, Tensors written) const {
  Asked ours = options;
  ours.reduceOp = reduction(options.reduceOp, tensor.scalar_type());
  if (ours.reduceOp == c10d::ReduceOp::AVG) {
    ours.reduceOp = c10d::ReduceOp::SUM;
    wire.after([written, ranks = size_] {
      for (const at::Tensor& sum : written) {
        at::isIntegralType(sum.scalar_type(), true) ? sum.floor_divide_(ranks) : sum.div_(ranks);
      }
    });
  }
  return ours;
}

WorkPtr ProcessGroup::broadcast(Tensors& tensors, const c10d::BroadcastOptions& options) {
  Wire wire(*this);
  Tensors on_host = wire.write(tensors);
  return launch({gloo_->broadcast(on_host, options)}, tensors, wire);
}

WorkPtr ProcessGroup::allreduce(Tensors& tensors, const c10d::AllreduceOptions& options) {
  Wire wire(*this);
  Tensors on_host = wire.write(tensors);
  auto ours = reduced(options, tensors.at(0), wire, on_host);
  return launch({gloo_->allreduce(on_host, ours)}, tensors, wire);
}

WorkPtr ProcessGroup::allreduce_coalesced(Tensors& tensors, const c10d::AllreduceCoalescedOptions& options) {
  Wire wire(*this);
  std::vector<WorkPtr> parts;
  for (const at::Tensor& tensor : tensors) {
    Tensors on_host = {wire.write(tensor)};
    auto ours = reduced(static_cast<const c10d::AllreduceOptions&>(options), tensor, wire, on_host);
    parts.push_back(gloo_->allreduce(on_host, ours));
  }
  return launch(std::move(parts), tensors, wire);
}

WorkPtr ProcessGroup::reduce(Tensors& tensors, const c10d::ReduceOptions& options) {
  Wire wire(*this);
  Tensors on_host = wire.write(tensors);
  auto ours = reduced(options, tensors.at(0), wire, on_host);
  return launch({gloo_->reduce(on_host, ours)}, tensors, wire);
}

WorkPtr ProcessGroup::allgather(std::vector<Tensors>& to, Tensors& from, const c10d::AllgatherOptions& options) {
  Wire wire(*this);
  std::vector<Tensors> on_host;
  for (const Tensors& list : to) {
    on_host.push_back(wire.write(list));
  }
  Tensors sent = wire.read(from);
  return launch({gloo_->allgather(on_host, sent, options)}, flat(to), wire);
}

WorkPtr ProcessGroup::_allgather_base(at::Tensor& to, at::Tensor& from, const c10d::AllgatherOptions& options) {
  Wire wire(*this);
  at::Tensor on_host = wire.write(to);
  at::Tensor sent = wire.read(from);
  return launch({gloo_->_allgather_base(on_host, sent, options)}, {to}, wire);
}

WorkPtr ProcessGroup::allgather_into_tensor_coalesced(
    Tensors& to, Tensors& from, const c10d::AllgatherOptions& options) {
  Wire wire(*this);
  std::vector<WorkPtr> parts;
  for (size_t index = 0; index < to.size(); ++index) {
    at::Tensor on_host = wire.write(to[index]);
    at::Tensor sent = wire.read(from.at(index));
    parts.push_back(gloo_->_allgather_base(on_host, sent, options));
  }
  return launch(std::move(parts), to, wire);
}

WorkPtr ProcessGroup::gather(std::vector<Tensors>& to, Tensors& from, const c10d::GatherOptions& options) {
  Wire wire(*this);
  std::vector<Tensors> on_host;
  for (const Tensors& list : to) {
    on_host.push_back(wire.write(list));
  }
  Tensors sent = wire.read(from);
  return launch({gloo_->gather(on_host, sent, options)}, flat(to), wire);
}

WorkPtr ProcessGroup::scatter(Tensors& to, std::vector<Tensors>& from, const c10d::ScatterOptions& options) {
  Wire wire(*this);
  Tensors on_host = wire.write(to);
  std::vector<Tensors> sent;
  for (const Tensors& list : from) {
    sent.push_back(wire.read(list));
  }
  return launch({gloo_->scatter(on_host, sent, options)}, to, wire);
}

WorkPtr ProcessGroup::reduce_scatter(
    Tensors& to, std::vector<Tensors>& from, const c10d::ReduceScatterOptions& options) {
  Wire wire(*this);
  at::Tensor on_host = wire.write(to.at(0));
  std::vector<int64_t> sizes;
  at::Tensor sent = packed(wire.read(from.at(0)), &sizes);
  for (int64_t size : sizes) {
    TORCH_CHECK_VALUE(size == on_host.numel(), "reduce_scatter on ", name_, " takes tensors of one size.");
  }
  at::Tensor received = at::empty({on_host.numel()}, on_host.options());
  wire.after([on_host, received] { on_host.copy_(received.view(on_host.sizes())); });
  auto ours = reduced(options, to[0], wire, {received});
  return launch({gloo_->_reduce_scatter_base(received, sent, ours)}, to, wire);
}

WorkPtr ProcessGroup::_reduce_scatter_base(
    at::Tensor& to, at::Tensor& from, const c10d::ReduceScatterOptions& options) {
  Wire wire(*this);
  at::Tensor on_host = wire.write(to);
  at::Tensor sent = wire.read(from).clone();  // gloo reduces in the input
  auto ours = reduced(options, to, wire, {on_host});
  return launch({gloo_->_reduce_scatter_base(on_host, sent, ours)}, {to}, wire);
}

WorkPtr ProcessGroup::reduce_scatter_tensor_coalesced(
    Tensors& to, Tensors& from, const c10d::ReduceScatterOptions& options) {
  Wire wire(*this);
  std::vector<WorkPtr> parts;
  for (size_t index = 0; index < to.size(); ++index) {
    at::Tensor on_host = wire.write(to[index]);
    at::Tensor sent = wire.read(from.at(index)).clone();
    auto ours = reduced(options, to[index], wire, {on_host});
    parts.push_back(gloo_->_reduce_scatter_base(on_host, sent, ours));
  }
  return launch(std::move(parts), to, wire);
}

WorkPtr ProcessGroup::alltoall_base(
    at::Tensor& to, at::Tensor& from, std::vector<int64_t>& to_sizes, std::vector<int64_t>& from_sizes,
    const c10d::AllToAllOptions& options) {
  Wire wire(*this);
  at::Tensor on_host = wire.write(to);
  at::Tensor sent = wire.read(from);
  return launch({gloo_->alltoall_base(on_host, sent, to_sizes, from_sizes, options)}, {to}, wire);
}

WorkPtr ProcessGroup::alltoall(Tensors& to, Tensors& from, const c10d::AllToAllOptions& options) {
  Wire wire(*this);
  const Tensors on_host = wire.write(to);
  std::vector<int64_t> to_sizes;
  std::vector<int64_t> from_sizes;
  at::Tensor received = at::empty_like(packed(on_host, &to_sizes));
  at::Tensor sent = packed(wire.read(from), &from_sizes);
  wire.after([received, on_host] { unpack(received, on_host); });
  return launch({gloo_->alltoall_base(received, sent, to_sizes, from_sizes, options)}, to, wire);
}

WorkPtr ProcessGroup::send(Tensors& tensors, int to, int tag) {
  Wire wire(*this);
  Tensors on_host = wire.read(tensors);
  return launch({gloo_->send(on_host, to, tag)}, tensors, wire);
}

WorkPtr ProcessGroup::recv(Tensors& tensors, int from, int tag) {
  Wire wire(*this);
  Tensors on_host = wire.write(tensors);
  return launch({gloo_->recv(on_host, from, tag)}, tensors, wire);
}

WorkPtr ProcessGroup::barrier(const c10d::BarrierOptions& options) {
  Wire wire(*this);
  return launch({gloo_->barrier(options)}, {}, wire);
}

}  // namespace llm_adapt::host
