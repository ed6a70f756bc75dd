// Collective work in flight on a simulated device: gloo's works on the same bytes, and what is left to do after them.
#pragma once
#include <torch/csrc/distributed/c10d/Work.hpp>

#include <atomic>
#include <functional>
#include <mutex>
#include <vector>

#include "device.h"

namespace llm_adapt::host {

using WorkPtr = c10::intrusive_ptr<c10d::Work>;
using Finish = std::function<void()>;

class HostWork final : public c10d::Work {
 public:
  // `results` is the value of the future; `finish` runs once, after all parts.
  HostWork(std::vector<WorkPtr> parts, std::vector<at::Tensor> results, std::vector<Finish> finish)
      : parts_(std::move(parts)), results_(std::move(results)), finish_(std::move(finish)) {}

  bool isCompleted() override;
  bool isSuccess() const override;
  bool wait(std::chrono::milliseconds timeout) override;
  void synchronize() override { wait(kNoTimeout); }
  std::vector<at::Tensor> result() override { return results_; }
  c10::intrusive_ptr<c10::ivalue::Future> getFuture() override;

 private:
  void finish_once();
  c10::intrusive_ptr<c10::ivalue::Future> make_future();

  std::vector<WorkPtr> parts_;
  std::vector<at::Tensor> results_;
  std::vector<Finish> finish_;
  std::once_flag finished_;
  std::atomic<bool> is_done_{false};
  std::once_flag future_made_;
  c10::intrusive_ptr<c10::ivalue::Future> future_;
};

inline void HostWork::finish_once() {
  std::call_once(finished_, [this] {
    at::AutoDispatchBelowADInplaceOrView below_autograd;
    for (const Finish& act : finish_) {
      act();
    }
  });
}

inline bool HostWork::isCompleted() {
  if (is_done_) {
    return true;
  }
  for (const WorkPtr& part : parts_) {
    if (!part->isCompleted()) {
      return false;
    }
  }
  if (isSuccess()) {
    finish_once();
  }
  return true;
}

inline bool HostWork::isSuccess() const {
  for (const WorkPtr& part : parts_) {
    if (!part->isSuccess()) {
      return false;
    }
  }
  return true;
}

inline bool HostWork::wait(std::chrono::milliseconds timeout) {
  for (const WorkPtr& part : parts_) {
    part->wait(timeout);
  }
  finish_once();
  return true;
}

inline c10::intrusive_ptr<c10::ivalue::Future> HostWork::getFuture() {
  std::call_once(future_made_, [this] { future_ = make_future(); });
  return future_;
}

inline c10::intrusive_ptr<c10::ivalue::Future> HostWork::make_future() {
  std::vector<c10::Device> devices;
  for (const at::Tensor& tensor : results_) {
    if (!tensor.device().is_cpu() && devices.empty()) {
      devices.push_back(tensor.device());
    }
  }
  auto type = c10::ListType::create(c10::TensorType::get());
  auto future = c10::make_intrusive<c10::ivalue::Future>(type, std::move(devices));
  auto left = std::make_shared<std::atomic<size_t>>(parts_.size());
  auto self = c10::intrusive_ptr<HostWork>::reclaim_copy(this);
  for (const WorkPtr& part : parts_) {
    part->getFuture()->addCallback([self, future, left](c10::ivalue::Future& done) {
      if (done.hasError()) {
        future->setErrorIfNeeded(done.exception_ptr());
      } else if (--*left == 0) {
        self->finish_once();
        self->is_done_ = true;  // gloo's own flag is set a moment after its future
        future->markCompleted(c10::IValue(self->results_));
      }
    });
  }
  return future;
}

}  // namespace llm_adapt::host
