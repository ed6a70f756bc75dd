// How the ranks of a communicator find each other: Unix sockets in the abstract namespace, which leave no file.
//
// Each rank listens under "<token>.<rank>", connects to every lower rank and accepts every higher one. A connection
// waits in the listener's queue until it is accepted, so the order in which ranks arrive does not matter.
#include <utility>
#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <chrono>
#include <cstring>
#include <memory>
#include <thread>

#include "hccl_link.h"

namespace llm_adapt::hccl {
namespace {

using Clock = std::chrono::steady_clock;
constexpr auto kRetryEvery = std::chrono::milliseconds(2);

struct Hello {
  uint32_t magic = Frame::kMagic;
  int32_t rank = 0;
  int32_t size = 0;
};

class Socket {
 public:
  Socket() : value_(socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    if (value_ < 0) {
      throw Failure(HCCL_E_SYSCALL, std::string("no socket could be made: ") + std::strerror(errno));
    }
  }
  explicit Socket(int value) : value_(value) {}
  ~Socket() {
    if (value_ >= 0) {
      close(value_);
    }
  }
  Socket(const Socket&) = delete;
  Socket& operator=(const Socket&) = delete;
  int get() const { return value_; }
  int release() { return std::exchange(value_, -1); }

 private:
  int value_;
};

class Meeting {
 public:
  Meeting(const std::string& token, int rank, int size, double timeout_s)
      : token_(token), rank_(rank), size_(size), timeout_s_(timeout_s), links_(size) {
    deadline_ = Clock::now() + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(timeout_s));
  }

  std::vector<std::unique_ptr<Link>> run() {
    Socket listener;
    listen_on(listener.get());
    for (int peer = 0; peer < rank_; ++peer) {
      connect_to(peer);
    }
    for (int missing = size_ - 1 - rank_; missing > 0; --missing) {
      accept_one(listener.get());
    }
    return std::move(links_);
  }

 private:
  socklen_t address_of(int rank, sockaddr_un* address) const {
    std::string name = token_ + "." + std::to_string(rank);
    std::memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    // A leading zero byte is what makes the name abstract.
    std::memcpy(address->sun_path + 1, name.data(), std::min(name.size(), sizeof(address->sun_path) - 1));
    return offsetof(sockaddr_un, sun_path) + 1 + name.size();
  }

  void listen_on(int listener) {
    sockaddr_un address;
    socklen_t bytes = address_of(rank_, &address);
    bool listening = bind(listener, reinterpret_cast<sockaddr*>(&address), bytes) == 0 && listen(listener, size_) == 0;
    if (!listening) {
      std::string reason = errno == EADDRINUSE ? "another process is that rank already" : std::strerror(errno);
      throw Failure(HCCL_E_PARA, "rank " + std::to_string(rank_) + " of " + std::to_string(size_) +
                                     " was to join a communicator; " + reason);
    }
  }

  void connect_to(int peer) {
    sockaddr_un address;
    socklen_t bytes = address_of(peer, &address);
    Socket connection;
    while (connect(connection.get(), reinterpret_cast<sockaddr*>(&address), bytes) != 0) {
      if (errno != ECONNREFUSED && errno != EAGAIN && errno != EINTR) {
        throw Failure(HCCL_E_TCP_CONNECT, "connecting to rank " + std::to_string(peer) + ": " + std::strerror(errno));
      }
      if (Clock::now() > deadline_) {
        throw timed_out("rank " + std::to_string(peer) + " did not come");
      }
      std::this_thread::sleep_for(kRetryEvery);
    }
    Hello hello;
    hello.rank = rank_;
    hello.size = size_;
    if (send(connection.get(), &hello, sizeof(hello), MSG_NOSIGNAL) != sizeof(hello)) {
      throw Failure(HCCL_E_TCP_CONNECT, "rank " + std::to_string(peer) + " closed its connection during set-up");
    }
    links_[peer] = std::make_unique<Link>(connection.release(), peer);
  }

  void accept_one(int listener) {
    if (!readable(listener)) {
      throw timed_out("these ranks did not come:" + missing_ranks());
    }
    Socket connection(accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
    Hello hello;
    bool greeted = connection.get() >= 0 && readable(connection.get()) &&
                   recv(connection.get(), &hello, sizeof(hello), MSG_WAITALL) == sizeof(hello);
    if (!greeted || hello.magic != Frame::kMagic) {
      throw Failure(HCCL_E_TCP_CONNECT, "somebody connected during set-up who is no rank of this communicator");
    }
    bool fits = hello.size == size_ && hello.rank > rank_ && hello.rank < size_ && !links_[hello.rank];
    if (!fits) {
      throw Failure(HCCL_E_PARA, "rank " + std::to_string(rank_) + " joined as one of " + std::to_string(size_) +
                                     " ranks, and a process came as rank " + std::to_string(hello.rank) + " of " +
                                     std::to_string(hello.size) + ". Every rank must give its own number and one size");
    }
    links_[hello.rank] = std::make_unique<Link>(connection.release(), hello.rank);
  }

  bool readable(int socket) const {
    while (true) {
      auto left = std::chrono::ceil<std::chrono::milliseconds>(deadline_ - Clock::now());
      pollfd ready{socket, POLLIN, 0};
      int found = poll(&ready, 1, std::max<int64_t>(left.count(), 0));
      if (found >= 0 || errno != EINTR) {
        return found > 0;
      }
    }
  }

  std::string missing_ranks() const {
    std::string text;
    for (int peer = rank_ + 1; peer < size_; ++peer) {
      text += links_[peer] ? "" : " " + std::to_string(peer);
    }
    return text;
  }

  Failure timed_out(const std::string& what) const {
    char seconds[32];
    std::snprintf(seconds, sizeof(seconds), "%g", timeout_s_);
    return Failure(HCCL_E_TIMEOUT, "rank " + std::to_string(rank_) + " of " + std::to_string(size_) + " waited " +
                                       seconds + " s (HCCL_CONNECT_TIMEOUT) to set a communicator up; " + what +
                                       ". Every rank of the group must make its first call on it");
  }

  std::string token_;
  int rank_;
  int size_;
  double timeout_s_;
  Clock::time_point deadline_;
  std::vector<std::unique_ptr<Link>> links_;
};

}  // namespace

std::vector<std::unique_ptr<Link>> connect_all(const std::string& token, int rank, int size, double timeout_s) {
  return Meeting(token, rank, size, timeout_s).run();
}

}  // namespace llm_adapt::hccl
