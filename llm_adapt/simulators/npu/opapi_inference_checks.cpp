// What the documents of attention for inference refuse, before anything runs.
#include "opapi_inference.h"

namespace llm_adapt::opapi::inference {
namespace {

void check_layout(const Request& request) {
  const std::string layout = request.layout;
  constexpr const char* kKnown[] = {"BSH",       "BSND",      "BNSD",      "TND",     "NTD",
                                    "BNSD_BSND", "BSH_BNSD",  "BSND_BNSD", "NTD_TND", "BSH_NBSD",
                                    "BSND_NBSD", "BNSD_NBSD", "TND_NTD"};
  bool is_known = false;
  for (const char* known : kKnown) is_known = is_known || layout == known;
  check(is_known, "input_layout ", layout, " is not modelled");
  check(request.keys.size() == 1 && request.values.size() == 1, "a list of keys for each batch is not modelled");
}

void check_types(const Request& request) {
  const at::ScalarType type = request.query.scalar_type();
  check(type == at::kHalf || type == at::kBFloat16, "q is float16 or bfloat16, not ", type);
  check(request.key().scalar_type() == type && request.value().scalar_type() == type, "k and v are ", type,
        " like q; "
        "those of 8 and 4 bits are not modelled");
  check(request.query.is_contiguous() && request.key().is_contiguous() && request.value().is_contiguous(),
        "q, k and v are "
        "contiguous");
}

void check_heads(const Request& request) {
  check(request.heads >= 1 && request.heads <= 256, "num_heads is 1 to 256, not ", request.heads);
  const int64_t groups = request.key_heads();
  check(request.heads % groups == 0 && request.heads / groups <= 64, request.heads, " query heads and ", groups,
        " key heads: one must divide the other, by up to 64");
  const Tensor query = heads_first(request.query, request.heads, request.layout_in());
  check(query.size(1) == request.heads, "num_heads is ", request.heads, ", and q has ", query.size(1), " heads");
  const int64_t size = query.size(3);
  check(size >= 1 && size <= 512 && size % 16 == 0, "head sizes are up to 512 in steps of 16, not ", size);
  if (!request.is_packed()) return;
  const bool fits = size == 64 || size == 128 || size == 192 || (size == 512 && request.query_rope.defined());
  check(fits, "layout ", request.layout, " takes head sizes 64, 128 and 192, and 512 with query_rope; not ", size);
}

void check_keys(const Request& request) {
  if (request.table.defined()) return;
  const int64_t groups = request.key_heads();
  check(request.key().dim() == request.query.dim(), "k has the axes of q without a block_table");
  const Tensor key = heads_first(request.key(), groups, request.layout_in());
  const Tensor value = heads_first(request.value(), groups, request.layout_in());
  check(key.size(1) == groups && value.size(1) == groups, "num_key_value_heads is ", groups, ", and k has ",
        key.size(1));
  check(key.size(0) == heads_first(request.query, request.heads, request.layout_in()).size(0),
        "q and k have one batch size");
  check(key.size(2) == value.size(2), "k and v have one length");
}

void check_ends(const Ints& ends, int64_t tokens, const char* name) {
  int64_t before = 0;
  for (int64_t end : *ends) {
    check(end >= before, name, " are cumulative ends: ", end, " cannot follow ", before);
    before = end;
  }
  check(before <= tokens, name, " end at ", before, ", and there are ", tokens, " tokens");
}

void check_packed(const Request& request) {
  const bool has_lists = request.lengths_q && request.lengths_k && !request.lengths_q->empty();
  check(has_lists && request.lengths_q->size() == request.lengths_k->size(), "layout ", request.layout,
        " takes "
        "actual_seq_lengths and actual_seq_lengths_kv of one length");
  check(request.lengths_q->size() <= 4096, "up to 4096 sequences are taken, not ", request.lengths_q->size());
  check(!request.pse.defined(), "layout ", request.layout, " takes no pse_shift");
  check_ends(request.lengths_q, queries(request), "actual_seq_lengths");
  if (request.table.defined()) return;
  const Tensor key = heads_first(request.key(), request.key_heads(), request.layout_in());
  check_ends(request.lengths_k, key.size(2), "actual_seq_lengths_kv");
}

void check_lengths(const Ints& lengths, int64_t batch, int64_t most, const char* name) {
  if (!lengths || lengths->empty()) return;
  const auto count = static_cast<int64_t>(lengths->size());
  check(count == 1 || count >= batch, name, " has ", count, " entries for ", batch, " batches");
  for (int64_t length : *lengths) {
    check(length >= 0 && length <= most, name, " holds ", length, ", which is not in [0, ", most, "]");
  }
}

void check_batches(const Request& request) {
  const int64_t batch = request.query.size(0);
  check(batch <= 65536, "up to 65536 batches are taken, not ", batch);
  if (!is_decoding(request)) check_lengths(request.lengths_q, batch, queries(request), "actual_seq_lengths");
  if (request.table.defined()) return;
  const int64_t keys = heads_first(request.key(), request.key_heads(), request.layout_in()).size(2);
  check_lengths(request.lengths_k, batch, keys, "actual_seq_lengths_kv");
  check(!is_decoding(request) || keys <= 262144, "one query takes up to 262144 keys, not ", keys);
}

void check_bias(const Request& request, const std::vector<Sequence>& all) {
  if (!request.pse.defined()) return;
  const auto sizes = request.pse.sizes();
  check(request.pse.scalar_type() == request.query.scalar_type(), "pse_shift has the dtype of q");
  const auto batch = static_cast<int64_t>(all.size());
  check(sizes.size() == 4 && (sizes[0] == 1 || sizes[0] == batch) && sizes[1] == request.heads,
        "pse_shift is [1 or B, N, S, "
        "K], not ",
        sizes);
  for (const Sequence& one : all) {
    check(sizes[2] >= one.rows && sizes[3] >= one.keys, "pse_shift ", sizes, " is too small for ", one.rows,
          " queries and ", one.keys, " keys");
  }
}

void check_rope(const Request& request) {
  if (!request.query_rope.defined() && !request.key_rope.defined()) return;
  check(request.query_rope.defined() && request.key_rope.defined(), "query_rope and key_rope come together");
  const int64_t size = heads_first(request.query, request.heads, request.layout_in()).size(3);
  const int64_t rope = heads_first(request.query_rope, request.heads, request.layout_in()).size(3);
  check((size == 512 || size == 128) && rope == 64, "query_rope takes head sizes 512 or 128, and 64 of its own; not ",
        size, " and ", rope);
  check(!request.pse.defined(), "query_rope takes no pse_shift");
  check(size != 512 || !request.wants_lse, "query_rope with head size 512 gives no log-sum-exp");
}

}  // namespace

void check_pages(const Request& request, const std::vector<Sequence>& all) {
  if (!request.table.defined()) return;
  const int64_t page = request.page;
  const std::string layout = request.layout_in();
  check(request.table.scalar_type() == at::kInt && request.table.dim() == 2, "block_table is int32 [B, pages]");
  check(request.lengths_k && !request.lengths_k->empty(), "block_table takes actual_seq_lengths_kv");
  if (request.is_packed()) {
    check(page > 0 && page <= 1024 && page % 16 == 0, "block_size is up to 1024 in steps of 16, not ", page);
  } else if (is_decoding(request)) {
    check(page > 0 && page <= 512 && page % 16 == 0, "block_size with one query is up to 512 in steps of 16, not ",
          page);
  } else {
    check(page >= 128 && page <= 512 && page % 128 == 0, "block_size is 128 to 512 in steps of 128, not ", page);
  }
  for (const Tensor& pages : {request.key(), request.value()}) {
    const bool takes_heads = layout != "BSH" && layout != "BSND";
    check(pages.dim() == 3 || (pages.dim() == 4 && takes_heads), "pages are [pages, C, G * D]",
          takes_heads ? " or [pages, G, C, D]" : "", " with layout ", layout, ", not ", pages.sizes());
    check(pages.size(pages.dim() == 3 ? 1 : 2) == page, "block_size is ", page, ", and the pages are ",
          pages.sizes());
    check(pages.dim() == 3 ? pages.size(2) % request.key_heads() == 0 : pages.size(1) == request.key_heads(),
          "num_key_value_heads is ", request.key_heads(), ", and the pages are ", pages.sizes());
  }
  check(request.table.size(0) == static_cast<int64_t>(all.size()), "block_table has ", request.table.size(0),
        " rows for ", all.size(), " batches");
  for (const Sequence& one : all) {
    check(one.keys >= 0 && one.keys <= request.table.size(1) * page, "block_table has ", request.table.size(1),
          " pages a row, too few for ", one.keys, " keys");
  }
}

void check_request(const Request& request) {
  check(request.unmodelled.empty(), request.unmodelled);
  check_layout(request);
  check_types(request);
  check_heads(request);
  check_keys(request);
  request.is_packed() ? check_packed(request) : check_batches(request);
  check_rope(request);
  check(!request.table.defined() || (request.lengths_k && !request.lengths_k->empty()),
        "block_table takes "
        "actual_seq_lengths_kv");
  const std::vector<Sequence> all = sequences(request);
  check_pages(request, all);
  check_mask(request, all);
  check_bias(request, all);
  check(request.inner_precise >= 0 && request.inner_precise <= 3, "inner_precise is 0 to 3, not ",
        request.inner_precise);
}

}  // namespace llm_adapt::opapi::inference
