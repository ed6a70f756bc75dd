// The collectives of the HCCL C API: check what was asked, and launch it.
#include "hccl_collectives.h"
#include "hccl_launch.h"

#include "acl/acl.h"
#include "hccl/hccl.h"

using namespace llm_adapt;
using namespace llm_adapt::hccl;

namespace {

Call make_call(Operation operation, uint64_t count, HcclDataType dtype) {
  Call call;
  call.operation = operation;
  call.count = count;
  call.dtype = dtype;
  return call;
}

// A collective that is being asked for: the checks of it are made in a row, and the first that refuses decides.
class Request {
 public:
  Request(Call call, HcclComm communicator, aclrtStream stream)
      : call_(call), handle_(communicator), stream_(stream), communicator_(find(communicator)) {
    if (!communicator_) {
      refuse(HCCL_E_PARA, "the communicator is not alive");
      return;
    }
    if (call.operation != Operation::kBarrier) {
      refuse(HCCL_E_NOT_SUPPORT, refuses_copy(call.dtype));
    }
  }

  Request& reduces(HcclReduceOp reduction) {
    call_.reduction = reduction;
    refuse(HCCL_E_NOT_SUPPORT, refuses_reduction(call_.dtype, reduction));
    return *this;
  }

  Request& rooted(uint32_t root) {
    call_.root = root;
    if (communicator_ && root >= static_cast<uint32_t>(ranks())) {
      refuse(HCCL_E_PARA, "root " + std::to_string(root) + " of " + std::to_string(ranks()) + " ranks");
    }
    return *this;
  }

  Request& needs(const void* buffer, const char* name, uint64_t count) {
    if (buffer == nullptr && count > 0) {
      refuse(HCCL_E_PTR, std::string(name) + " is null");
    }
    return *this;
  }

  bool fits() const { return reason_.empty(); }
  int ranks() const { return communicator_->settings().size; }
  int rank() const { return communicator_->settings().rank; }
  bool is_root() const { return rank() == static_cast<int>(call_.root); }

  HcclResult refused() const {
    return static_cast<HcclResult>(fail(code_, std::string(name_of(call_.operation)) + ": " + reason_));
  }
  HcclResult go(Work work) const {
    return fits() ? static_cast<HcclResult>(launch(handle_, stream_, call_, std::move(work))) : refused();
  }

  void refuse(HcclResult code, const std::string& reason) {
    if (reason_.empty() && !reason.empty()) {
      code_ = code;
      reason_ = reason;
    }
  }

 private:
  Call call_;
  HcclComm handle_;
  aclrtStream stream_;
  std::shared_ptr<Communicator> communicator_;
  HcclResult code_ = HCCL_SUCCESS;
  std::string reason_;
};

// The caller's arrays live only as long as the call.
Shares shares_of(Request& request, const void* counts, const void* offsets) {
  request.needs(counts, "the array of counts", 1).needs(offsets, "the array of displacements", 1);
  Shares shares;
  for (int rank = 0; request.fits() && rank < request.ranks(); ++rank) {
    shares.push_back({static_cast<const uint64_t*>(counts)[rank], static_cast<const uint64_t*>(offsets)[rank]});
  }
  return shares;
}

void check_own_share(Request& request, const Shares& shares, uint64_t count, const char* name) {
  if (request.fits() && shares[request.rank()].count != count) {
    request.refuse(HCCL_E_PARA, std::string(name) + " is " + std::to_string(count) + ", the array of counts says " +
                                    std::to_string(shares[request.rank()].count) + " for this rank");
  }
}

uint64_t total(const Shares& shares) {
  uint64_t sum = 0;
  for (const Share& share : shares) {
    sum += share.count;
  }
  return sum;
}

HcclResult all_to_all_of(Request& request, const void* in, const Shares& sends, HcclDataType in_type, const void* out,
                         const Shares& receives, HcclDataType out_type) {
  if (in_type != out_type) {
    request.refuse(HCCL_E_PARA, "it sends " + name_of(in_type) + " and receives " + name_of(out_type));
  }
  request.needs(in, "sendBuf", total(sends)).needs(out, "recvBuf", total(receives));
  void* to = const_cast<void*>(out);
  return request.go(
      [=](Mesh& mesh, const Call& call) { hccl::all_to_all(mesh, call, in, sends, to, receives); });
}

}  // namespace

