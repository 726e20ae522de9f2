// The CPU kernels of perexample: what each computes, on raw pointers, free of torch.
//
// One source per op is compiled once per CPU capability (PX_CAPABILITY names it) and chosen at run
// time through `kernels()`. Letters are those of the equations: B examples, T positions inside one
// example, I inputs, O outputs, C channels, D width, V vocabulary, S spatial positions. Strides
// are in elements and may be anything, 0 included (an expanded gradient).
//
// Every kernel writes all of its outputs (zeros for B = 0), accumulates in float32 (float64 for
// float64 inputs), and gives the same bits whatever the number of threads.
#pragma once

#include <cstdint>

// Visible outside the library, to perexample._info.
#define PX_EXPORT __attribute__((visibility("default")))

namespace perexample::cpu {

enum class DType : int32_t { f32, f64, bf16, f16 };

// The caller's thread pool. `run` calls body(ctx, task) once for every task in [0, tasks), in any
// order and on any thread; tasks must not depend on one another.
struct Parallel {
  int64_t threads;
  void (*run)(int64_t tasks, void (*body)(void* ctx, int64_t task), void* ctx);

  template <class F>
  void operator()(int64_t tasks, const F& f) const {
    auto body = [](void* ctx, int64_t task) { (*static_cast<const F*>(ctx))(task); };
    run(tasks, body, const_cast<void*>(static_cast<const void*>(&f)));
  }
};

// MATHS (3), (4):  G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];  dw = sum_b G_b;  dw_sq = sum_b G_b^2.
// db, db_sq the same with x = 1; null when not wanted.
struct Linear {
  int64_t B, T, O, I;
  DType dtype;  // of dy and x
  const void* dy;
  int64_t dy_stride[3];  // b, t, o
  const void* x;
  int64_t x_stride[3];  // b, t, i
  DType grad_dtype;     // of dw and db
  void* dw;             // (O, I) contiguous
  void* dw_sq;          // (O, I) contiguous, float64 if dtype is f64, else float32
  void* db;             // (O) or null
  void* db_sq;          // (O) or null, like dw_sq
};

// MATHS (5): (3) with x unfolded on the fly; spatial sizes are padded on the left with 1 to three.
struct Conv {
  int64_t B, C, O, groups;
  int64_t in[3], out[3], kernel[3], stride[3], padding[3], dilation[3];
  DType dtype;
  const void* dy;        // (B, O, out...)
  int64_t dy_stride[5];  // b, o, then the three spatial dimensions
  const void* x;         // (B, C, in...)
  int64_t x_stride[5];
  DType grad_dtype;
  void* dw;     // (O, C / groups, kernel...) contiguous
  void* dw_sq;  // like dw, float64 if dtype is f64, else float32
  void* db;     // (O) or null
  void* db_sq;  // (O) or null
};

// Bias: G_b[o] = sum_t dy[b,t,o];  db = sum_b G_b;  db_sq = sum_b G_b^2.
struct Bias {
  int64_t B, T, O;
  DType dtype;
  const void* dy;
  int64_t dy_stride[3];  // b, t, o
  DType grad_dtype;
  void* db;
  void* db_sq;
};

// MATHS (8): g is (B, N); sum = sum_b g_b, sum_sq = sum_b g_b^2.
struct Reduce {
  int64_t B, N;
  DType dtype;
  const void* g;
  int64_t g_stride[2];
  DType grad_dtype;
  void* sum;
  void* sum_sq;
};

// MATHS (6): rows of one example with the same index are added before squaring. Indices equal to
// padding_idx contribute nothing. Indices are in [0, V); the caller has checked.
struct Embedding {
  int64_t B, T, V, D;
  DType dtype;
  const void* dy;
  int64_t dy_stride[3];  // b, t, d
  const int64_t* indices;
  int64_t index_stride[2];  // b, t
  int64_t padding_idx;      // -1: none
  DType grad_dtype;
  void* dw;     // (V, D) contiguous
  void* dw_sq;  // (V, D) contiguous
};

// MATHS (7), with the input gradient in the same pass. Rows are normalized over D:
// xhat = (x - mean) rstd;  G_b = sum_t dy xhat (weight), sum_t dy (bias);
// dx = rstd (h - mean_d(h) - xhat mean_d(h xhat)) with h = dy weight.
// For RMSNorm (`centered` false) both means of the first kind, of x and of h, are 0.
// Rows are contiguous. mean and rstd (B, T), contiguous, are float32 (float64 for f64); null:
// recomputed from x and eps. dx, or the pair dw/dw_sq, or the pair db/db_sq may be null when not
// wanted.
struct LayerNorm {
  int64_t B, T, D;
  bool centered;
  double eps;
  DType dtype;         // of dy, x and dx
  DType weight_dtype;  // of weight, dw and db
  const void *dy, *x, *mean, *rstd;
  int64_t dy_stride[2], x_stride[2];  // b, t
  const void* weight;                 // (D) or null (ones)
  void* dx;                           // (B, T, D) contiguous
  void *dw, *dw_sq, *db, *db_sq;
};

// MATHS (7) for GroupNorm: x is (B, C, S) contiguous, normalized over (C / groups, S); mean and
// rstd (B, groups) as above. With `constant` they are given, (groups), the same for all examples,
// and do not depend on x: dx = rstd h.
struct GroupNorm {
  int64_t B, C, S, groups;
  bool constant;
  double eps;
  DType dtype;
  DType weight_dtype;
  const void *dy, *x, *mean, *rstd;
  const void* weight;  // (C) or null
  void* dx;
  void *dw, *dw_sq, *db, *db_sq;
};

// MATHS (2), (9)-(19). One parameter of an optimizer's step; all arrays contiguous, n elements.
struct OptimizerTensor {
  int64_t n;
  DType param_dtype, grad_dtype, sum_dtype;  // sum_dtype: f64 for f64 parameters, else f32
  void* param;
  const void* grad;
  const void* sum_grad_squared;        // null: the square of the mean gradient (per batch)
  void* exp_avg;                       // null: none; all parameters of a call alike
  void* exp_avg_sq;                    // null: none; all parameters of a call alike
  double kappa_g, kappa_s;             // MATHS (9)-(12), (19), from this parameter's own count
  double guard_slack, guard_absolute;  // what rounding explains
  int32_t* violation;                  // set to 1 where the guard flags an element; null: off
  uint32_t seed;                       // for rounding state to bf16: the low bits of its count
};

// Shared by all parameters of the call:
//   ghat = grad_scale grad;           s = square_scale sum_grad_squared   (or ghat^2)
//   exp_avg    = (1 - kappa_g) exp_avg + kappa_g ghat                     (centered: kappa_s)
//   exp_avg_sq = (1 - kappa_s) exp_avg_sq + kappa_s s
//   u = exp_avg, or ghat where there is none or centered
//   d = exp_avg_sq, less exp_avg^2 where centered; its root unless squared_denominator
//   param      = (1 - decay) param - step_size u / (d + eps)              (no exp_avg_sq: u alone)
// The guard flags a finite g = grad with
//   max(|g| - guard_absolute, 0)^2 > (1 + guard_slack)^2 B (sum_grad_squared + B tiny),
// tiny the smallest normal number of sum_grad_squared's dtype.
// bf16 state is rounded stochastically: x becomes the upper half of its bits plus 16 bits of
// hash(element, seed), the low ones for exp_avg, the high ones for exp_avg_sq.
struct Optimizer {
  int64_t count;
  const OptimizerTensor* tensors;
  DType state_dtype;  // sum_dtype of all parameters, or bf16 for f32
  bool centered, squared_denominator;
  double batch_size;
  double grad_scale, square_scale;  // grad_scale carries the sign of `maximize`
  double step_size, decay, eps;
};

// An LSTM over T steps. gates (T, B, 4 H) come as the products with the input and leave activated:
// i, f, g, o. Of states (T + 1, B, P) and cells (T + 1, B, H) the first is given, the last where
// time runs backward (`reverse`):
//   cell = f cell + i g;  h = o tanh(cell), times weight_hr where there is one, else P = H.
// At step t the first active[t] examples are there; the others' states are carried on.
struct Lstm {
  int64_t T, B, H, P;
  DType dtype;  // f32 or f64
  bool reverse;
  const int64_t* active;  // null: all
  const void* weight_hh;  // (4 H, P)
  const void* weight_hr;  // (P, H) or null
  void* workspace;        // workspace_size() elements, 64-byte aligned
  void *gates, *states, *cells;

