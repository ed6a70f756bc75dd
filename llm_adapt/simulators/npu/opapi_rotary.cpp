// aclnnRotaryPositionEmbedding(V2) and its gradient: y = x cos + turned(x) sin.
//
// Letters of shapes: B batch, S sequence, N heads, T tokens, D head size. Sources: op-plugin document of
// npu_rotary_mul (limits of Atlas A2 and A3), CANN ops-transformer documents of the aclnn functions (Ascend 950).
#include "opapi_legacy.h"
#include "opapi_rotary.h"

using namespace llm_adapt::opapi;
using llm_adapt::Family;
using llm_adapt::family;

namespace {

constexpr int64_t kMostRows = 1000;       // of B, of N, and of B N where pairs are interleaved; exclusive
constexpr int64_t kMostTableRows = 1024;  // of B N where cos and sin need a gradient; inclusive
constexpr int64_t kMostSize = 896;        // of D; exclusive

// A layout of x with four axes, and which axes the tables may have as 1.
struct Layout {
  const char* name;
  int64_t batch, heads;  // axes
  std::vector<std::array<bool, 3>> tables;
};

const std::vector<Layout>& layouts(Turn turn) {
  static const std::vector<Layout> half = {
      {"BNSD", 0, 1, {{true, true, false}, {false, true, false}, {false, false, false}}},
      {"BSND", 0, 2, {{true, false, true}, {false, false, true}, {false, false, false}}},
      {"SBND", 1, 2, {{false, true, true}, {false, false, true}, {false, false, false}}},
  };
  static const std::vector<Layout> interleave = {
      {"BNSD", 0, 1, {{true, true, false}}},
      {"BSND", 0, 2, {{true, false, true}}},
      {"SBND", 1, 2, {{false, true, true}}},
  };
  return turn == Turn::kHalf ? half : interleave;
}

bool table_fits(const Tensor& x, const Tensor& table, const std::array<bool, 3>& ones) {
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (table.size(axis) != (ones[axis] ? 1 : x.size(axis))) return false;
  }
  return true;
}

bool few_enough(int64_t batch, int64_t heads, Turn turn, bool table_gradient) {
  if (batch >= kMostRows || heads >= kMostRows) return false;
  if (turn == Turn::kInterleave && batch * heads >= kMostRows) return false;
  return !table_gradient || batch * heads <= kMostTableRows;
}

// Whether the shapes are those of a layout, and of one whose limits hold.
void check_four_axes(const Tensor& x, const Tensor& table, Turn turn, bool table_gradient) {
  bool known = false;
  for (const Layout& layout : layouts(turn)) {
    for (const auto& ones : layout.tables) {
      if (!table_fits(x, table, ones)) continue;
      known = true;
      if (few_enough(x.size(layout.batch), x.size(layout.heads), turn, table_gradient)) return;
    }
  }
  check(known, "cos and sin of shape ", table.sizes(), " fit x ", x.sizes(), " in no documented layout; ",
        turn == Turn::kHalf ? "half: BNSD with 11SD, B1SD, BNSD; BSND with 1S1D, BS1D, BSND; SBND with S11D, SB1D, SBND"
                            : "interleave: BNSD with 11SD, BSND with 1S1D, SBND with S11D");
  check(false, "x ", x.sizes(), " has too many sequences or heads: B and N must be below 1000, B N too where pairs are",
        " interleaved, and B N at most 1024 where cos and sin need a gradient");
}

void check_packed(const Tensor& x, const Tensor& table, Turn turn, bool table_gradient) {
  const bool per_head = turn == Turn::kHalf && table.size(1) == x.size(1);
  check(table.size(0) == x.size(0) && (table.size(1) == 1 || per_head), "cos and sin of shape ", table.sizes(),
        " do not go with x ", x.sizes(), ": TND takes T1D", turn == Turn::kHalf ? " and TND" : "");
  check(few_enough(1, x.size(1), turn, table_gradient), "x ", x.sizes(), " has too many heads: N must be below 1000");
}

// Ascend 950: any table that broadcasts, D of at most 1024, all four modes.
void check_newest(const Tensor& x, const Tensor& table, Turn turn) {
  const int64_t size = x.size(-1);
  const int64_t step = turn == Turn::kQuarter ? 4 : 2;
  check(size <= 1024 && size % step == 0, "D must be a multiple of ", step, " of at most 1024, not ", size);
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    check(table.size(axis) == 1 || table.size(axis) == x.size(axis), "cos and sin of shape ", table.sizes(),
          " do not broadcast to x ", x.sizes());
  }
}

void check_tables(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode, bool table_gradient) {
  check_family({Family::kA2, Family::kA3, Family::kA5}, "Atlas A2, A3 and Ascend 950");
  check_floating(x, "x");
  check_same_dtype(x, "x", cos, "cos");
  check_same_dtype(x, "x", sin, "sin");
  check_rank(x, "x", 3, 4);
  check_same_shape(cos, "cos", sin, "sin");
  check(cos.dim() == x.dim(), "cos and sin must have the ", x.dim(), " axes of x, not ", cos.dim());
  check(cos.size(-1) == x.size(-1), "cos and sin must be as wide as x, ", x.size(-1), " features, not ", cos.size(-1));
  check(0 <= mode && mode <= 3, "mode must be 0 to 3, not ", mode);
  const Turn turn = static_cast<Turn>(mode);
  if (family() == Family::kA5) return check_newest(x, cos, turn);
  check(mode <= 1, "mode ", mode, " is not supported on ", llm_adapt::soc_name(), ", only half and interleave");
  check(x.size(-1) % 2 == 0 && x.size(-1) < kMostSize, "D must be even and below ", kMostSize, ", not ", x.size(-1));
  if (x.dim() == 3) return check_packed(x, cos, turn, table_gradient);
  check_four_axes(x, cos, turn, table_gradient);
}