extern "C" {

NPUSIM_EXPORT HcclResult HcclAllReduce(void* in, void* out, uint64_t count, HcclDataType dtype, HcclReduceOp op,
                                       HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kAllReduce, count, dtype), comm, stream);
  request.reduces(op).needs(in, "sendBuf", count).needs(out, "recvBuf", count);
  return request.go([=](Mesh& mesh, const Call& call) { all_reduce(mesh, call, in, out); });
}

NPUSIM_EXPORT HcclResult HcclReduce(void* in, void* out, uint64_t count, HcclDataType dtype, HcclReduceOp op,
                                    uint32_t root, HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kReduce, count, dtype), comm, stream);
  request.reduces(op).rooted(root).needs(in, "sendBuf", count);
  if (request.fits() && request.is_root()) {
    request.needs(out, "recvBuf", count);
  }
  return request.go([=](Mesh& mesh, const Call& call) { reduce_to_root(mesh, call, in, out); });
}

NPUSIM_EXPORT HcclResult HcclReduceScatter(void* in, void* out, uint64_t count, HcclDataType dtype, HcclReduceOp op,
                                           HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kReduceScatter, count, dtype), comm, stream);
  request.reduces(op).needs(in, "sendBuf", count).needs(out, "recvBuf", count);
  return request.go([=](Mesh& mesh, const Call& call) {
    reduce_scatter(mesh, call, in, equal_shares(mesh.size(), count), out);
  });
}

NPUSIM_EXPORT HcclResult HcclReduceScatterV(void* in, const void* counts, const void* offsets, void* out,
                                            uint64_t count, HcclDataType dtype, HcclReduceOp op, HcclComm comm,
                                            aclrtStream stream) {
  Request request(make_call(Operation::kReduceScatterV, 0, dtype), comm, stream);
  Shares shares = shares_of(request.reduces(op), counts, offsets);
  check_own_share(request, shares, count, "recvCount");
  request.needs(in, "sendBuf", total(shares)).needs(out, "recvBuf", count);
  return request.go([=](Mesh& mesh, const Call& call) { reduce_scatter(mesh, call, in, shares, out); });
}

NPUSIM_EXPORT HcclResult HcclBroadcast(void* data, uint64_t count, HcclDataType dtype, uint32_t root, HcclComm comm,
                                       aclrtStream stream) {
  Request request(make_call(Operation::kBroadcast, count, dtype), comm, stream);
  request.rooted(root).needs(data, "buf", count);
  return request.go([=](Mesh& mesh, const Call& call) { broadcast(mesh, call, data); });
}

NPUSIM_EXPORT HcclResult HcclScatter(void* in, void* out, uint64_t count, HcclDataType dtype, uint32_t root,
                                     HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kScatter, count, dtype), comm, stream);
  request.rooted(root).needs(out, "recvBuf", count);
  if (request.fits() && request.is_root()) {
    request.needs(in, "sendBuf", count);
  }
  return request.go([=](Mesh& mesh, const Call& call) { scatter(mesh, call, in, out); });
}

NPUSIM_EXPORT HcclResult HcclAllGather(void* in, void* out, uint64_t count, HcclDataType dtype, HcclComm comm,
                                       aclrtStream stream) {
  Request request(make_call(Operation::kAllGather, count, dtype), comm, stream);
  request.needs(in, "sendBuf", count).needs(out, "recvBuf", count);
  return request.go([=](Mesh& mesh, const Call& call) {
    all_gather(mesh, call, in, count, out, equal_shares(mesh.size(), count));
  });
}

NPUSIM_EXPORT HcclResult HcclAllGatherV(void* in, uint64_t count, void* out, const void* counts, const void* offsets,
                                        HcclDataType dtype, HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kAllGatherV, 0, dtype), comm, stream);
  Shares shares = shares_of(request, counts, offsets);
  check_own_share(request, shares, count, "sendCount");
  request.needs(in, "sendBuf", count).needs(out, "recvBuf", total(shares));
  return request.go([=](Mesh& mesh, const Call& call) { all_gather(mesh, call, in, count, out, shares); });
}

