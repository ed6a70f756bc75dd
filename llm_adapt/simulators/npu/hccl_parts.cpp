// One peer's part of a collective, and of a batch of messages.
#include "hccl_parts.h"

namespace llm_adapt::hccl {
namespace {

[[noreturn]] void mismatch(int rank, const std::string& mine, int peer, const std::string& theirs) {
  throw Failure(HCCL_E_PARA, "the ranks do not call the same: rank " + std::to_string(rank) + " is in " + mine +
                                 ", rank " + std::to_string(peer) + " is in " + theirs +
                                 ". Every rank must make the same calls on a group, in the same order");
}

std::string bytes_text(uint64_t bytes) { return std::to_string(bytes) + " bytes"; }

}  // namespace

CollectivePart::CollectivePart(Link& link, int rank, const Call& call, uint32_t phase, const Transfer& transfer)
    : Part(link), rank_(rank), call_(call), phase_(phase), transfer_(transfer) {
  Frame frame;
  frame.kind = FrameKind::kCall;
  frame.call = call;
  frame.phase = phase;
  frame.payload = transfer.out_bytes;
  frame.expects = transfer.in_bytes;
  link.post(frame, transfer.out, transfer.out_bytes);
  if (!link.offers.empty()) {
    mismatch(rank, describe(call), link.peer(), describe(link.offers.front().call));
  }
}

bool CollectivePart::advance() {
  bool moved = link_.write_some();
  if (!met_) {
    auto frame = link_.read_frame();
    if (!frame) {
      return moved;
    }
    check(*frame);
    met_ = true;
    moved = true;
  }
  while (received_ < transfer_.in_bytes) {
    size_t got = link_.read_some(static_cast<char*>(transfer_.in) + received_, transfer_.in_bytes - received_);
    if (got == 0) {
      break;
    }
    received_ += got;
    moved = true;
  }
  if (link_.broken() && received_ == transfer_.in_bytes) {
    link_.explain_gone();
  }
  return moved;
}

void CollectivePart::check(const Frame& frame) const {
  if (frame.kind == FrameKind::kOffer || !same_call(frame.call, call_) || frame.phase != phase_) {
    mismatch(rank_, describe(call_), link_.peer(), describe(frame.call));
  }
  if (frame.payload != transfer_.in_bytes) {
    mismatch(rank_, describe(call_) + " expecting " + bytes_text(transfer_.in_bytes) + " from it", link_.peer(),
             describe(frame.call) + " sending " + bytes_text(frame.payload));
  }
  if (frame.expects != transfer_.out_bytes) {
    mismatch(rank_, describe(call_) + " sending it " + bytes_text(transfer_.out_bytes), link_.peer(),
             describe(frame.call) + " expecting " + bytes_text(frame.expects));
  }
}

bool CollectivePart::done() const { return met_ && received_ == transfer_.in_bytes && !link_.has_unwritten(); }

std::string CollectivePart::missing() const {
  std::string who = "rank " + std::to_string(link_.peer());
  return who + (met_ ? " called it, but its bytes do not come or go" : " has not called it");
}

MessagesPart::MessagesPart(Link& link, int rank, std::vector<Message> sends, std::vector<Message> receives)
    : Part(link), rank_(rank), sends_(std::move(sends)), receives_(std::move(receives)) {
  for (const Message& message : sends_) {
    Frame frame;
    frame.kind = FrameKind::kOffer;
    frame.call = call_of(message, link.sent_messages++);
    frame.payload = message.bytes();
    link.post(frame, nullptr, 0);
  }
}

Call MessagesPart::call_of(const Message& message, uint64_t sequence) const {
  Call call;
  call.operation = message.is_send ? Operation::kSend : Operation::kReceive;
  call.dtype = message.dtype;
  call.count = message.count;
  call.sequence = sequence;
  return call;
}

bool MessagesPart::advance() {
  bool moved = take_offers();
  moved = link_.write_some() || moved;
  while (!done() && read()) {
    moved = true;
    take_offers();
    link_.write_some();
  }
  return moved;
}

bool MessagesPart::take_offers() {
  bool moved = false;
  while (taken_ < receives_.size() && !link_.offers.empty()) {
    const Message& message = receives_[taken_];
    Frame offer = link_.offers.front();
    link_.offers.pop_front();
    if (offer.payload != message.bytes() || offer.call.dtype != message.dtype) {
      mismatch(rank_, describe(call_of(message, offer.call.sequence)), link_.peer(), describe(offer.call));
    }
    Frame take;
    take.kind = FrameKind::kTake;
    link_.post(take, nullptr, 0);
    ++taken_;
    moved = true;
  }
  return moved;
}

bool MessagesPart::read() {
  if (!in_message_) {
    auto frame = link_.read_frame();
    if (frame) {
      handle(*frame);
    }
    return frame.has_value();
  }
  const Message& message = receives_[received_];
  size_t got = link_.read_some(static_cast<char*>(message.data) + incoming_, message.bytes() - incoming_);
  incoming_ += got;
  if (incoming_ == message.bytes()) {
    in_message_ = false;
    ++received_;
  }
  return got > 0;
}

void MessagesPart::handle(const Frame& frame) {
  if (frame.kind == FrameKind::kOffer) {
    link_.offers.push_back(frame);
    return;
  }
  if (frame.kind == FrameKind::kCall) {
    const Message& mine = sends_.empty() ? receives_.front() : sends_.front();
    mismatch(rank_, describe(call_of(mine, Call::kUncounted)) + " with it", link_.peer(), describe(frame.call));
  }
  if (frame.kind == FrameKind::kTake && asked_for_ < sends_.size()) {
    const Message& message = sends_[asked_for_++];
    Frame data;
    data.kind = FrameKind::kData;
    data.payload = message.bytes();
    link_.post(data, message.data, message.bytes());
    return;
  }
  if (frame.kind == FrameKind::kData && received_ < taken_) {
    in_message_ = frame.payload > 0;
    incoming_ = 0;
    received_ += in_message_ ? 0 : 1;
    return;
  }
  throw Failure(HCCL_E_INTERNAL, "rank " + std::to_string(link_.peer()) + " sent a frame that answers nothing");
}

bool MessagesPart::done() const {
  return asked_for_ == sends_.size() && received_ == receives_.size() && !link_.has_unwritten();
}

std::string MessagesPart::missing() const {
  std::string who = "rank " + std::to_string(link_.peer());
  std::string text;
  if (asked_for_ < sends_.size()) {
    uint64_t sequence = link_.sent_messages - sends_.size() + asked_for_;
    text = who + " has not received " + describe(call_of(sends_[asked_for_], sequence));
    text += link_.offers.empty() ? "" : "; it sends to this rank meanwhile, and one of the two must receive first";
  }
  if (received_ < receives_.size()) {
    text += text.empty() ? "" : "; ";
    text += who + " has not sent what this rank receives";
  }
  return text.empty() ? who + " does not take its bytes" : text;
}

}  // namespace llm_adapt::hccl
