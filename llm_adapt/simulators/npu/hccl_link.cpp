// A connection to one other rank.
#include "hccl_link.h"

#include <errno.h>
#include <poll.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <unistd.h>

#include <cstring>

namespace llm_adapt::hccl {
namespace {

constexpr size_t kLongestReason = 4096;
constexpr int kReasonTimeoutMs = 1000;

bool would_block() { return errno == EAGAIN || errno == EWOULDBLOCK || errno == EINTR; }

std::string closed_text(int peer) {
  return "rank " + std::to_string(peer) +
         " closed its connection: its process ended, or it destroyed the communicator";
}

}  // namespace

Link::~Link() { close(socket_); }

void Link::post(const Frame& frame, const void* data, size_t bytes) {
  queue_.push_back(Piece{frame, static_cast<const char*>(data), bytes, 0});
  bytes_out += bytes;
}

bool Link::write_some() {
  bool moved = false;
  while (!queue_.empty() && !broken_) {
    Piece& piece = queue_.front();
    size_t of_frame = std::min(piece.written, sizeof(Frame));
    size_t of_data = piece.written - of_frame;
    iovec parts[2] = {
        {reinterpret_cast<char*>(&piece.frame) + of_frame, sizeof(Frame) - of_frame},
        {const_cast<char*>(piece.data) + of_data, piece.bytes - of_data},
    };
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    ssize_t written = sendmsg(socket_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (written < 0) {
      broken_ = !would_block();
      return moved;
    }
    moved = true;
    piece.written += written;
    if (piece.written == sizeof(Frame) + piece.bytes) {
      queue_.pop_front();
    }
  }
  return moved;
}

size_t Link::receive(char* to, size_t bytes) {
  ssize_t got = recv(socket_, to, bytes, MSG_DONTWAIT);
  if (got > 0) {
    return got;
  }
  if (got < 0 && would_block()) {
    return 0;
  }
  throw Failure(HCCL_E_REMOTE, closed_text(peer_));
}

size_t Link::read_some(char* to, size_t bytes) {
  size_t got = receive(to, bytes);
  bytes_in += got;
  return got;
}

std::optional<Frame> Link::read_frame() {
  partial_bytes_ += receive(partial_ + partial_bytes_, sizeof(Frame) - partial_bytes_);
  if (partial_bytes_ < sizeof(Frame)) {
    return std::nullopt;
  }
  Frame frame;
  std::memcpy(&frame, partial_, sizeof(Frame));
  partial_bytes_ = 0;
  if (frame.magic != Frame::kMagic) {
    throw Failure(HCCL_E_INTERNAL, "rank " + std::to_string(peer_) + " sent bytes that are no frame");
  }
  if (frame.kind == FrameKind::kAbort) {
    peer_gave_up(frame.payload);
  }
  return frame;
}

bool Link::read_whole(char* to, size_t bytes) {
  size_t done = 0;
  while (done < bytes) {
    pollfd ready{socket_, POLLIN, 0};
    if (poll(&ready, 1, kReasonTimeoutMs) <= 0) {
      return false;
    }
    done += receive(to + done, bytes - done);
  }
  return true;
}

void Link::peer_gave_up(uint64_t bytes) {
  std::string reason(std::min<uint64_t>(bytes, kLongestReason), '\0');
  if (!read_whole(reason.data(), reason.size())) {
    reason = "no reason arrived";
  }
  throw Failure(HCCL_E_REMOTE, "rank " + std::to_string(peer_) + " gave up: " + reason);
}

void Link::explain_gone() {
  while (true) {
    auto frame = read_frame();
    bool boundary = frame && frame->payload == 0;
    if (!boundary) {
      throw Failure(HCCL_E_REMOTE, closed_text(peer_));
    }
  }
}

void Link::give_up(const std::string& reason) {
  bool between_messages = queue_.empty() || queue_.front().written == 0;
  if (between_messages) {
    Frame frame;
    frame.kind = FrameKind::kAbort;
    frame.payload = std::min(reason.size(), kLongestReason);
    iovec parts[2] = {{&frame, sizeof(frame)}, {const_cast<char*>(reason.data()), frame.payload}};
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = 2;
    // Best effort: a peer that is gone or does not read finds the closed connection instead.
    sendmsg(socket_, &message, MSG_NOSIGNAL | MSG_DONTWAIT);
  }
  queue_.clear();
  shutdown(socket_, SHUT_RDWR);
}

}  // namespace llm_adapt::hccl
