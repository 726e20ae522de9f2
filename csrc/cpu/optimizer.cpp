// One step of an optimizer over all parameters: MATHS (2), (9)-(19), as written out at `Optimizer`
// in kernels.h.
//
// The work is bound by memory: every array goes by once. The tensors are laid end to end, each
// padded to whole cache lines, and that row is cut into equal chunks, so a thousand tiny tensors
// cost no more than one large one. In a long row the chunks are longer, as the processor's own
// fetching starts anew in each. Arrays that are not of the arithmetic's type pass through small
// buffers in the L1 cache.
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kChunk = 1 << 14;    // elements of one task, at least
constexpr int64_t kLongest = 1 << 18;  // and at most
constexpr int64_t kTasks = 512;        // as many as that, and they are made longer
constexpr int64_t kBlock = 512;        // elements that are converted at a time
constexpr int64_t kPad = 64;           // elements to which a tensor's size is rounded up

PX_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
PX_INLINE double square_root(double v) { return __builtin_sqrt(v); }
PX_INLINE float absolute(float v) { return __builtin_fabsf(v); }
PX_INLINE double absolute(double v) { return __builtin_fabs(v); }

// What a kind of optimizer computes, known when it is compiled.
template <bool has_average, bool has_square, bool is_centered, bool is_squared, bool is_per_example>
struct Kind {
  static constexpr bool average = has_average;         // exp_avg
  static constexpr bool square = has_square;           // exp_avg_sq
  static constexpr bool centered = is_centered;        // variance in the denominator
  static constexpr bool squared = is_squared;          // no root of the denominator
  static constexpr bool per_example = is_per_example;  // reads sum_grad_squared
};

// The constants of one tensor, in the type of the arithmetic.
template <class A>
struct Constants {
  A keep_g, take_g, keep_s, take_s;  // 1 - kappa and kappa
  A grad_scale, square_scale, decay, step_size, eps;
  A guard, guard_tiny, guard_absolute;  // see kernels.h

  Constants(const Optimizer& o, const OptimizerTensor& t)
      : keep_g(static_cast<A>(1 - (o.centered ? t.kappa_s : t.kappa_g))),
        take_g(static_cast<A>(o.centered ? t.kappa_s : t.kappa_g)),
        keep_s(static_cast<A>(1 - t.kappa_s)),
        take_s(static_cast<A>(t.kappa_s)),
        grad_scale(static_cast<A>(o.grad_scale)),
        square_scale(static_cast<A>(o.square_scale)),
        decay(static_cast<A>(1 - o.decay)),
        step_size(static_cast<A>(o.step_size)),
        eps(static_cast<A>(o.eps)) {
    double slack = 1 + t.guard_slack;
    double tiny = t.sum_dtype == DType::f64 ? __DBL_MIN__ : __FLT_MIN__;
    guard = static_cast<A>(slack * slack * o.batch_size);
    guard_tiny = static_cast<A>(o.batch_size * tiny);
    guard_absolute = static_cast<A>(t.guard_absolute);
  }
};

// The step on n elements; arrays for which the kind has no use are null. Returns whether the guard
// flags one. GCC believes __restrict of parameters only.
template <class A, class K>
bool update(const Constants<A>& c, int64_t n, A* __restrict param, const A* __restrict grad,
            const A* __restrict sum_grad_squared, A* __restrict exp_avg, A* __restrict exp_avg_sq) {
  using Flag = std::conditional_t<std::is_same_v<A, double>, int64_t, int32_t>;
  Flag flagged = 0;
  for (int64_t i = 0; i < n; ++i) {
    A g = grad[i];
    A mean = c.grad_scale * g;
    A square = mean * mean;
    if constexpr (K::per_example) {
      A sum = sum_grad_squared[i];
      square = c.square_scale * sum;
      Flag finite = g - g == 0;
      A excess = absolute(g) - c.guard_absolute;
      Flag positive = excess > 0;  // no selection between values: GCC would not vectorise the loop
      Flag above = excess * excess > c.guard * (sum + c.guard_tiny);
      flagged |= finite & positive & above;
    }
    A along = mean, m = 0;
    if constexpr (K::average) {
      m = c.keep_g * exp_avg[i] + c.take_g * mean;
      exp_avg[i] = m;
      if constexpr (!K::centered) along = m;
    }
    if constexpr (K::square) {
      A v = c.keep_s * exp_avg_sq[i] + c.take_s * square;
      exp_avg_sq[i] = v;
      if constexpr (K::centered) {
        v -= m * m;
        v = (v + absolute(v)) / 2;  // rounding can make it negative
      }
      along /= (K::squared ? v : square_root(v)) + c.eps;
    }
    param[i] = c.decay * param[i] - c.step_size * along;
  }
  return flagged != 0;
}

