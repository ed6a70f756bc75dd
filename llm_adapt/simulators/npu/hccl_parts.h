// One peer's part of a collective, and of a batch of messages.
#pragma once
#include <deque>

#include "hccl_mesh.h"

namespace llm_adapt::hccl {

class CollectivePart : public Part {
 public:
  CollectivePart(Link& link, int rank, const Call& call, uint32_t phase, const Transfer& transfer);
  bool advance() override;
  bool done() const override;
  std::string missing() const override;

 private:
  void check(const Frame& frame) const;

  int rank_;
  Call call_;
  uint32_t phase_;
  Transfer transfer_;
  bool met_ = false;
  size_t received_ = 0;
};

class MessagesPart : public Part {
 public:
  MessagesPart(Link& link, int rank, std::vector<Message> sends, std::vector<Message> receives);
  bool advance() override;
  bool done() const override;
  std::string missing() const override;

 private:
  bool read();
  bool take_offers();
  void handle(const Frame& frame);
  Call call_of(const Message& message, uint64_t sequence) const;

  int rank_;
  std::vector<Message> sends_;
  std::vector<Message> receives_;
  size_t asked_for_ = 0;  // sends that the peer took
  size_t taken_ = 0;      // receives that met an offer
  size_t received_ = 0;   // receives that are whole
  size_t incoming_ = 0;   // bytes of receives_[received_] that are here
  bool in_message_ = false;
};

}  // namespace llm_adapt::hccl
