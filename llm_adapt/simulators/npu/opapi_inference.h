// Attention for inference: prompts (several queries) and decoding (one query), from whole tensors or from pages.
//
//     out = softmax(mask(scale * q k^T + pse)) v          lse = log(sum(exp(scores)))
//
// Letters: B batch, T packed tokens, N query heads, G key heads, S queries, K keys, D head size, C tokens of a page.
// Source: documents of npu_fused_infer_attention_score(_v2), npu_prompt_flash_attention, npu_incre_flash_attention.
#pragma once
#include "opapi.h"

namespace llm_adapt::opapi::inference {

// Arguments by meaning. Undefined tensors and absent lists were not given, or are not known to that operator.
struct Request {
  Tensor query;
  Tensors keys;
  Tensors values;
  Tensor pse;
  Tensor mask;
  Tensor table;  // of pages
  Tensor query_rope;
  Tensor key_rope;
  Tensor sink;
  Ints lengths_q;  // of each batch; packed tokens: cumulative ends
  Ints lengths_k;  // the same, but always lengths where there is a table
  double scale = 1.0;
  int64_t heads = 0;
  int64_t groups = 0;  // 0 = as many as heads
  int64_t pre = 0;
  int64_t next = 0;
  std::string layout;  // "of q, k, v" or "of q, k, v"_"of out"
  int64_t sparse_mode = 0;
  int64_t inner_precise = 0;
  int64_t page = 0;
  bool wants_lse = false;
  Tensor out;
  Tensor lse;
  std::string unmodelled;  // what was given and is not modelled, "" = nothing

  const Tensor& key() const { return keys.front(); }
  const Tensor& value() const { return values.front(); }
  int64_t key_heads() const { return groups == 0 ? heads : groups; }
  std::string layout_in() const { return layout.substr(0, layout.find('_')); }
  std::string layout_out() const { return layout.substr(layout.find('_') + 1); }  // npos + 1 is 0
  bool is_packed() const { return layout_in() == "TND" || layout_in() == "NTD"; }
};

// A sequence's place.
struct Sequence {
  int64_t index;
  int64_t batch;  // 0 for packed queries
  int64_t row;
  int64_t rows;
  int64_t key;  // place of its first key, where keys are packed
  int64_t keys;
};

// [B, N, S, D] as a view; packed tensors as [1, N, T, D].
Tensor heads_first(const Tensor& tensor, int64_t heads, const std::string& layout);
std::vector<Sequence> sequences(const Request& request);
int64_t queries(const Request& request);   // S, or T of packed queries
bool is_decoding(const Request& request);  // one query, not packed: sparse_mode is ignored

// Keys or values of a sequence in float32, [G, K, D].
Tensor cached(const Request& request, const Tensor& tensor, const Sequence& one);

Tensor hidden(const Request& request, const Sequence& one);  // [S, K], or undefined

void check_request(const Request& request);
void check_pages(const Request& request, const std::vector<Sequence>& all);
void check_mask(const Request& request, const std::vector<Sequence>& all);
void run(const Request& request);

}  // namespace llm_adapt::opapi::inference
