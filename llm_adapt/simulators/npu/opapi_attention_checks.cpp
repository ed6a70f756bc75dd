// What the documents of npu_fusion_attention refuse, before anything runs.
#include "opapi_attention.h"

namespace llm_adapt::opapi::attention {
namespace {

constexpr int64_t kMostHeads = 256;
constexpr int64_t kMostHeadSize = 768;
constexpr int64_t kMostTokens = 1000000;   // "1M", of a sequence and of all packed ones
constexpr int64_t kMostBatches = 2000000;  // "2M"
constexpr int64_t kMostSequences = 2048;   // "2K", packed

void check_device() {
  check(family() != Family::kA1 && family() != Family::k310P, "attention for training is not there on ", soc_name());
}

void check_types(const Call& call) {
  const at::ScalarType type = call.query.scalar_type();
  check(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "q is float16, bfloat16 or float32, not ",
        type);
  check(call.key.scalar_type() == type && call.value.scalar_type() == type, "q, k and v have one dtype, not ", type,
        ", ", call.key.scalar_type(), " and ", call.value.scalar_type());
}

void check_layout(const Call& call) {
  const std::string& layout = call.layout;
  const bool has_three = layout == "BSH" || layout == "SBH" || layout == "TND";
  check(has_three || layout == "BSND" || layout == "BNSD", "input_layout is BSH, SBH, BSND, BNSD or TND, not ",
        layout);
  for (const Tensor* tensor : {&call.query, &call.key, &call.value}) {
    check(tensor->dim() == (has_three ? 3 : 4), "layout ", layout, " takes ", has_three ? 3 : 4, " axes, not ",
          tensor->sizes());
  }
  if (call.is_packed()) return;
  const int64_t batch_axis = layout == "SBH" ? 1 : 0;
  const int64_t batch = call.query.size(batch_axis);
  check(call.key.size(batch_axis) == batch && call.value.size(batch_axis) == batch, "q, k and v have one batch size");
  check(batch <= kMostBatches, "up to 2M batches are taken, not ", batch);
}

void check_heads(const Call& call) {
  check(call.heads > 0 && call.heads <= kMostHeads, "head_num is 1 to 256, not ", call.heads);
  if (call.layout == "BSH" || call.layout == "SBH") {
    check(call.query.size(2) % call.heads == 0, "head_num ", call.heads, " does not divide q's ", call.query.size(2));
    const int64_t size = call.query.size(2) / call.heads;
    check(size > 0 && call.key.size(2) % size == 0 && call.key.size(2) > 0, "k's ", call.key.size(2),
          " is no multiple of the head size ", size);
    check(call.value.size(2) % (call.key.size(2) / size) == 0, "v's ", call.value.size(2),
          " does not divide by k's heads");
  } else {
    const int64_t axis = call.layout == "BSND" ? 2 : 1;
    check(call.query.size(axis) == call.heads, "head_num is ", call.heads, ", and q has ", call.query.size(axis),
          " heads");
    check(call.key.size(axis) == call.value.size(axis), "k and v have one number of heads");
  }
  const int64_t groups = key_heads(call);
  check(groups > 0 && call.heads % groups == 0, call.heads, " query heads do not divide by ", groups, " key heads");
}

void check_sizes(const Call& call) {
  const Tensor query = heads_first(call.query, call.heads, call.layout);
  const Tensor key = heads_first(call.key, key_heads(call), call.layout);
  const Tensor value = heads_first(call.value, key_heads(call), call.layout);
  check(key.size(2) == value.size(2), "k and v have one length, not ", key.size(2), " and ", value.size(2));
  check(key.size(3) == query.size(3) && value.size(3) <= key.size(3),
        "head sizes: q and k the same, v no wider; not ", query.size(3), ", ", key.size(3), " and ", value.size(3));
  check(query.size(3) >= 1 && query.size(3) <= kMostHeadSize, "head sizes are 1 to 768, not ", query.size(3));
  check(query.size(2) <= kMostTokens && key.size(2) <= kMostTokens, "up to 1M tokens are taken, not ", query.size(2),
        " and ", key.size(2));
}

void check_ends(const Ints& ends, int64_t tokens, size_t count, const char* name) {
  int64_t before = 0;
  size_t left_out = 0;
  for (int64_t end : *ends) {
    if (end == 0 && before > 0) {
      ++left_out;
      continue;
    }
    check(end >= before && left_out == 0, name, " are cumulative ends: ", end, " cannot follow ", before);
    before = end;
  }
  const bool is_whole = before == tokens || (left_out > 0 && before < tokens);
  check(is_whole, name, " end at ", before, ", and there are ", tokens,
        " tokens; what a device does then is not modelled");
  check(ends->size() == count, "actual_seq_qlen and actual_seq_kvlen have ", count, " and ", ends->size(),
        " entries");
}

void check_packed(const Call& call) {
  if (!call.is_packed()) {
    const bool has_ends = (call.ends_q && !call.ends_q->empty()) || (call.ends_k && !call.ends_k->empty());
    check(!has_ends, "actual_seq_qlen and actual_seq_kvlen are for layout TND, not ", call.layout);
    return;
  }
  check(call.ends_q && call.ends_k && !call.ends_q->empty(), "layout TND takes actual_seq_qlen and actual_seq_kvlen");
  const size_t count = call.ends_q->size();
  check(static_cast<int64_t>(count) <= kMostSequences, "up to 2K sequences are taken, not ", count);
  check_ends(call.ends_q, call.query.size(0), count, "actual_seq_qlen");
  check_ends(call.ends_k, call.key.size(0), count, "actual_seq_kvlen");
}

void check_rope(const Call& call) {
  if (!call.query_rope.defined() && !call.key_rope.defined()) return;
  check(call.query_rope.defined() && call.key_rope.defined(), "query_rope and key_rope come together");
  check(call.is_packed() && call.mask.defined(), "query_rope takes layout TND and a mask");
  check(call.query.scalar_type() == at::kBFloat16 && call.query_rope.scalar_type() == at::kBFloat16 &&
            call.key_rope.scalar_type() == at::kBFloat16,
        "query_rope takes bfloat16");
  check(call.keep_prob == 1.0 && !call.drop_mask.defined() && !call.pse.defined(),
        "query_rope takes no dropout and no pse");
  const auto size = call.query_rope.size(2);
  check(size == call.key_rope.size(2) && size % 8 == 0,
        "query_rope and key_rope have one head size, a multiple of 8, not ", size, " and ", call.key_rope.size(2));
  check(call.query_rope.size(0) == call.query.size(0) && call.query_rope.size(1) == call.query.size(1) &&
            call.key_rope.size(0) == call.key.size(0) && call.key_rope.size(1) == call.key.size(1),
        "query_rope and key_rope are like q and k but for the head size");
}

void check_dropout(const Call& call, const std::vector<Sequence>& all) {
  check(call.keep_prob > 0 && call.keep_prob <= 1, "keep_prob is in (0, 1], not ", call.keep_prob);
  if (call.keep_prob == 1.0) {
    check(!call.drop_mask.defined(), "a dropout mask with keep_prob 1 is not modelled");
    return;
  }
  if (!call.drop_mask.defined()) {
    check(family() == Family::kA5, "keep_prob ", call.keep_prob, " takes a dropout mask on ", soc_name());
    return;
  }
  int64_t bits = 0;
  for (const Sequence& one : all) bits += call.heads * one.rows * one.keys;
  check(call.drop_mask.scalar_type() == at::kByte && call.drop_mask.dim() == 1 && call.drop_mask.numel() * 8 >= bits,
        "a dropout mask is uint8 with a bit for each of ", bits, " scores, not ", call.drop_mask.sizes());
}

void check_sink(const Call& call) {
  if (!call.sink.defined()) return;
  check(call.sink.scalar_type() == at::kFloat, "sink is float32, not ", call.sink.scalar_type());
  check(call.sink.dim() == 1 && call.sink.size(0) == call.heads, "sink has shape [head_num], not ",
        call.sink.sizes());
}

void check_gradient(const Call& call) {
  if (!call.dy.defined()) return;
  check(call.softmax_max.defined() && call.softmax_sum.defined(), "a gradient takes softmax_max and softmax_sum");
  check(call.out.defined() && call.out.sizes() == call.dy.sizes(),
        "a gradient takes the output of attention, of dy's shape");
  check(call.softmax_max.is_contiguous() && call.softmax_sum.is_contiguous(),
        "softmax_max and softmax_sum are contiguous");
}

}  // namespace

void check_call(const Call& call) {
  check_device();
  check(call.unmodelled.empty(), call.unmodelled);
  check(!call.padding_mask.defined(), "padding_mask is reserved and takes nothing");
  check_types(call);
  check_layout(call);
  check_heads(call);
  check_sizes(call);
  check_packed(call);
  const std::vector<Sequence> all = sequences(call);
  for (const Sequence& one : all) {
    check(one.rows == 0 || one.keys > 0, "sequence ", one.index, " has ", one.rows, " queries and no keys");
  }
  if (all.empty()) return;
  check_pse(call, all);
  check_masks(call, all);
  check_rope(call);
  check_dropout(call, all);
  check_sink(call);
  check_gradient(call);
  check(call.softmax_layout.empty() || call.softmax_layout == "same_as_input",
        "the layout of the softmax is '' or "
        "'same_as_input', not ",
        call.softmax_layout);
}

}  // namespace llm_adapt::opapi::attention
