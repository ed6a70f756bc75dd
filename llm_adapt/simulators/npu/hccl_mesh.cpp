// All connections of one rank of a communicator.
#include "hccl_mesh.h"

#include <errno.h>
#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "hccl_parts.h"

namespace llm_adapt::hccl {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kLongestPollMs = 60'000;

}  // namespace

Mesh::Mesh(std::vector<std::unique_ptr<Link>> links, int rank, double exec_timeout_s)
    : links_(std::move(links)), rank_(rank), exec_timeout_s_(exec_timeout_s), cancel_event_(eventfd(0, EFD_CLOEXEC)) {}

Mesh::~Mesh() { close(cancel_event_); }

void Mesh::begin(const Call& call) {
  call_ = call;
  phase_ = 0;
  started_ = Clock::now();
}

void Mesh::exchange(const Call& call, const std::vector<Transfer>& transfers) {
  std::vector<std::unique_ptr<Part>> parts;
  for (auto& link : links_) {
    if (link) {
      parts.push_back(std::make_unique<CollectivePart>(*link, rank_, call, phase_, transfers[link->peer()]));
    }
  }
  ++phase_;
  run(parts);
}

void Mesh::pass_messages(const std::vector<Message>& messages) {
  std::vector<std::vector<Message>> sends(size());
  std::vector<std::vector<Message>> receives(size());
  for (const Message& message : messages) {
    (message.is_send ? sends : receives)[message.peer].push_back(message);
  }
  for (size_t i = 0; i < sends[rank_].size(); ++i) {
    std::memmove(receives[rank_][i].data, sends[rank_][i].data, sends[rank_][i].bytes());
  }
  std::vector<std::unique_ptr<Part>> parts;
  for (auto& link : links_) {
    if (link && !(sends[link->peer()].empty() && receives[link->peer()].empty())) {
      parts.push_back(std::make_unique<MessagesPart>(*link, rank_, sends[link->peer()], receives[link->peer()]));
    }
  }
  run(parts);
}

void Mesh::run(const std::vector<std::unique_ptr<Part>>& parts) {
  while (true) {
    bool moved = false;
    bool finished = true;
    for (auto& part : parts) {
      if (!part->done()) {
        moved = part->advance() || moved;
        finished = finished && part->done();
      }
    }
    if (finished) {
      return;
    }
    if (!moved) {
      wait(parts);
    }
  }
}

void Mesh::wait(const std::vector<std::unique_ptr<Part>>& parts) {
  std::vector<pollfd> ready{{cancel_event_, POLLIN, 0}};
  for (auto& part : parts) {
    if (!part->done()) {
      short wanted = part->link().has_unwritten() ? POLLIN | POLLOUT : POLLIN;
      ready.push_back({part->link().socket(), wanted, 0});
    }
  }
  int timeout_ms = kLongestPollMs;
  if (exec_timeout_s_ > 0) {
    std::chrono::duration<double> spent = Clock::now() - started_;
    double left_s = exec_timeout_s_ - spent.count();
    if (left_s <= 0) {
      time_out(parts);
    }
    timeout_ms = static_cast<int>(std::min<double>(left_s * 1000 + 1, kLongestPollMs));
  }
  int found = poll(ready.data(), ready.size(), timeout_ms);
  if (found < 0 && errno != EINTR) {
    throw Failure(HCCL_E_SYSCALL, std::string("waiting for the other ranks: ") + std::strerror(errno));
  }
  if (ready[0].revents != 0) {
    throw Failure(HCCL_E_UNAVAIL, "the communicator was destroyed during this call");
  }
}

void Mesh::time_out(const std::vector<std::unique_ptr<Part>>& parts) const {
  char seconds[32];
  std::snprintf(seconds, sizeof(seconds), "%g", exec_timeout_s_);
  std::string text = std::string("it waited ") + seconds + " s (HCCL_EXEC_TIMEOUT)";
  for (auto& part : parts) {
    if (!part->done()) {
      text += "; " + part->missing();
    }
  }
  throw Failure(HCCL_E_TIMEOUT, text);
}

void Mesh::give_up(const std::string& reason) {
  for (auto& link : links_) {
    if (link) {
      link->give_up(reason);
    }
  }
}

void Mesh::cancel() {
  uint64_t one = 1;
  if (write(cancel_event_, &one, sizeof(one)) != sizeof(one)) {
    std::perror("llm_adapt: a communicator could not be cancelled");
  }
}

uint64_t Mesh::bytes_out() const {
  uint64_t total = 0;
  for (auto& link : links_) {
    total += link ? link->bytes_out : 0;
  }
  return total;
}

uint64_t Mesh::bytes_in() const {
  uint64_t total = 0;
  for (auto& link : links_) {
    total += link ? link->bytes_in : 0;
  }
  return total;
}

char* Mesh::scratch(size_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_.reset(new char[bytes]);
    scratch_bytes_ = bytes;
  }
  return scratch_.get();
}

}  // namespace llm_adapt::hccl
