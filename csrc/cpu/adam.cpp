// One optimizer step over all parameters: MATHS (2), (11), (16)-(18), as written out at `Adam` in
// kernels.h.
//
// The work is bound by memory: every array goes by once. The tensors are laid end to end, each
// padded to whole cache lines, and that row is cut into equal chunks, so a thousand tiny tensors
// cost no more than one large one. Arrays that are not of the arithmetic's type pass through small
// buffers in the L1 cache.
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kChunk = 1 << 14;  // elements of one task
constexpr int64_t kBlock = 512;      // elements that are converted at a time
constexpr int64_t kPad = 64;         // elements to which a tensor's size is rounded up

PX_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
PX_INLINE double square_root(double v) { return __builtin_sqrt(v); }
PX_INLINE float absolute(float v) { return __builtin_fabsf(v); }
PX_INLINE double absolute(double v) { return __builtin_fabs(v); }

// The constants of one tensor, in the type of the arithmetic.
template <class A>
struct Constants {
  A keep_g, take_g, keep_s, take_s;  // 1 - kappa and kappa of MATHS (11)
  A grad_scale, square_scale, decay, step_size, eps;
  A guard, guard_tiny, guard_absolute;  // see kernels.h

  Constants(const Adam& a, const AdamTensor& t)
      : keep_g(static_cast<A>(1 - t.kappa_g)),
        take_g(static_cast<A>(t.kappa_g)),
        keep_s(static_cast<A>(1 - t.kappa_s)),
        take_s(static_cast<A>(t.kappa_s)),
        grad_scale(static_cast<A>(a.grad_scale)),
        square_scale(static_cast<A>(a.square_scale)),
        decay(static_cast<A>(1 - a.step_size * a.weight_decay)),
        step_size(static_cast<A>(a.step_size)),
        eps(static_cast<A>(a.eps)) {
    double slack = 1 + a.guard_slack;
    double tiny = t.state_dtype == DType::f64 ? __DBL_MIN__ : __FLT_MIN__;
    guard = static_cast<A>(slack * slack * a.batch_size);
    guard_tiny = static_cast<A>(a.batch_size * tiny);
    guard_absolute = static_cast<A>(a.guard_absolute);
  }
};

// The step on n elements. Returns whether the guard flags one; without PerExample,
// sum_grad_squared is not read and s is ghat^2.
template <class A, bool PerExample>
bool update(const Constants<A>& c, int64_t n, A* __restrict param, const A* __restrict grad,
            const A* __restrict sum_grad_squared, A* __restrict exp_avg, A* __restrict exp_avg_sq) {
  using Flag = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  Flag flagged = 0;
  for (int64_t i = 0; i < n; ++i) {
    A g = grad[i];
    A mean = c.grad_scale * g;
    A square;
    if constexpr (PerExample) {
      A sum = sum_grad_squared[i];
      square = c.square_scale * sum;
      Flag finite = g - g == 0;
      A excess = absolute(g) - c.guard_absolute;
      Flag positive = excess > 0;  // no selection between values: GCC would not vectorise the loop
      Flag above = excess * excess > c.guard * (sum + c.guard_tiny);
      flagged |= finite & positive & above;
    } else {
      square = mean * mean;
    }
    A m = c.keep_g * exp_avg[i] + c.take_g * mean;
    A v = c.keep_s * exp_avg_sq[i] + c.take_s * square;
    exp_avg[i] = m;
    exp_avg_sq[i] = v;
    param[i] = c.decay * param[i] - c.step_size * m / (square_root(v) + c.eps);
  }
  return flagged != 0;
}

// An array of the caller as A: itself where it has that type, else a copy in `buffer`.
template <class A>
A* staged(DType dtype, const void* array, int64_t offset, int64_t n, A* buffer) {
  A* out = buffer;
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* p = static_cast<T*>(const_cast<void*>(array)) + offset;
    if constexpr (std::is_same_v<T, A>) {
      out = p;
    } else {
      widen_row(n, p, buffer);
    }
  });
  return out;
}

// Writes what `staged` gave back to where it came from.
template <class A>
void write_back(DType dtype, void* array, int64_t offset, int64_t n, const A* values) {
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, A>) narrow_row(n, values, static_cast<T*>(array) + offset);
  });
}

constexpr bool is(DType dtype, float) { return dtype == DType::f32; }
constexpr bool is(DType dtype, double) { return dtype == DType::f64; }

// Elements [begin, end) of one tensor.
template <class A>
void step_range(const Adam& adam, const AdamTensor& t, int64_t begin, int64_t end) {
  Constants<A> constants(adam, t);
  bool direct = is(t.param_dtype, A{}) && is(t.grad_dtype, A{}) && is(t.state_dtype, A{});
  int64_t step = direct ? end - begin : kBlock;
  bool flagged = false;
  alignas(64) A buffers[5][kBlock];
  for (int64_t i = begin; i < end; i += step) {
    int64_t n = min_of(step, end - i);
    A* param = staged(t.param_dtype, t.param, i, n, buffers[0]);
    const A* grad = staged(t.grad_dtype, t.grad, i, n, buffers[1]);
    A* exp_avg = staged(t.state_dtype, t.exp_avg, i, n, buffers[2]);
    A* exp_avg_sq = staged(t.state_dtype, t.exp_avg_sq, i, n, buffers[3]);
    if (t.sum_grad_squared != nullptr) {
      const A* sum = staged(t.state_dtype, t.sum_grad_squared, i, n, buffers[4]);
      flagged |= update<A, true>(constants, n, param, grad, sum, exp_avg, exp_avg_sq);
    } else {
      update<A, false>(constants, n, param, grad, nullptr, exp_avg, exp_avg_sq);
    }
    write_back(t.param_dtype, t.param, i, n, param);
    write_back(t.state_dtype, t.exp_avg, i, n, exp_avg);
    write_back(t.state_dtype, t.exp_avg_sq, i, n, exp_avg_sq);
  }
  if (flagged && t.violation != nullptr) __atomic_store_n(t.violation, 1, __ATOMIC_RELAXED);
}

}  // namespace

void adam_step(const Adam& adam, const Parallel& parallel) {
  // start[i]: where tensor i begins in the row of padded tensors.
  int64_t* start =
      static_cast<int64_t*>(scratch((adam.count + 1) * static_cast<int64_t>(sizeof(int64_t)), 0));
  start[0] = 0;
  for (int64_t i = 0; i < adam.count; ++i) {
    start[i + 1] = start[i] + ceil_div(adam.tensors[i].n, kPad) * kPad;
  }
  int64_t total = start[adam.count];
  parallel(ceil_div(total, kChunk), [&](int64_t task) {
    int64_t begin = task * kChunk;
    int64_t end = min_of(begin + kChunk, total);
    int64_t low = 0, high = adam.count;  // the last tensor with start <= begin is in [low, high)
    while (high - low > 1) {
      int64_t middle = low + (high - low) / 2;
      (start[middle] <= begin ? low : high) = middle;
    }
    for (int64_t i = low; i < adam.count && start[i] < end; ++i) {
      const AdamTensor& t = adam.tensors[i];
      int64_t from = max_of(begin - start[i], 0);
      int64_t to = min_of(end - start[i], t.n);
      if (from >= to) continue;
      if (t.param_dtype == DType::f64 || t.grad_dtype == DType::f64 ||
          t.state_dtype == DType::f64) {
        step_range<double>(adam, t, from, to);
      } else {
        step_range<float>(adam, t, from, to);
      }
    }
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
