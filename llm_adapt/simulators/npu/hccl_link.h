// A connection to one other rank: frames, and the bytes behind them, over a socket that never blocks.
#pragma once
#include <deque>
#include <optional>
#include <string>
#include <vector>

#include "hccl_call.h"

namespace llm_adapt::hccl {

enum class FrameKind : uint32_t {
  kCall,   // this rank is in a collective; its bytes for you follow
  kOffer,  // this rank has a message for you
  kTake,   // send me the oldest message that you offered and I did not take yet
  kData,   // its bytes follow
  kAbort,  // this rank gave up; the reason follows
};

struct Frame {
  uint32_t magic = kMagic;
  FrameKind kind = FrameKind::kCall;
  Call call;
  uint32_t phase = 0;  // which exchange of a collective
  uint64_t payload = 0;  // bytes that follow
  uint64_t expects = 0;  // of a kCall: bytes that the sender of the frame expects of its receiver

  static constexpr uint32_t kMagic = 0x48434c31;
};

class Link {
 public:
  Link(int socket, int peer_rank) : socket_(socket), peer_(peer_rank) {}
  ~Link();
  Link(const Link&) = delete;
  Link& operator=(const Link&) = delete;

  int socket() const { return socket_; }
  int peer() const { return peer_; }

  // Queue a frame and `bytes` at `data`, which must stay until everything is written.
  void post(const Frame& frame, const void* data, size_t bytes);
  bool has_unwritten() const { return !queue_.empty(); }
  // Write what the socket takes; returns whether anything went.
  bool write_some();
  // The peer takes no more bytes. What it wrote before may still be here, and say why.
  bool broken() const { return broken_; }
  // Called between two frames of a broken link: throws the peer's reason, or that it is gone.
  [[noreturn]] void explain_gone();

  // The next frame once it is here whole. Throws Failure when the peer gave up or is gone.
  std::optional<Frame> read_frame();
  // Up to `bytes` into `to`; 0 when nothing is here yet.
  size_t read_some(char* to, size_t bytes);

  // Tell the peer why this rank gave up (if no message is half written), and take and give nothing any more.
  void give_up(const std::string& reason);

  // Messages that the peer offered and this rank has not taken.
  std::deque<Frame> offers;
  uint64_t sent_messages = 0;
  uint64_t bytes_out = 0;
  uint64_t bytes_in = 0;

 private:
  struct Piece {
    Frame frame;
    const char* data;
    size_t bytes;
    size_t written;  // of the frame and the data together
  };
  [[noreturn]] void peer_gave_up(uint64_t bytes);
  size_t receive(char* to, size_t bytes);
  bool read_whole(char* to, size_t bytes);

  int socket_;
  int peer_;
  std::deque<Piece> queue_;
  char partial_[sizeof(Frame)];
  size_t partial_bytes_ = 0;
  bool broken_ = false;
};

// Connect `rank` of `size` ranks that share `token`; the result has no link at [rank]. Throws Failure.
std::vector<std::unique_ptr<Link>> connect_all(const std::string& token, int rank, int size, double timeout_s);

}  // namespace llm_adapt::hccl
