// How the versions of attention are written: each fills a Call from its own arguments.
#pragma once
#include "opapi_attention.h"

// What all versions have.
#define ATTENTION_INPUTS \
  const aclTensor *pse, const aclTensor *drop_mask, const aclTensor *padding_mask, const aclTensor *mask
#define ATTENTION_OPTIONS                                                                                        \
  double scale, double keep_prob, int64_t pre, int64_t next, int64_t heads, char *layout, int64_t inner_precise, \
      int64_t sparse_mode
#define ATTENTION_RESULTS \
  const aclTensor *softmax_max, const aclTensor *softmax_sum, const aclTensor *softmax_out, const aclTensor *out

// The two phases of NAME. The last argument is statements that fill `call` from the parameters.
#define ATTENTION(NAME, RUN, PARAMETERS, ...)                                                               \
  extern "C" NPUSIM_EXPORT int NAME##GetWorkspaceSize(ACLNN_UNPACK PARAMETERS, uint64_t* workspace_size_,   \
                                                      aclOpExecutor** executor_) {                          \
    Call call;                                                                                              \
    fill_inputs(call, {query, key, value}, {pse, drop_mask, padding_mask, mask}, prefix,                    \
                {scale, keep_prob, pre, next, heads, value_of(layout), inner_precise, sparse_mode});        \
    fill_statistics(call, {softmax_max, softmax_sum, out});                                                 \
    __VA_ARGS__;                                                                                            \
    return prepare(#NAME, workspace_size_, executor_, [call] { check_call(call); }, [call] { RUN(call); }); \
  }                                                                                                         \
  extern "C" NPUSIM_EXPORT int NAME(void*, uint64_t, aclOpExecutor* executor_, void* stream_) {             \
    return launch(executor_, stream_);                                                                      \
  }

namespace llm_adapt::opapi::attention {

struct Qkv {
  const aclTensor* query;
  const aclTensor* key;
  const aclTensor* value;
};
struct Modifiers {
  const aclTensor* pse;
  const aclTensor* drop_mask;
  const aclTensor* padding_mask;
  const aclTensor* mask;
};
struct Options {
  double scale;
  double keep_prob;
  int64_t pre;
  int64_t next;
  int64_t heads;
  std::string layout;
  int64_t inner_precise;
  int64_t sparse_mode;
};
struct Results {
  const aclTensor* softmax_max;
  const aclTensor* softmax_sum;
  const aclTensor* out;
};
struct Gradients {
  const aclTensor* dy;
  const aclTensor* dq;
  const aclTensor* dk;
  const aclTensor* dv;
  const aclTensor* dpse;
};

inline std::string value_of(char* text) { return opapi::value(text); }

void fill_inputs(Call& call, Qkv inputs, Modifiers modifiers, const aclIntArray* prefix, Options options);
void fill_statistics(Call& call, Results results);
void fill_gradients(Call& call, Gradients gradients);
void fill_ends(Call& call, const aclIntArray* ends_q, const aclIntArray* ends_k);
void fill_bias(Call& call, const aclIntArray* start_q, const aclIntArray* start_k, int64_t pse_type);
void fill_rope(Call& call, const aclTensor* query_rope, const aclTensor* key_rope);
void fill_rope_gradients(Call& call, const aclTensor* dq_rope, const aclTensor* dk_rope);

// Arguments of 8-bit attention, which is not modelled: called with a text that names them.
void refuse_quantised(Call& call, std::initializer_list<const aclTensor*> scales);

}  // namespace llm_adapt::opapi::attention