template <class A>
using Update = bool (*)(const Constants<A>&, int64_t, A*, const A*, const A*, A*, A*);

template <class A, bool per_example>
Update<A> squares_of(const Optimizer& o, bool average) {
  if (o.centered) {
    return o.squared_denominator ? &update<A, Kind<true, true, true, true, per_example>>
                                 : &update<A, Kind<true, true, true, false, per_example>>;
  }
  if (average) {
    return o.squared_denominator ? &update<A, Kind<true, true, false, true, per_example>>
                                 : &update<A, Kind<true, true, false, false, per_example>>;
  }
  return o.squared_denominator ? &update<A, Kind<false, true, false, true, per_example>>
                               : &update<A, Kind<false, true, false, false, per_example>>;
}

template <class A>
Update<A> update_of(const Optimizer& o, const OptimizerTensor& t) {
  bool average = t.exp_avg != nullptr;
  if (t.exp_avg_sq != nullptr) {
    return t.sum_grad_squared != nullptr ? squares_of<A, true>(o, average)
                                         : squares_of<A, false>(o, average);
  }
  if (t.sum_grad_squared != nullptr) {
    return average ? &update<A, Kind<true, false, false, false, true>>
                   : &update<A, Kind<false, false, false, false, true>>;
  }
  return average ? &update<A, Kind<true, false, false, false, false>>
                 : &update<A, Kind<false, false, false, false, false>>;
}

// An array of the caller as A: itself where it has that type, else a copy in `buffer`.
template <class A>
A* staged(DType dtype, const void* array, int64_t offset, int64_t n, A* buffer) {
  if (array == nullptr) return nullptr;
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
  if (array == nullptr) return;
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    if constexpr (!std::is_same_v<T, A>) narrow_row(n, values, static_cast<T*>(array) + offset);
  });
}

