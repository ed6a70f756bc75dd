// What each collective does. Every rank talks to every other directly: there are eight at most.
#include "hccl_collectives.h"

#include <cstring>

#include "hccl_reduce.h"

namespace llm_adapt::hccl {
namespace {

// Up to here everybody sends everything to everybody; above, each rank reduces its part and gathers the others'.
constexpr size_t kDirectBytes = 64 * 1024;

const char* at(const void* base, size_t bytes) { return static_cast<const char*>(base) + bytes; }
char* at(void* base, size_t bytes) { return static_cast<char*>(base) + bytes; }

Shares even_parts(int ranks, uint64_t count) {
  Shares shares(ranks);
  uint64_t offset = 0;
  for (int rank = 0; rank < ranks; ++rank) {
    uint64_t part = count / ranks + (static_cast<uint64_t>(rank) < count % ranks ? 1 : 0);
    shares[rank] = {part, offset};
    offset += part;
  }
  return shares;
}

}  // namespace

Shares equal_shares(int ranks, uint64_t count) {
  Shares shares(ranks);
  for (int rank = 0; rank < ranks; ++rank) {
    shares[rank] = {count, rank * count};
  }
  return shares;
}

void reduce_scatter(Mesh& mesh, const Call& call, const void* in, const Shares& shares, void* out) {
  size_t element = element_bytes(call.dtype);
  const Share& own = shares[mesh.rank()];
  size_t own_bytes = own.count * element;
  char* scratch = mesh.scratch(own_bytes * mesh.size());
  std::vector<Transfer> transfers(mesh.size());
  std::vector<const char*> contributions(mesh.size());
  for (int rank = 0; rank < mesh.size(); ++rank) {
    bool mine = rank == mesh.rank();
    char* arrives = scratch + rank * own_bytes;
    transfers[rank] = {at(in, shares[rank].offset * element), shares[rank].count * element, arrives, own_bytes};
    contributions[rank] = mine ? at(in, own.offset * element) : arrives;
  }
  mesh.exchange(call, transfers);
  reduce(out, contributions, own.count, call.dtype, call.reduction);
}

void all_reduce(Mesh& mesh, const Call& call, const void* in, void* out) {
  size_t element = element_bytes(call.dtype);
  if (call.count * element > kDirectBytes) {
    Shares parts = even_parts(mesh.size(), call.count);
    const Share& own = parts[mesh.rank()];
    char* reduced = at(out, own.offset * element);
    reduce_scatter(mesh, call, in, parts, reduced);
    all_gather(mesh, call, reduced, own.count, out, parts);
    return;
  }
  Shares everything(mesh.size(), Share{call.count, 0});
  reduce_scatter(mesh, call, in, everything, out);
}

void reduce_to_root(Mesh& mesh, const Call& call, const void* in, void* out) {
  Shares shares(mesh.size());
  shares[call.root] = {call.count, 0};
  reduce_scatter(mesh, call, in, shares, out);
}

void broadcast(Mesh& mesh, const Call& call, void* data) {
  size_t bytes = call.count * element_bytes(call.dtype);
  bool is_root = mesh.rank() == static_cast<int>(call.root);
  std::vector<Transfer> transfers(mesh.size());
  for (int rank = 0; rank < mesh.size(); ++rank) {
    if (is_root) {
      transfers[rank] = {data, bytes, nullptr, 0};
    } else if (rank == static_cast<int>(call.root)) {
      transfers[rank] = {nullptr, 0, data, bytes};
    }
  }
  mesh.exchange(call, transfers);
}

void scatter(Mesh& mesh, const Call& call, const void* in, void* out) {
  size_t bytes = call.count * element_bytes(call.dtype);
  bool is_root = mesh.rank() == static_cast<int>(call.root);
  std::vector<Transfer> transfers(mesh.size());
  for (int rank = 0; rank < mesh.size(); ++rank) {
    if (is_root) {
      transfers[rank] = {at(in, rank * bytes), bytes, nullptr, 0};
    } else if (rank == static_cast<int>(call.root)) {
      transfers[rank] = {nullptr, 0, out, bytes};
    }
  }
  mesh.exchange(call, transfers);
  if (is_root && bytes > 0) {
    std::memmove(out, at(in, call.root * bytes), bytes);
  }
}

void all_gather(Mesh& mesh, const Call& call, const void* in, uint64_t count, void* out, const Shares& shares) {
  size_t element = element_bytes(call.dtype);
  std::vector<Transfer> transfers(mesh.size());
  for (int rank = 0; rank < mesh.size(); ++rank) {
    transfers[rank] = {in, count * element, at(out, shares[rank].offset * element), shares[rank].count * element};
  }
  mesh.exchange(call, transfers);
  if (count > 0) {
    std::memmove(at(out, shares[mesh.rank()].offset * element), in, count * element);
  }
}

void all_to_all(Mesh& mesh, const Call& call, const void* in, const Shares& sends, void* out, const Shares& receives) {
  size_t element = element_bytes(call.dtype);
  std::vector<Transfer> transfers(mesh.size());
  for (int rank = 0; rank < mesh.size(); ++rank) {
    transfers[rank] = {at(in, sends[rank].offset * element), sends[rank].count * element,
                       at(out, receives[rank].offset * element), receives[rank].count * element};
  }
  mesh.exchange(call, transfers);
  const Transfer& own = transfers[mesh.rank()];
  if (own.out_bytes > 0) {
    std::memmove(own.in, own.out, own.out_bytes);
  }
}

void barrier(Mesh& mesh, const Call& call) { mesh.exchange(call, std::vector<Transfer>(mesh.size())); }

}  // namespace llm_adapt::hccl
