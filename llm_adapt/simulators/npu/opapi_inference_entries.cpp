// The operators of attention for inference that torch_npu calls.
#include "opapi_inference.h"

// The two phases of NAME. The last argument is statements that fill `request` from the parameters.
#define INFERENCE(NAME, CHECK, PARAMETERS, ...)                                                                    \
  extern "C" NPUSIM_EXPORT int NAME##GetWorkspaceSize(ACLNN_UNPACK PARAMETERS, uint64_t* workspace_size_,          \
                                                      aclOpExecutor** executor_) {                                 \
    Request request;                                                                                               \
    __VA_ARGS__;                                                                                                   \
    return prepare(#NAME, workspace_size_, executor_, [request] { CHECK(request); }, [request] { run(request); }); \
  }                                                                                                                \
  extern "C" NPUSIM_EXPORT int NAME(void*, uint64_t, aclOpExecutor* executor_, void* stream_) {                    \
    return launch(executor_, stream_);                                                                             \
  }

// What the versions of the fused operator have in common, in three runs of their parameters.
#define FUSED_INPUTS                                                                                                \
  const aclTensor *query, const aclTensorList *key, const aclTensorList *value, const aclTensor *pse,               \
      const aclTensor *mask, const aclIntArray *lengths_q, const aclIntArray *lengths_k, const aclTensor *dequant1, \
      const aclTensor *quant1, const aclTensor *dequant2, const aclTensor *quant2, const aclTensor *quant_offset2,  \
      const aclTensor *antiquant_scale, const aclTensor *antiquant_offset, const aclTensor *table,                  \
      const aclTensor *query_padding, const aclTensor *kv_padding, const aclTensor *key_antiquant_scale,            \
      const aclTensor *key_antiquant_offset, const aclTensor *value_antiquant_scale,                                \
      const aclTensor *value_antiquant_offset, const aclTensor *key_prefix, const aclTensor *value_prefix,          \
      const aclIntArray *prefix_length
#define FUSED_OPTIONS                                                                                          \
  int64_t heads, double scale, int64_t pre, int64_t next, char *layout, int64_t groups, int64_t sparse_mode,   \
      int64_t inner_precise, int64_t page, int64_t antiquant_mode, bool wants_lse, int64_t key_antiquant_mode, \
      int64_t value_antiquant_mode
#define FUSED_RESULTS const aclTensor *out, const aclTensor *lse
#define FILL_FUSED                                                                                             \
  fill_inputs(request, query, key, value, pse, mask);                                                          \
  request.lengths_q = opapi::value(lengths_q);                                                                 \
  request.lengths_k = opapi::value(lengths_k);                                                                 \
  request.table = opapi::value(table);                                                                         \
  fill_options(request, heads, groups, scale, layout, inner_precise);                                          \
  fill_sparse(request, sparse_mode, pre, next);                                                                \
  request.page = page;                                                                                         \
  request.wants_lse = wants_lse;                                                                               \
  request.out = opapi::value(out);                                                                             \
  request.lse = opapi::value(lse);                                                                             \
  refuse(request, {dequant1, quant1, dequant2, quant2, quant_offset2}, "quantisation");                        \
  refuse(request,                                                                                              \
         {antiquant_scale, antiquant_offset, key_antiquant_scale, key_antiquant_offset, value_antiquant_scale, \
          value_antiquant_offset},                                                                             \
         "a quantised cache");                                                                                 \
  refuse(request, {query_padding, kv_padding}, "padding on the left");                                         \
  refuse(request, {key_prefix, value_prefix}, "a shared prefix")

namespace llm_adapt::opapi::inference {
namespace {

void fill_inputs(Request& request, const aclTensor* query, const aclTensorList* key, const aclTensorList* value,
                 const aclTensor* pse, const aclTensor* mask) {
  request.query = opapi::value(query);
  request.keys = opapi::value(key);
  request.values = opapi::value(value);
  request.pse = opapi::value(pse);
  request.mask = opapi::value(mask);
}

void fill_options(Request& request, int64_t heads, int64_t groups, double scale, char* layout,
                  int64_t inner_precise) {
  request.heads = heads;
  request.groups = groups;
  request.scale = scale;
  request.layout = opapi::value(layout);
  request.inner_precise = inner_precise;
}

void fill_sparse(Request& request, int64_t sparse_mode, int64_t pre, int64_t next) {
  request.sparse_mode = sparse_mode;
  request.pre = pre;
  request.next = next;
}

void fill_rope(Request& request, const aclTensor* query_rope, const aclTensor* key_rope) {
  request.query_rope = opapi::value(query_rope);
  request.key_rope = opapi::value(key_rope);
}

void refuse(Request& request, std::initializer_list<const aclTensor*> given, const char* what) {
  for (const aclTensor* tensor : given) {
    if (tensor != nullptr) request.unmodelled = std::string("attention with ") + what + " is not modelled";
  }
}

// The fused operator is there on A2 and A3; on Ascend950 in its fifth version only.
void check_fused(const Request& request) {
  check(family() == Family::kA2 || family() == Family::kA3,
        "this version of npu_fused_infer_attention_score is not there on ", soc_name());
  check_request(request);
}

void check_fused_v5(const Request& request) {
  check(family() == Family::kA5, "aclnnFusedInferAttentionScoreV5 is for Ascend950 here, this is ", soc_name());
  check_request(request);
}

// The older two are there on 310P too, which takes float16 and no grouped heads.
void check_older(const Request& request) {
  check(family() != Family::kA1 && family() != Family::kA5, "this operator is not there on ", soc_name());
  if (family() == Family::k310P) {
    check(request.query.scalar_type() == at::kHalf, soc_name(), " takes float16");
    check(request.key_heads() == request.heads, soc_name(), " takes as many key heads as query heads");
  }
  check_request(request);
}

void check_incremental(const Request& request) {
  check_older(request);
  check(is_decoding(request), "npu_incre_flash_attention takes one query, not ", request.query.sizes());
}

}  // namespace

INFERENCE(aclnnPromptFlashAttentionV3, check_older,
          (const aclTensor* query, const aclTensor* key, const aclTensor* value, const aclTensor* pse,
           const aclTensor* mask, const aclIntArray* lengths_q, const aclIntArray* lengths_k,
           const aclTensor* dequant1, const aclTensor* quant1, const aclTensor* dequant2, const aclTensor* quant2,
           const aclTensor* quant_offset2, int64_t heads, double scale, int64_t pre, int64_t next, char* layout,
           int64_t groups, int64_t sparse_mode, int64_t inner_precise, const aclTensor* out),
          fill_inputs(request, query, nullptr, nullptr, pse, mask);
          request.keys = {opapi::value(key)};
          request.values = {opapi::value(value)};
          request.lengths_q = opapi::value(lengths_q);
          request.lengths_k = opapi::value(lengths_k);
          fill_options(request, heads, groups, scale, layout, inner_precise);
          fill_sparse(request, sparse_mode, pre, next);
          request.out = opapi::value(out);
          refuse(request, {dequant1, quant1, dequant2, quant2, quant_offset2}, "quantisation"))

INFERENCE(aclnnIncreFlashAttentionV4, check_incremental,
          (const aclTensor* query, const aclTensorList* key, const aclTensorList* value, const aclTensor* pse,
           const aclTensor* mask, const aclIntArray* lengths, const aclTensor* dequant1, const aclTensor* quant1,
           const aclTensor* dequant2, const aclTensor* quant2, const aclTensor* quant_offset2,
           const aclTensor* antiquant_scale, const aclTensor* antiquant_offset, const aclTensor* table,
           const aclTensor* kv_padding, int64_t heads, double scale, char* layout, int64_t groups, int64_t page,
           int64_t inner_precise, const aclTensor* out),
          fill_inputs(request, query, key, value, pse, mask);
          request.lengths_k = opapi::value(lengths);
          request.table = opapi::value(table);
          request.page = page;
          fill_options(request, heads, groups, scale, layout, inner_precise);
          request.out = opapi::value(out);
          refuse(request, {dequant1, quant1, dequant2, quant2, quant_offset2}, "quantisation");
          refuse(request, {antiquant_scale, antiquant_offset}, "a quantised cache");
          refuse(request, {kv_padding}, "padding on the left"))

INFERENCE(aclnnFusedInferAttentionScoreV2, check_fused, (FUSED_INPUTS, FUSED_OPTIONS, FUSED_RESULTS), FILL_FUSED)

INFERENCE(aclnnFusedInferAttentionScoreV3, check_fused,
          (FUSED_INPUTS, const aclTensor* query_rope, const aclTensor* key_rope, const aclTensor* rope_scale,
           FUSED_OPTIONS, FUSED_RESULTS),
          FILL_FUSED;
          fill_rope(request, query_rope, key_rope);
          refuse(request, {rope_scale}, "a quantised cache"))

INFERENCE(aclnnFusedInferAttentionScoreV4, check_fused,
          (FUSED_INPUTS, const aclTensor* query_rope, const aclTensor* key_rope, const aclTensor* rope_scale,
           const aclTensor* query_scale, const aclTensor* sink, FUSED_OPTIONS, int64_t query_mode, FUSED_RESULTS),
          FILL_FUSED;
          fill_rope(request, query_rope, key_rope);
          request.sink = opapi::value(sink);
          refuse(request, {rope_scale, query_scale}, "quantisation"))

INFERENCE(aclnnFusedInferAttentionScoreV5, check_fused_v5,
          (FUSED_INPUTS, const aclTensor* query_rope, const aclTensor* key_rope, const aclTensor* rope_scale,
           const aclTensor* query_scale, const aclTensor* sink, const aclIntArray* start_q,
           const aclIntArray* start_k, FUSED_OPTIONS, int64_t query_mode, int64_t pse_type, FUSED_RESULTS),
          FILL_FUSED;
          fill_rope(request, query_rope, key_rope);
          request.sink = opapi::value(sink);
          refuse(request, {rope_scale, query_scale}, "quantisation"))

}  // namespace llm_adapt::opapi::inference