void check_rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode, const Tensor& rotate,
                  const Tensor& y) {
  check_tables(x, cos, sin, mode, false);
  check_same_shape(x, "x", y, "y");
  if (!rotate.defined()) return;
  const std::vector<int64_t> square = {x.size(-1), x.size(-1)};
  check(rotate.sizes() == at::IntArrayRef(square), "rotate must be [D, D], not ", rotate.sizes());
}

// `rotate` [D, D] takes the place of the turn of pairs: turned(x) = x @ rotate.
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode, const Tensor& rotate,
            const Tensor& y) {
  const Turn turn = static_cast<Turn>(mode);
  if (rotate.defined()) {
    store(y, wide(x) * wide(cos) + at::matmul(wide(x), wide(rotate)) * wide(sin));
    return;
  }
  store(y, rotated(wide(x), wide(cos), wide(sin), turn));
}

// Without x the gradients of cos and sin are not computed: their outputs stay as they were allocated.
void rotary_grad(const Tensor& dy, const Tensor& cos, const Tensor& sin, const Tensor& x, int64_t mode,
                 const Tensor& dx, const Tensor& dcos, const Tensor& dsin) {
  const Turn turn = static_cast<Turn>(mode);
  const Tensor dy_wide = wide(dy);
  store(dx, first_back(dy_wide * wide(cos), turn) + second_back(dy_wide * wide(sin), turn));
  if (!x.defined()) return;
  store(dcos, at::sum_to(dy_wide * first(wide(x), turn), cos.sizes()));
  store(dsin, at::sum_to(dy_wide * second(wide(x), turn), sin.sizes()));
}

void check_rotary_grad(const Tensor& dy, const Tensor& cos, const Tensor& sin, const Tensor& x, int64_t mode,
                       const Tensor&, const Tensor&, const Tensor&) {
  check_tables(dy, cos, sin, mode, x.defined());
  if (!x.defined()) return;
  check_same_shape(dy, "dy", x, "x");
  check_same_dtype(dy, "dy", x, "x");
}

// A1 and 310P: halves of 128 features, four axes, batch and heads of at most 1000, broadcast data of at most 1024.
void check_legacy(const Tensor& x, const Tensor& cos) {
  check_floating(x, "x");
  check_rank(x, "x", 4, 4);
  check(x.size(-1) == 128, "D must be 128 on ", llm_adapt::soc_name(), ", not ", x.size(-1));
  int64_t spread = 1;
  for (int64_t axis = 0; axis < 3; ++axis) {
    if (cos.size(axis) != x.size(axis)) spread *= x.size(axis);
  }
  check(spread <= kMostTableRows, "cos and sin are broadcast ", spread, " times, at most ", kMostTableRows);
}

const LegacyOperator legacy_rotary("RotaryMul", [](const LegacyArguments& given) {
  check_legacy(given.inputs[0], given.inputs[1]);
  rotary(given.inputs[0], given.inputs[1], given.inputs[2], 0, Tensor(), given.outputs[0]);
});
const LegacyOperator legacy_rotary_grad("RotaryMulGrad", [](const LegacyArguments& given) {
  const Tensor &x = given.inputs[0], &cos = given.inputs[1], &sin = given.inputs[2], &dy = given.inputs[3];
  check_legacy(x, cos);
  const Tensor needed = given.attribute<bool>("need_backward") ? x : Tensor();
  rotary_grad(dy, cos, sin, needed, 0, given.outputs[0], given.outputs[1], given.outputs[2]);
});

}  // namespace

ACLNN_CHECKED(aclnnRotaryPositionEmbeddingV2, check_rotary, rotary,
              (const aclTensor* x, const aclTensor* cos, const aclTensor* sin, int64_t mode, const aclTensor* rotate,
               const aclTensor* y),
              x, cos, sin, mode, rotate, y)
// op-plugin asks for this one to tell whether rotary embeddings are there at all, then calls V2.
ACLNN_CHECKED(aclnnRotaryPositionEmbedding,
              [](const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode, const Tensor& y) {
                check_rotary(x, cos, sin, mode, Tensor(), y);
              },
              [](const Tensor& x, const Tensor& cos, const Tensor& sin, int64_t mode, const Tensor& y) {
                rotary(x, cos, sin, mode, Tensor(), y);
              },
              (const aclTensor* x, const aclTensor* cos, const aclTensor* sin, int64_t mode, const aclTensor* y), x,
              cos, sin, mode, y)
ACLNN_CHECKED(aclnnRotaryPositionEmbeddingGrad, check_rotary_grad, rotary_grad,
              (const aclTensor* dy, const aclTensor* cos, const aclTensor* sin, const aclTensor* x, int64_t mode,
               const aclTensor* dx, const aclTensor* dcos, const aclTensor* dsin),
              dy, cos, sin, x, mode, dx, dcos, dsin)
