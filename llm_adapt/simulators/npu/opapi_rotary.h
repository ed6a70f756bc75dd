// The rotation that the rotary embeddings of libopapi.so share: y = first(x) cos + second(x) sin.
#pragma once
#include "opapi_dense.h"

namespace llm_adapt::opapi {

// The values of aclnnRotaryPositionEmbedding's argument `mode`.
enum class Turn { kHalf = 0, kInterleave = 1, kQuarter = 2, kInterleaveToHalf = 3 };

inline Tensor pairs_apart(const Tensor& x) { return x.unflatten(-1, {-1, 2}).transpose(-1, -2).flatten(-2); }
inline Tensor pairs_together(const Tensor& x) { return x.unflatten(-1, {2, -1}).transpose(-1, -2).flatten(-2); }

inline Tensor turned_halves(const Tensor& x) {
  const std::vector<Tensor> halves = x.chunk(2, -1);
  return at::cat({-halves[1], halves[0]}, -1);
}

inline Tensor first(const Tensor& x, Turn turn) { return turn == Turn::kInterleaveToHalf ? pairs_apart(x) : x; }

inline Tensor second(const Tensor& x, Turn turn) {
  if (turn == Turn::kHalf) return turned_halves(x);
  if (turn == Turn::kInterleave) return pairs_together(turned_halves(pairs_apart(x)));
  if (turn == Turn::kInterleaveToHalf) return turned_halves(pairs_apart(x));
  const std::vector<Tensor> halves = x.chunk(2, -1);
  return at::cat({turned_halves(halves[0]), turned_halves(halves[1])}, -1);
}

inline Tensor rotated(const Tensor& x, const Tensor& cos, const Tensor& sin, Turn turn) {
  return first(x, turn) * cos + second(x, turn) * sin;
}

// The transposes of first and second: what a gradient of their result is of x.
inline Tensor first_back(const Tensor& dy, Turn turn) {
  return turn == Turn::kInterleaveToHalf ? pairs_together(dy) : dy;
}

inline Tensor second_back(const Tensor& dy, Turn turn) {
  if (turn == Turn::kInterleaveToHalf) return pairs_together(-turned_halves(dy));
  return -second(dy, turn);
}

}  // namespace llm_adapt::opapi
