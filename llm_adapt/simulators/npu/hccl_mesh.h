// All connections of one rank of a communicator, and the two ways in which ranks talk over them.
#pragma once
#include <chrono>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "hccl_link.h"

namespace llm_adapt::hccl {

// What goes to and comes from one peer in one exchange of a collective.
struct Transfer {
  const void* out = nullptr;
  size_t out_bytes = 0;
  void* in = nullptr;
  size_t in_bytes = 0;
};

// One message of a send, a recv or a batch of them.
struct Message {
  bool is_send = false;
  int peer = 0;
  void* data = nullptr;
  uint64_t count = 0;
  HcclDataType dtype = HCCL_DATA_TYPE_RESERVED;
  size_t bytes() const { return count * element_bytes(dtype); }
};

// One peer's part of a call. The mesh advances all parts until they are done.
class Part {
 public:
  explicit Part(Link& link) : link_(link) {}
  virtual ~Part() = default;
  // Do what can be done without waiting; returns whether anything moved.
  virtual bool advance() = 0;
  virtual bool done() const = 0;
  // What it is that the peer has not done, for the message of a timeout.
  virtual std::string missing() const = 0;
  Link& link() const { return link_; }

 protected:
  Link& link_;
};

class Mesh {
 public:
  Mesh(std::vector<std::unique_ptr<Link>> links, int rank, double exec_timeout_s);
  ~Mesh();

  int rank() const { return rank_; }
  int size() const { return static_cast<int>(links_.size()); }

  // A call begins: its clock starts.
  void begin(const Call& call);
  // Every rank exchanges its call and bytes with every other; the transfers are indexed by rank.
  void exchange(const Call& call, const std::vector<Transfer>& transfers);
  // Messages, all at once. A send is done when its receiver took it.
  void pass_messages(const std::vector<Message>& messages);
  // Tell all peers, and take no further part.
  void give_up(const std::string& reason);
  // Any thread: make the call in progress fail.
  void cancel();

  uint64_t bytes_out() const;
  uint64_t bytes_in() const;
  // Memory for bytes that are on their way, kept from call to call.
  char* scratch(size_t bytes);

 private:
  void run(const std::vector<std::unique_ptr<Part>>& parts);
  void wait(const std::vector<std::unique_ptr<Part>>& parts);
  [[noreturn]] void time_out(const std::vector<std::unique_ptr<Part>>& parts) const;

  std::vector<std::unique_ptr<Link>> links_;
  int rank_;
  double exec_timeout_s_;
  int cancel_event_;
  Call call_;
  uint32_t phase_ = 0;
  std::chrono::steady_clock::time_point started_;
  std::unique_ptr<char[]> scratch_;
  size_t scratch_bytes_ = 0;
};

}  // namespace llm_adapt::hccl
