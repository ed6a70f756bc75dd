// scaled_dot_product_attention on an MLU: which of three paths it takes (sdp_utils.h of torch_mlu d578002), and the
// memory-efficient path, which torch's CPU does not have.
#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/Context.h>
#include <ATen/native/transformers/attention.h>
#include <torch/library.h>

#include <cmath>

#include "mirror.h"
#include "mlu.h"
#include "randomness.h"

namespace llm_adapt::mlu {
namespace {

using at::Tensor;

enum Path : int64_t { kMath = 0, kFlash = 1, kEfficient = 2 };  // sdp::SDPBackend

int64_t whole(int64_t length, int64_t block) { return (length + block - 1) / block; }

// Enough work, and not too much padding, for the fused kernels of capability 5.
bool worth_fusing(const Tensor& query, const Tensor& key) {
  const int64_t rows = query.size(2);
  const int64_t columns = key.size(2);
  if (major_capability() != 5 || rows == 0 || columns == 0) {
    return false;
  }
  const int64_t blocks = query.size(0) * query.size(1) * whole(columns, 256);
  const double padded = static_cast<double>(whole(rows, 512) * 512) * static_cast<double>(whole(columns, 256) * 256);
  return blocks > 12 && static_cast<double>(rows) * static_cast<double>(columns) / padded >= 0.6;
}

bool good_head_size(int64_t size) { return size >= 64 && size <= 256 && size % 8 == 0; }

bool fits_fused(const Tensor& query, const Tensor& key, const Tensor& value) {
  for (const Tensor* each : {&query, &key, &value}) {
    const bool is_half = each->scalar_type() == at::kHalf || each->scalar_type() == at::kBFloat16;
    if (!is_half || each->dim() != 4 || each->stride(3) != 1 || !good_head_size(each->size(3))) {
      return false;
    }
  }
  const bool same_heads = query.size(1) == key.size(1) && query.size(1) == value.size(1);
  const bool same_batch = query.size(0) == key.size(0) && query.size(0) == value.size(0);
  return same_heads && same_batch && query.size(3) == key.size(3) && worth_fusing(query, key);
}

int64_t choose(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& mask, double dropout,
    bool is_causal, std::optional<double> scale, bool enable_gqa) {
  const auto& context = at::globalContext();
  if (fits_fused(query, key, value)) {
    const bool one_size = query.size(3) == value.size(3);
    // Dropout goes to the efficient path: torch's CPU kernel behind the flash path has none.
    if (context.userEnabledFlashSDP() && !mask.has_value() && one_size && dropout == 0.0) {
      return kFlash;
    }
    if (context.userEnabledMemEfficientSDP()) {
      return kEfficient;
    }
  }
  TORCH_CHECK(
      context.userEnabledMathSDP(), "No available kernel. Aborting execution: the MLU's fused attention refuses these "
      "tensors, and the math path is switched off.");
  TORCH_CHECK_TYPE(
      !enable_gqa, "_scaled_dot_product_attention_math() got an unexpected keyword argument 'enable_gqa': the math "
      "path of torch_mlu has none. Repeat key and value over the heads first.");
  return kMath;
}

// What the forward and the backward compute alike, in float32 on the host.
struct Weights {
  Tensor query, key, value;
  Tensor probabilities;  // before dropout
  Tensor keep;           // dropout's factors, undefined without
  Tensor logsumexp;
  double scale;
};

Tensor dropout_factors(at::IntArrayRef size, double dropout, uint64_t seed, uint64_t offset) {
  at::Generator generator = at::detail::createCPUGenerator(host::scramble(seed, offset));
  return at::empty(size, at::kFloat).bernoulli_(1.0 - dropout, generator).div_(1.0 - dropout);
}

Weights attend(
    const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias, double dropout, bool is_causal,
    std::optional<double> scale, uint64_t seed, uint64_t offset) {
  Weights made;
  made.query = host::host_alias(query).to(at::kFloat);
  made.key = host::host_alias(key).to(at::kFloat);
  made.value = host::host_alias(value).to(at::kFloat);
  made.scale = scale.value_or(1.0 / std::sqrt(static_cast<double>(query.size(3))));
  Tensor scores = at::matmul(made.query, made.key.transpose(2, 3)).mul_(made.scale);
  if (is_causal) {
    Tensor later = at::ones({query.size(2), key.size(2)}, at::kBool).triu_(1);
    scores.masked_fill_(later, -std::numeric_limits<double>::infinity());
  }
  if (bias.defined()) {
    scores.add_(host::host_alias(bias).to(at::kFloat));
  }
  made.logsumexp = at::logsumexp(scores, {3});
  made.probabilities = at::softmax(scores, 3);
  if (dropout > 0.0) {
    made.keep = dropout_factors(scores.sizes(), dropout, seed, offset);
  }
  return made;
}

Tensor to_mlu(const Tensor& on_host, at::ScalarType dtype, c10::Device where) {
  return on_host.to(dtype).to(where);
}

int64_t number(const Tensor& tensor) { return tensor.defined() && tensor.numel() > 0 ? tensor.item<int64_t>() : 0; }

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient(
    const Tensor& query, const Tensor& key, const Tensor& value, const std::optional<Tensor>& bias,
    bool compute_log_sumexp, double dropout, bool is_causal, std::optional<double> scale) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  uint64_t seed = 0;
  uint64_t offset = 0;
  if (dropout > 0.0) {
    at::Generator generator = default_generator(query.device().index());
    std::lock_guard<std::mutex> lock(generator.mutex());
    seed = generator.current_seed();
    offset = generator.get_offset();
    generator.set_offset(offset + 4);
  }
  const Weights made =
      attend(query, key, value, bias.value_or(Tensor()), dropout, is_causal, scale, seed, offset);
  Tensor weights = made.keep.defined() ? made.probabilities * made.keep : made.probabilities;
  Tensor output = at::matmul(weights, made.value);
  const auto numbers = at::TensorOptions().dtype(at::kLong).device(query.device());
  return {
      to_mlu(output, query.scalar_type(), query.device()), to_mlu(made.logsumexp, at::kFloat, query.device()),
      at::full({}, static_cast<int64_t>(seed), numbers), at::full({}, static_cast<int64_t>(offset), numbers)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> efficient_backward(
    const Tensor& grad, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& bias,
    const Tensor& output, const Tensor& logsumexp, const Tensor& seed, const Tensor& offset, double dropout,
    std::array<bool, 4> wanted, bool is_causal, std::optional<double> scale) {
  at::AutoDispatchBelowADInplaceOrView below_autograd;
  if (!grad.defined()) {
    return {};
  }
  const Weights made = attend(
      query, key, value, bias, dropout, is_causal, scale, static_cast<uint64_t>(number(seed)),
      static_cast<uint64_t>(number(offset)));
  const Tensor upstream = host::host_alias(grad).to(at::kFloat);
  Tensor weights = made.keep.defined() ? made.probabilities * made.keep : made.probabilities;
  Tensor grad_weights = at::matmul(upstream, made.value.transpose(2, 3));
  if (made.keep.defined()) {
    grad_weights.mul_(made.keep);
  }
  Tensor mean = (grad_weights * made.probabilities).sum(3, /*keepdim=*/true);
  Tensor grad_scores = (grad_weights - mean) * made.probabilities;
  const auto where = query.device();
  const auto dtype = query.scalar_type();
  Tensor grad_bias;
  if (wanted[3] && bias.defined()) {
    grad_bias = to_mlu(at::sum_to(grad_scores, bias.sizes()), bias.scalar_type(), where);
  }
  return {
      to_mlu(at::matmul(grad_scores, made.key).mul_(made.scale), dtype, where),
      to_mlu(at::matmul(grad_scores.transpose(2, 3), made.query).mul_(made.scale), dtype, where),
      to_mlu(at::matmul(weights.transpose(2, 3), upstream), dtype, where), grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(aten, PrivateUse1, library) {
  library.impl("_fused_sdp_choice", &choose);
  library.impl("_scaled_dot_product_efficient_attention", &efficient);
  library.impl("_scaled_dot_product_efficient_attention_backward", &efficient_backward);
}

}  // namespace llm_adapt::mlu

namespace at::native {

REGISTER_PRIVATEUSE1_DISPATCH(_fused_sdp_choice_stub, &llm_adapt::mlu::choose)

}  // namespace at::native
