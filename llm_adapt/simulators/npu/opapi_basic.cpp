// The few aclnn operators that torch_npu's own C++ calls without the dispatcher: copies, casts, padding, one_hot.
//
// Every other aten operator is served by a host kernel before op-plugin sees it.
#include "opapi_legacy.h"

using namespace llm_adapt::opapi;

namespace {

void cast(const Tensor& input, int64_t, const Tensor& output) { store(output, input.to(output.scalar_type())); }

void check_cast(const Tensor& input, int64_t dtype, const Tensor& output) {
  check_no_bfloat16_on_older_chip(input, "the input");
  check_no_bfloat16_on_older_chip(output, "the output");
  const at::ScalarType asked = scalar_type(static_cast<int>(dtype));
  check(asked == output.scalar_type(), asked, " was asked of an output of ", output.scalar_type());
}

// Between dtypes, strides and, as torch's copy_, shapes that broadcast.
void inplace_copy(const Tensor& output, const Tensor& source) { output.copy_(source); }

void check_inplace_copy(const Tensor& output, const Tensor& source) {
  check_no_bfloat16_on_older_chip(output, "the output");
  check_no_bfloat16_on_older_chip(source, "the source");
}

void make_complex(const Tensor& real, const Tensor& imaginary, const Tensor& output) {
  store(output, at::complex(real, imaginary));
}

void fill_one(const Tensor& output) { output.fill_(1); }

void constant_pad(const Tensor& input, const Ints& padding, const at::Scalar& value, const Tensor& output) {
  store(output, at::constant_pad_nd(input, *padding, value));
}

void one_hot(const Tensor& input, int64_t classes, const Tensor& on, const Tensor& off, int64_t, const Tensor& output) {
  const Tensor hit = at::one_hot(input.to(at::kLong), classes).to(at::kBool);
  store(output, at::where(hit, on.to(output.scalar_type()), off.to(output.scalar_type())));
}

void check_one_hot(const Tensor&, int64_t, const Tensor& on, const Tensor& off, int64_t axis, const Tensor&) {
  check(axis == -1, "axis ", axis, " is not modelled, only -1");
  check(on.numel() == 1 && off.numel() == 1, "on and off values must have one element each");
}

// Matrix products accumulate in float32 and round once.
void matrix_product(const Tensor& left, const Tensor& right, const Tensor& output, int8_t) {
  store(output, at::mm(wide(left), wide(right)));
}

void check_product(const Tensor& left, const Tensor& right, const Tensor&, int8_t) {
  check_floating(left, "the left matrix");
  check_same_dtype(left, "the left matrix", right, "the right matrix");
}

void add_matrix_product(const Tensor& bias, const Tensor& left, const Tensor& right, const at::Scalar& beta,
                        const at::Scalar& alpha, const Tensor& output, int8_t) {
  store(output, at::addmm(wide(bias), wide(left), wide(right), beta, alpha));
}

void check_add_product(const Tensor&, const Tensor& left, const Tensor& right, const at::Scalar&, const at::Scalar&,
                       const Tensor& output, int8_t cube_math_type) {
  check_product(left, right, output, cube_math_type);
}

// npu_confusion_transpose before Ascend 950.
void confusion_transpose(const Tensor& input, const std::vector<int64_t>& order, const std::vector<int64_t>& sizes,
                         bool transpose_first, const Tensor& output) {
  store(output, transpose_first ? input.permute(order).reshape(sizes) : input.reshape(sizes).permute(order));
}
const LegacyOperator legacy_transpose("ConfusionTransposeD", [](const LegacyArguments& given) {
  confusion_transpose(given.inputs[0], given.attribute<std::vector<int64_t>>("perm"),
                      given.attribute<std::vector<int64_t>>("shape"), given.attribute<bool>("transpose_first"),
                      given.outputs[0]);
});

void aclnn_transpose(const Tensor& input, const Ints& order, const Ints& sizes, bool transpose_first,
                     const Tensor& output) {
  confusion_transpose(input, *order, *sizes, transpose_first, output);
}

}  // namespace

ACLNN(aclnnConfusionTranspose, aclnn_transpose,
      (const aclTensor* input, const aclIntArray* order, const aclIntArray* sizes, bool transpose_first,
       const aclTensor* output),
      input, order, sizes, transpose_first, output)
ACLNN_CHECKED(aclnnCast, check_cast, cast, (const aclTensor* input, int dtype, const aclTensor* output), input, dtype,
              output)
ACLNN_CHECKED(aclnnInplaceCopy, check_inplace_copy, inplace_copy, (const aclTensor* output, const aclTensor* source),
              output, source)
ACLNN(aclnnComplex, make_complex, (const aclTensor* real, const aclTensor* imaginary, const aclTensor* output), real,
      imaginary, output)
ACLNN(aclnnInplaceOne, fill_one, (const aclTensor* output), output)
ACLNN(aclnnConstantPadNd, constant_pad,
      (const aclTensor* input, const aclIntArray* padding, const aclScalar* number, const aclTensor* output), input,
      padding, number, output)
ACLNN_CHECKED(aclnnOneHot, check_one_hot, one_hot,
              (const aclTensor* input, int64_t classes, const aclTensor* on, const aclTensor* off, int64_t axis,
               const aclTensor* output),
              input, classes, on, off, axis, output)
ACLNN_CHECKED(aclnnMm, check_product, matrix_product,
              (const aclTensor* left, const aclTensor* right, const aclTensor* output, int8_t cube_math_type), left,
              right, output, cube_math_type)
ACLNN_CHECKED(aclnnAddmm, check_add_product, add_matrix_product,
              (const aclTensor* bias, const aclTensor* left, const aclTensor* right, const aclScalar* beta,
               const aclScalar* alpha, const aclTensor* output, int8_t cube_math_type),
              bias, left, right, beta, alpha, output, cube_math_type)