// 32 bits that look random, a function of the element and of the examples seen.
PX_INLINE uint32_t hash(uint32_t element, uint32_t seed) {
  uint32_t x = element * 0x9e3779b1u + seed;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// State in bfloat16 is rounded up where the bits that are cut off exceed 16 random ones (`shift`
// tells which 16 of the hash): a change of an average is often below half a unit in the last place,
// and rounded to nearest it would be lost in every step.
template <class A>
void write_state(DType dtype, void* array, int64_t offset, int64_t n, const A* values,
                 uint32_t seed, int shift) {
  if (array == nullptr || dtype != DType::bf16) {
    write_back(dtype, array, offset, n, values);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(array) + offset;
  uint32_t first = static_cast<uint32_t>(offset);
  for (int64_t i = 0; i < n; ++i) {
    float value = static_cast<float>(values[i]);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    uint32_t exponent = bits & 0x7f800000u;
    uint32_t random = (hash(first + static_cast<uint32_t>(i), seed) >> shift) & 0xffffu;
    uint32_t finite = exponent != 0x7f800000u;
    uint32_t quiet = (exponent == 0x7f800000u) & ((bits & 0x7fffffu) != 0);
    out[i] = static_cast<uint16_t>(((bits + random * finite) >> 16) | quiet << 6);
  }
}

constexpr bool is(DType dtype, float) { return dtype == DType::f32; }
constexpr bool is(DType dtype, double) { return dtype == DType::f64; }

// Elements [begin, end) of one tensor.
template <class A>
void step_range(const Optimizer& o, const OptimizerTensor& t, int64_t begin, int64_t end) {
  Constants<A> constants(o, t);
  Update<A> update = update_of<A>(o, t);
  bool stateful = t.exp_avg != nullptr || t.exp_avg_sq != nullptr;
  bool direct = is(t.param_dtype, A{}) && is(t.grad_dtype, A{}) && is(t.sum_dtype, A{}) &&
                (!stateful || is(o.state_dtype, A{}));
  int64_t step = direct ? end - begin : kBlock;
  bool flagged = false;
  alignas(64) A buffers[5][kBlock];
  for (int64_t i = begin; i < end; i += step) {
    int64_t n = min_of(step, end - i);
    A* param = staged(t.param_dtype, t.param, i, n, buffers[0]);
    const A* grad = staged(t.grad_dtype, t.grad, i, n, buffers[1]);
    const A* sum = staged(t.sum_dtype, t.sum_grad_squared, i, n, buffers[2]);
    A* exp_avg = staged(o.state_dtype, t.exp_avg, i, n, buffers[3]);
    A* exp_avg_sq = staged(o.state_dtype, t.exp_avg_sq, i, n, buffers[4]);
    flagged |= update(constants, n, param, grad, sum, exp_avg, exp_avg_sq);
    if (direct) break;
    write_back(t.param_dtype, t.param, i, n, param);
    write_state(o.state_dtype, t.exp_avg, i, n, exp_avg, t.seed, 0);
    write_state(o.state_dtype, t.exp_avg_sq, i, n, exp_avg_sq, t.seed, 16);
  }
  if (flagged && t.violation != nullptr) __atomic_store_n(t.violation, 1, __ATOMIC_RELAXED);
}

// The beginnings of what the next tensor, if small, is about to need: it may lie anywhere.
PX_INLINE void prefetch(const OptimizerTensor& t) {
  for (const void* array : {static_cast<const void*>(t.param), t.grad, t.sum_grad_squared}) {
    for (int64_t line = 0; line < 4; ++line) {
      __builtin_prefetch(static_cast<const char*>(array) + 64 * line);
    }
  }
}

}  // namespace

void optimizer_step(const Optimizer& o, const Parallel& parallel) {
  // start[i]: where tensor i begins in the row of padded tensors.
  int64_t* start =
      static_cast<int64_t*>(scratch((o.count + 1) * static_cast<int64_t>(sizeof(int64_t)), 0));
  start[0] = 0;
  for (int64_t i = 0; i < o.count; ++i) {
    start[i + 1] = start[i] + ceil_div(o.tensors[i].n, kPad) * kPad;
  }
  int64_t total = start[o.count];
  int64_t chunk = min_of(max_of(ceil_div(total / kPad, kTasks) * kPad, kChunk), kLongest);
  parallel(ceil_div(total, chunk), [&](int64_t task) {
    int64_t begin = task * chunk;
    int64_t end = min_of(begin + chunk, total);
    int64_t low = 0, high = o.count;  // the last tensor with start <= begin is in [low, high)
    while (high - low > 1) {
      int64_t middle = low + (high - low) / 2;
      (start[middle] <= begin ? low : high) = middle;
    }
    for (int64_t i = low; i < o.count && start[i] < end; ++i) {
      const OptimizerTensor& t = o.tensors[i];
      int64_t from = max_of(begin - start[i], 0);
      int64_t to = min_of(end - start[i], t.n);
      if (from >= to) continue;
      if (i + 1 < o.count) prefetch(o.tensors[i + 1]);
      if (t.sum_dtype == DType::f64 || t.grad_dtype == DType::f64) {
        step_range<double>(o, t, from, to);
      } else {
        step_range<float>(o, t, from, to);
      }
    }
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