NPUSIM_EXPORT HcclResult HcclAlltoAll(const void* in, uint64_t in_count, HcclDataType in_type, const void* out,
                                      uint64_t out_count, HcclDataType out_type, HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kAllToAll, in_count, in_type), comm, stream);
  if (in_count != out_count) {
    request.refuse(HCCL_E_PARA, "it sends " + std::to_string(in_count) + " elements to each rank and receives " +
                                    std::to_string(out_count) + " from each");
  }
  Shares sends = request.fits() ? equal_shares(request.ranks(), in_count) : Shares();
  return all_to_all_of(request, in, sends, in_type, out, sends, out_type);
}

NPUSIM_EXPORT HcclResult HcclAlltoAllV(const void* in, const void* in_counts, const void* in_offsets,
                                       HcclDataType in_type, const void* out, const void* out_counts,
                                       const void* out_offsets, HcclDataType out_type, HcclComm comm,
                                       aclrtStream stream) {
  Request request(make_call(Operation::kAllToAllV, 0, in_type), comm, stream);
  Shares sends = shares_of(request, in_counts, in_offsets);
  Shares receives = shares_of(request, out_counts, out_offsets);
  return all_to_all_of(request, in, sends, in_type, out, receives, out_type);
}

// The matrix says what every rank sends to every other; buffers are packed in the order of the ranks.
NPUSIM_EXPORT HcclResult HcclAlltoAllVC(const void* in, const void* matrix, HcclDataType in_type, const void* out,
                                        HcclDataType out_type, HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kAllToAllV, 0, in_type), comm, stream);
  request.needs(matrix, "sendCountMatrix", 1);
  Shares sends;
  Shares receives;
  auto counts = static_cast<const uint64_t*>(matrix);
  for (int peer = 0; request.fits() && peer < request.ranks(); ++peer) {
    sends.push_back({counts[request.rank() * request.ranks() + peer], total(sends)});
    receives.push_back({counts[peer * request.ranks() + request.rank()], total(receives)});
  }
  return all_to_all_of(request, in, sends, in_type, out, receives, out_type);
}

NPUSIM_EXPORT HcclResult HcclBarrier(HcclComm comm, aclrtStream stream) {
  Request request(make_call(Operation::kBarrier, 0, HCCL_DATA_TYPE_RESERVED), comm, stream);
  return request.go([](Mesh& mesh, const Call& call) { barrier(mesh, call); });
}

NPUSIM_EXPORT HcclResult HcclSend(void* data, uint64_t count, HcclDataType dtype, uint32_t peer, HcclComm comm,
                                  aclrtStream stream) {
  Message message{true, static_cast<int>(peer), data, count, dtype};
  return static_cast<HcclResult>(launch_messages(comm, stream, Operation::kSend, {message}));
}

NPUSIM_EXPORT HcclResult HcclRecv(void* data, uint64_t count, HcclDataType dtype, uint32_t peer, HcclComm comm,
                                  aclrtStream stream) {
  Message message{false, static_cast<int>(peer), data, count, dtype};
  return static_cast<HcclResult>(launch_messages(comm, stream, Operation::kReceive, {message}));
}

NPUSIM_EXPORT HcclResult HcclBatchSendRecv(HcclSendRecvItem* items, uint32_t count, HcclComm comm,
                                           aclrtStream stream) {
  std::vector<Message> messages;
  for (uint32_t i = 0; i < count; ++i) {
    const HcclSendRecvItem& item = items[i];
    if (item.sendRecvType != HCCL_SEND && item.sendRecvType != HCCL_RECV) {
      return static_cast<HcclResult>(fail(HCCL_E_PARA, "batch_send_recv: item " + std::to_string(i) +
                                                           " is neither a send nor a recv"));
    }
    messages.push_back(
        {item.sendRecvType == HCCL_SEND, static_cast<int>(item.remoteRank), item.buf, item.count, item.dataType});
  }
  return static_cast<HcclResult>(launch_messages(comm, stream, Operation::kBatch, messages));
}
}
