// Two results of attention to different keys, made into that of all keys.
//
//     top = max(top1, top2)    sum = sum1 exp(top1 - top) + sum2 exp(top2 - top)
//     out = (out1 sum1 exp(top1 - top) + out2 sum2 exp(top2 - top)) / sum
//
// Layout SBH: out [S, B, H], statistics [B, N, S, 8]. Layout TND: out [T, N, D], statistics shaped [T, N, 8], which
// stand sequence by sequence as [N, S, 8] unless the layout of the softmax is TND; so the lengths are needed.
// Source: document of aclnnRingAttentionUpdateV2.
#include "opapi_attention.h"

namespace llm_adapt::opapi::attention {
namespace {

struct Part {
  Tensor out;
  Tensor top;
  Tensor sum;
};

void check_part(const Part& part, const Part& like) {
  check(part.out.sizes() == like.out.sizes() && part.out.scalar_type() == like.out.scalar_type(),
        "both outputs have one shape and dtype");
  for (const Tensor& statistic : {part.top, part.sum}) {
    check(statistic.scalar_type() == at::kFloat && statistic.sizes() == like.top.sizes(),
          "the statistics are float32 of one "
          "shape, not ",
          statistic.scalar_type(), " ", statistic.sizes());
  }
}

void check_update(Tensor out1, Tensor top1, Tensor sum1, Tensor out2, Tensor top2, Tensor sum2, Tensor ends,
                  std::string layout, std::string softmax_layout, Tensor, Tensor, Tensor) {
  const at::ScalarType type = out1.scalar_type();
  check(type == at::kFloat || type == at::kHalf || type == at::kBFloat16, "outputs are float16, bfloat16 or float32");
  check(layout == "SBH" || layout == "TND", "input_layout is SBH or TND, not ", layout);
  check(softmax_layout.empty() || softmax_layout == "SBH" || softmax_layout == "TND",
        "input_softmax_layout is '', SBH or "
        "TND, not ",
        softmax_layout);
  check(out1.dim() == 3 && top1.dim() == (layout == "SBH" ? 4 : 3) && top1.size(-1) == 8, "layout ", layout,
        " takes outputs of 3 axes and statistics of ", layout == "SBH" ? "[B, N, S, 8]" : "[T, N, 8]", ", not ",
        out1.sizes(), " and ", top1.sizes());
  check_part({out1, top1, sum1}, {out1, top1, sum1});
  check_part({out2, top2, sum2}, {out1, top1, sum1});
  if (layout == "SBH") return;
  check(ends.defined() && ends.scalar_type() == at::kLong, "layout TND takes actual_seq_qlen in int64, from 0 on");
  const bool is_a2_or_a3 = family() == Family::kA2 || family() == Family::kA3;
  const int64_t size = out1.size(2);
  check(!is_a2_or_a3 || (out1.size(1) <= 256 && size <= 768 && size % 64 == 0),
        "layout TND takes up to 256 heads and a head "
        "size up to 768 in steps of 64, not ",
        out1.size(1), " and ", size);
}

// Everything as [..., N, D] and [..., N, 1] in float32.
Tensor factors(const Tensor& top, const Tensor& sum, const Tensor& new_top, const Tensor& new_sum) {
  return (top - new_top).exp() * sum / new_sum;
}

void merge(const Part& one, const Part& two, const Part& to, const std::function<Tensor(const Tensor&)>& beside) {
  const Tensor top = at::maximum(one.top, two.top);
  const Tensor sum = one.sum * (one.top - top).exp() + two.sum * (two.top - top).exp();
  const Tensor first = beside(factors(one.top, one.sum, top, sum).narrow(-1, 0, 1));
  const Tensor second = beside(factors(two.top, two.sum, top, sum).narrow(-1, 0, 1));
  to.out.copy_(wide(one.out) * first + wide(two.out) * second);
  to.top.copy_(top);
  to.sum.copy_(sum);
}

Part by_heads(const Part& part) {  // [S, B, H] -> [S, B, N, D]
  const int64_t heads = part.top.size(1);
  return {part.out.unflatten(2, {heads, part.out.size(2) / heads}), part.top, part.sum};
}

Part of_sequence(const Part& part, int64_t start, int64_t rows) {
  const int64_t heads = part.top.size(1);
  const auto stands_by_head = [&](const Tensor& whole) {
    return whole.view({-1, 8}).narrow(0, start * heads, rows * heads).view({heads, rows, 8});
  };
  return {part.out.narrow(0, start, rows), stands_by_head(part.top), stands_by_head(part.sum)};
}

void merge_sequences(const Part& one, const Part& two, const Part& to, const Tensor& ends) {
  const Tensor places = ends.contiguous();
  const auto* end = places.data_ptr<int64_t>();
  check(end[0] == 0 && end[places.numel() - 1] == one.out.size(0), "actual_seq_qlen goes from 0 to ", one.out.size(0),
        ", and was given from ", end[0], " to ", end[places.numel() - 1]);
  for (int64_t i = 1; i < places.numel(); ++i) {
    const int64_t start = end[i - 1];
    const int64_t rows = end[i] - start;
    check(rows >= 0, "actual_seq_qlen rises");
    merge(of_sequence(one, start, rows), of_sequence(two, start, rows), of_sequence(to, start, rows),
          [](const Tensor& factor) { return factor.transpose(0, 1); });
  }
}

void update(Tensor out1, Tensor top1, Tensor sum1, Tensor out2, Tensor top2, Tensor sum2, Tensor ends,
            std::string layout, std::string softmax_layout, Tensor out, Tensor top, Tensor sum) {
  const Part one{out1, top1.contiguous(), sum1.contiguous()};
  const Part two{out2, top2.contiguous(), sum2.contiguous()};
  const Part to{out, top, sum};
  if (layout == "SBH") {
    merge(by_heads(one), by_heads(two), by_heads(to),
          [](const Tensor& factor) { return factor.permute({2, 0, 1, 3}); });
  } else if (softmax_layout == "TND") {
    merge(one, two, to, [](const Tensor& factor) { return factor; });
  } else {
    merge_sequences(one, two, to, ends);
  }
}

}  // namespace

ACLNN_CHECKED(aclnnRingAttentionUpdateV2, check_update, update,
              (const aclTensor* out1, const aclTensor* top1, const aclTensor* sum1, const aclTensor* out2,
               const aclTensor* top2, const aclTensor* sum2, const aclTensor* ends, char* layout,
               char* softmax_layout, const aclTensor* out, const aclTensor* top, const aclTensor* sum),
              out1, top1, sum1, out2, top2, sum2, ends, layout, softmax_layout, out, top, sum)

}  // namespace llm_adapt::opapi::attention
