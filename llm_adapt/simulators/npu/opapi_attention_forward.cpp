// The versions of attention for training that torch_npu calls.
#include "opapi_attention_entry.h"

namespace llm_adapt::opapi::attention {

void fill_inputs(Call& call, Qkv inputs, Modifiers modifiers, const aclIntArray* prefix, Options options) {
  call.query = value(inputs.query);
  call.key = value(inputs.key);
  call.value = value(inputs.value);
  call.pse = value(modifiers.pse);
  call.drop_mask = value(modifiers.drop_mask);
  call.padding_mask = value(modifiers.padding_mask);
  call.mask = value(modifiers.mask);
  call.prefix = value(prefix);
  call.scale = options.scale;
  call.keep_prob = options.keep_prob;
  call.pre = options.pre;
  call.next = options.next;
  call.heads = options.heads;
  call.layout = options.layout;
  call.inner_precise = options.inner_precise;
  call.sparse_mode = options.sparse_mode;
}

void fill_statistics(Call& call, Results results) {
  call.softmax_max = value(results.softmax_max);
  call.softmax_sum = value(results.softmax_sum);
  call.out = value(results.out);
}

void fill_ends(Call& call, const aclIntArray* ends_q, const aclIntArray* ends_k) {
  call.ends_q = value(ends_q);
  call.ends_k = value(ends_k);
}

void fill_bias(Call& call, const aclIntArray* start_q, const aclIntArray* start_k, int64_t pse_type) {
  call.start_q = value(start_q);
  call.start_k = value(start_k);
  call.pse_type = pse_type;
}

void fill_rope(Call& call, const aclTensor* query_rope, const aclTensor* key_rope) {
  call.query_rope = value(query_rope);
  call.key_rope = value(key_rope);
}

void refuse_quantised(Call& call, std::initializer_list<const aclTensor*> scales) {
  for (const aclTensor* scale : scales) {
    if (scale != nullptr) call.unmodelled = "attention with scales of 8-bit inputs is not modelled";
  }
}

ATTENTION(aclnnFlashAttentionScore, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclIntArray* prefix, ATTENTION_OPTIONS, ATTENTION_RESULTS),
          {})

ATTENTION(aclnnFlashAttentionScoreV2, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclIntArray* prefix, const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS,
           int64_t pse_type, ATTENTION_RESULTS),
          fill_bias(call, start_q, start_k, pse_type);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionScoreV3, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclTensor* sink, const aclIntArray* prefix, const aclIntArray* start_q, const aclIntArray* start_k,
           ATTENTION_OPTIONS, int64_t pse_type, ATTENTION_RESULTS),
          fill_bias(call, start_q, start_k, pse_type);
          call.sink = opapi::value(sink))

ATTENTION(aclnnFlashAttentionScoreV4, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclTensor* query_rope, const aclTensor* key_rope, const aclTensor* scale_q, const aclTensor* scale_k,
           const aclTensor* scale_v, const aclTensor* sink, const aclIntArray* prefix, const aclIntArray* ends_q,
           const aclIntArray* ends_k, const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS,
           int64_t out_dtype, int64_t pse_type, char* softmax_layout, int64_t seed, int64_t offset,
           ATTENTION_RESULTS),
          fill_bias(call, start_q, start_k, pse_type);
          fill_rope(call, query_rope, key_rope);
          fill_ends(call, ends_q, ends_k);
          refuse_quantised(call, {scale_q, scale_k, scale_v});
          call.sink = opapi::value(sink);
          call.softmax_layout = value_of(softmax_layout);
          call.seed = seed;
          call.offset = offset)

ATTENTION(aclnnFlashAttentionVarLenScore, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclIntArray* prefix, const aclIntArray* ends_q, const aclIntArray* ends_k, ATTENTION_OPTIONS,
           ATTENTION_RESULTS),
          fill_ends(call, ends_q, ends_k))

ATTENTION(aclnnFlashAttentionVarLenScoreV2, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclIntArray* prefix, const aclIntArray* ends_q, const aclIntArray* ends_k,
           const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type,
           ATTENTION_RESULTS),
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionVarLenScoreV3, forward,
          (const aclTensor* query, const aclTensor* query_rope, const aclTensor* key, const aclTensor* key_rope,
           const aclTensor* value, ATTENTION_INPUTS, const aclIntArray* prefix, const aclIntArray* ends_q,
           const aclIntArray* ends_k, const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS,
           int64_t pse_type, ATTENTION_RESULTS),
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          fill_rope(call, query_rope, key_rope);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionVarLenScoreV4, forward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, ATTENTION_INPUTS,
           const aclIntArray* prefix, const aclIntArray* ends_q, const aclIntArray* ends_k, ATTENTION_OPTIONS,
           char* softmax_layout, ATTENTION_RESULTS),
          fill_ends(call, ends_q, ends_k);
          call.softmax_layout = value_of(softmax_layout))

ATTENTION(aclnnFlashAttentionVarLenScoreV5, forward,
          (const aclTensor* query, const aclTensor* query_rope, const aclTensor* key, const aclTensor* key_rope,
           const aclTensor* value, ATTENTION_INPUTS, const aclTensor* sink, const aclIntArray* prefix,
           const aclIntArray* ends_q, const aclIntArray* ends_k, const aclIntArray* start_q,
           const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type, char* softmax_layout, ATTENTION_RESULTS),
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          fill_rope(call, query_rope, key_rope);
          call.sink = opapi::value(sink);
          call.softmax_layout = value_of(softmax_layout))

}  // namespace llm_adapt::opapi::attention
