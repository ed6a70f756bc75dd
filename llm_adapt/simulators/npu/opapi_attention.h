// Attention for training: one call of npu_fusion_attention or of its gradient, whichever version was called.
//
//     out = dropout(softmax(mask(scale * (q k^T + pse)))) v             pse_type 1; otherwise pse is added after
//     scaling
//
// Letters: B batch, T tokens of all sequences packed, N query heads, S queries, K keys, D head size.
// A call is worked through sequence by sequence, each as [N, S, D] in float32.
//
// Source: documents of aclnnFlashAttentionScore, aclnnFlashAttentionVarLenScore and their gradients (versions 1 to
// 5).
#pragma once
#include "opapi.h"

namespace llm_adapt::opapi::attention {

// Arguments by meaning. Undefined tensors and absent lists were not given, or are not known to that version.
struct Call {
  Tensor query;
  Tensor key;
  Tensor value;
  Tensor dy;  // defined: this is a gradient
  Tensor query_rope;
  Tensor key_rope;
  Tensor pse;
  Tensor drop_mask;
  Tensor padding_mask;
  Tensor mask;
  Tensor sink;
  Tensor softmax_max;  // results of the forward call, arguments of the gradient; so are the next two
  Tensor softmax_sum;
  Tensor out;
  Ints prefix;
  Ints ends_q;  // cumulative ends of packed sequences
  Ints ends_k;
  Ints start_q;
  Ints start_k;
  double scale = 1.0;
  double keep_prob = 1.0;
  int64_t pre = 0;
  int64_t next = 0;
  int64_t heads = 0;
  std::string layout;
  int64_t inner_precise = 0;
  int64_t sparse_mode = 0;
  int64_t pse_type = 1;
  std::string softmax_layout;
  int64_t seed = 0;  // of a mask that the kernel makes itself
  int64_t offset = 0;
  bool needs_keys_for_rows = false;  // sparse_mode 3 takes S <= K only
  std::string unmodelled;            // what was given and is not modelled, "" = nothing
  Tensor dq;
  Tensor dq_rope;
  Tensor dk;
  Tensor dk_rope;
  Tensor dv;
  Tensor dpse;
  Tensor dsink;

  bool is_packed() const { return layout == "TND"; }
};

// A sequence's place: in its batch, or in the packed tokens.
struct Sequence {
  int64_t index;
  int64_t batch;     // 0 for packed sequences
  int64_t row;       // of its first query
  int64_t rows;      // S
  int64_t key;       // place of its first key
  int64_t keys;      // K
  int64_t drop_bit;  // where its part of the dropout mask starts
};

constexpr int64_t kCompressed = 2048;     // edge of the mask of the sparse modes 2, 3, 4, 7 and 8, and width of 6's
constexpr int64_t kPrefixRows = 3072;     // rows of the mask of sparse mode 6
constexpr int64_t kCompressedPse = 1024;  // the last rows of a bias that stand for all

// Shape [B, N, S, D] as a view, so that it can be written to; packed tensors as [1, N, T, D].
Tensor heads_first(const Tensor& tensor, int64_t heads, const std::string& layout);
int64_t key_heads(const Call& call);
std::vector<Sequence> sequences(const Call& call);

void check_call(const Call& call);
void check_pse(const Call& call, const std::vector<Sequence>& all);
void check_masks(const Call& call, const std::vector<Sequence>& all);

// Which keys are hidden: [1 or N, S, K], or undefined when all are seen. Refuses masks with wrong content.
Tensor hidden(const Call& call, const Sequence& one, int64_t last_index);

// What is added to the scores, [1 or N, 1 or S, K], or undefined.
Tensor bias(const Call& call, const Sequence& one);

// Factors of dropout, 0 or 1/keep_prob: [N, S, K], or undefined.
Tensor dropout(const Call& call, const Sequence& one);

// A sequence's tensors, with the key heads repeated for the queries that share them.
struct Block {
  Tensor q;       // [N, S, D]
  Tensor k;       // [N, K, D]
  Tensor v;       // [N, K, Dv]
  Tensor scores;  // [N, S, K], the lowest float where hidden
  Tensor q_rope;
  Tensor k_rope;
};
Block block(const Call& call, const Sequence& one, int64_t last_index);

// exp(scores - top) / total; exactly zero in rows without keys that were handled as such.
Tensor probabilities(const Tensor& scores, const Tensor& top, const Tensor& total);

// A view [N, S, 8] of softmax_max or softmax_sum. Packed ones stand sequence by sequence as [N, S, 8], though their
// shape says [T, N, 8], unless the layout of the softmax is that of the input.
Tensor statistics(const Call& call, const Tensor& whole, const Sequence& one);

void forward(const Call& call);
void backward(const Call& call);

}  // namespace llm_adapt::opapi::attention

namespace llm_adapt::opapi {

// Bits of a generated dropout mask, 1 = kept: a stream of its own for each pair of seed and offset.
void generate_keep_bits(const Tensor& bytes, int64_t count, double drop, int64_t seed, int64_t offset);
Tensor keep_bits(const Tensor& bytes, int64_t start, int64_t count);  // bool, [count]

}  // namespace llm_adapt::opapi