  // Of every number of packed columns.
  static constexpr int64_t kPadding = 32;
  int64_t workspace_size() const {
    const int64_t columns = (4 * H + kPadding) * P, rows = 4 * H * (P + kPadding);
    const int64_t projection = (P + kPadding) * (H + kPadding);
    return (columns > rows ? columns : rows) + (weight_hr == nullptr ? 0 : projection);
  }
};

// Its backward: dh and dc, the gradients of the last states, become those of the first. dgates
// (T, B, 4 H) before activation; dstates (T, B, P), of the states, where there is a weight_hr. Both
// are 0 where an example is not there.
struct LstmBackward {
  Lstm forward;  // without states
  const void* dy;
  int64_t dy_stride[2];  // t, b; rows are contiguous
  void *dgates, *dstates, *dh, *dc;
};

// Backward of one step of a GRU, n = tanh(x_n + r hidden), h = (1 - z) n + z state: dgates of the
// products with x, dhidden of those with the state, both (B, 3 H), r, z, n; dh becomes dh z.
struct GruCellBackward {
  int64_t B, H;
  DType dtype;
  void *dgates, *dhidden, *dh;
  const void *gates, *hidden, *state;
  int64_t dgates_stride, dhidden_stride, dh_stride, gates_stride, hidden_stride, state_stride;
};

struct Kernels {
  const char* capability;
  void (*linear_moments)(const Linear&, const Parallel&);
  void (*conv_moments)(const Conv&, const Parallel&);
  void (*bias_moments)(const Bias&, const Parallel&);
  void (*reduce_moments)(const Reduce&, const Parallel&);
  void (*embedding_moments)(const Embedding&, const Parallel&);
  void (*layer_norm_moments)(const LayerNorm&, const Parallel&);
  void (*group_norm_moments)(const GroupNorm&, const Parallel&);
  void (*lstm_forward)(const Lstm&, const Parallel&);
  void (*lstm_backward)(const LstmBackward&, const Parallel&);
  void (*gru_cell_backward)(const GruCellBackward&, const Parallel&);
  void (*optimizer_step)(const Optimizer&, const Parallel&);
};

// The kernels for this machine: the best capability that it has, or the one that the environment
// variable PEREXAMPLE_CPU_CAPABILITY names (generic, avx2, avx512, avx512_bf16).
PX_EXPORT const Kernels& kernels();

// This thread's reusable buffer number `slot` (0 to 3) of at least `bytes` bytes, 64-byte aligned,
// contents undefined. Valid until the same thread asks for the same slot again. Keep it to a few
// MB.
void* scratch(int64_t bytes, int slot);

// Every capability that was compiled in and that this machine can run, best last.
PX_EXPORT const Kernels* const* available_kernels(int* count);

}  // namespace perexample::cpu
