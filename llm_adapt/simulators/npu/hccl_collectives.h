// What each collective does, between the ranks of a mesh. All of them run in the worker of a communicator.
#pragma once
#include <vector>

#include "hccl_mesh.h"

namespace llm_adapt::hccl {

// Where a rank's share lies in a buffer, in elements.
struct Share {
  uint64_t count = 0;
  uint64_t offset = 0;
};
using Shares = std::vector<Share>;

// `count` elements for each of `ranks`, one after the other.
Shares equal_shares(int ranks, uint64_t count);

void all_reduce(Mesh& mesh, const Call& call, const void* in, void* out);
void reduce_to_root(Mesh& mesh, const Call& call, const void* in, void* out);
// `shares` say which part of `in` each rank gets reduced.
void reduce_scatter(Mesh& mesh, const Call& call, const void* in, const Shares& shares, void* out);
void broadcast(Mesh& mesh, const Call& call, void* data);
void scatter(Mesh& mesh, const Call& call, const void* in, void* out);
// `count` elements at `in` go to everybody; `shares` say where each rank's go in `out`.
void all_gather(Mesh& mesh, const Call& call, const void* in, uint64_t count, void* out, const Shares& shares);
void all_to_all(Mesh& mesh, const Call& call, const void* in, const Shares& sends, void* out, const Shares& receives);
void barrier(Mesh& mesh, const Call& call);

}  // namespace llm_adapt::hccl
