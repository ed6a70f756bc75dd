// The versions of the gradient of attention that torch_npu calls. Their softmax_in is reserved and takes nothing.
#include "opapi_attention_entry.h"

// The statistics and the output of the forward call, as arguments.
#define ATTENTION_GIVEN \
  const aclTensor *softmax_max, const aclTensor *softmax_sum, const aclTensor *softmax_in, const aclTensor *out
#define ATTENTION_GRADIENTS const aclTensor *dq, const aclTensor *dk, const aclTensor *dv, const aclTensor *dpse
#define ATTENTION_ROPE_GRADIENTS                                                                                     \
  const aclTensor *dq, const aclTensor *dq_rope, const aclTensor *dk, const aclTensor *dk_rope, const aclTensor *dv, \
      const aclTensor *dpse

namespace llm_adapt::opapi::attention {

void fill_gradients(Call& call, Gradients gradients) {
  call.dy = value(gradients.dy);
  call.dq = value(gradients.dq);
  call.dk = value(gradients.dk);
  call.dv = value(gradients.dv);
  call.dpse = value(gradients.dpse);
}

void fill_rope_gradients(Call& call, const aclTensor* dq_rope, const aclTensor* dk_rope) {
  call.dq_rope = value(dq_rope);
  call.dk_rope = value(dk_rope);
}

ATTENTION(aclnnFlashAttentionScoreGrad, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix, ATTENTION_OPTIONS, ATTENTION_GRADIENTS),
          fill_gradients(call, {dy, dq, dk, dv, dpse}))

ATTENTION(aclnnFlashAttentionScoreGradV2, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix, const aclIntArray* start_q,
           const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type, ATTENTION_GRADIENTS),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_bias(call, start_q, start_k, pse_type);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionScoreGradV3, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclTensor* sink, const aclIntArray* prefix,
           const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type,
           ATTENTION_GRADIENTS, const aclTensor* dsink),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_bias(call, start_q, start_k, pse_type);
          call.sink = opapi::value(sink);
          call.dsink = opapi::value(dsink))

ATTENTION(aclnnFlashAttentionScoreGradV4, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclTensor* sink, const aclTensor* query_rope,
           const aclTensor* key_rope, const aclTensor* scale_q, const aclTensor* scale_k, const aclTensor* scale_v,
           const aclTensor* scale_dy, const aclTensor* scale_out, const aclIntArray* prefix,
           const aclIntArray* ends_q, const aclIntArray* ends_k, const aclIntArray* start_q,
           const aclIntArray* start_k, double scale, double keep_prob, int64_t pre, int64_t next, int64_t heads,
           char* layout, char* softmax_layout, int64_t inner_precise, int64_t sparse_mode, int64_t pse_type,
           int64_t seed, int64_t offset, int64_t out_dtype, const aclTensor* dq, const aclTensor* dk,
           const aclTensor* dv, const aclTensor* dq_rope, const aclTensor* dk_rope, const aclTensor* dpse,
           const aclTensor* dsink),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_bias(call, start_q, start_k, pse_type);
          fill_ends(call, ends_q, ends_k);
          fill_rope(call, query_rope, key_rope);
          fill_rope_gradients(call, dq_rope, dk_rope);
          refuse_quantised(call, {scale_q, scale_k, scale_v, scale_dy, scale_out});
          call.sink = opapi::value(sink);
          call.dsink = opapi::value(dsink);
          call.softmax_layout = value_of(softmax_layout);
          call.seed = seed;
          call.offset = offset)

ATTENTION(aclnnFlashAttentionUnpaddingScoreGrad, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix, const aclIntArray* ends_q,
           const aclIntArray* ends_k, ATTENTION_OPTIONS, ATTENTION_GRADIENTS),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_ends(call, ends_q, ends_k))

ATTENTION(aclnnFlashAttentionUnpaddingScoreGradV2, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix, const aclIntArray* ends_q,
           const aclIntArray* ends_k, const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS,
           int64_t pse_type, ATTENTION_GRADIENTS),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionUnpaddingScoreGradV3, backward,
          (const aclTensor* query, const aclTensor* query_rope, const aclTensor* key, const aclTensor* key_rope,
           const aclTensor* value, const aclTensor* dy, ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix,
           const aclIntArray* ends_q, const aclIntArray* ends_k, const aclIntArray* start_q,
           const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type, ATTENTION_ROPE_GRADIENTS),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          fill_rope(call, query_rope, key_rope);
          fill_rope_gradients(call, dq_rope, dk_rope);
          call.needs_keys_for_rows = true)

ATTENTION(aclnnFlashAttentionUnpaddingScoreGradV4, backward,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* dy,
           ATTENTION_INPUTS, ATTENTION_GIVEN, const aclIntArray* prefix, const aclIntArray* ends_q,
           const aclIntArray* ends_k, ATTENTION_OPTIONS, ATTENTION_GRADIENTS, char* softmax_layout),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_ends(call, ends_q, ends_k);
          call.softmax_layout = value_of(softmax_layout))

ATTENTION(aclnnFlashAttentionUnpaddingScoreGradV5, backward,
          (const aclTensor* query, const aclTensor* query_rope, const aclTensor* key, const aclTensor* key_rope,
           const aclTensor* value, const aclTensor* dy, ATTENTION_INPUTS, ATTENTION_GIVEN, const aclTensor* sink,
           const aclIntArray* prefix, const aclIntArray* ends_q, const aclIntArray* ends_k,
           const aclIntArray* start_q, const aclIntArray* start_k, ATTENTION_OPTIONS, int64_t pse_type,
           char* softmax_layout, ATTENTION_ROPE_GRADIENTS, const aclTensor* dsink),
          fill_gradients(call, {dy, dq, dk, dv, dpse});
          fill_ends(call, ends_q, ends_k);
          fill_bias(call, start_q, start_k, pse_type);
          fill_rope(call, query_rope, key_rope);
          fill_rope_gradients(call, dq_rope, dk_rope);
          call.sink = opapi::value(sink);
          call.dsink = opapi::value(dsink);
          call.softmax_layout = value_of(softmax_layout))

}  // namespace llm_adapt::opapi::attention
