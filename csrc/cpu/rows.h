// Rows of contiguous values of any dtype: what the kernels that are bound by memory share.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {

PX_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PX_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }
PX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(T{}) with the storage type T of a dtype.
template <class F>
PX_INLINE void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

// The first n values at p, zeros in the remaining lanes.
template <class T>
PX_INLINE Vec<Accumulator<T>> load_first(const T* p, int64_t n) {
  using A = Accumulator<T>;
  alignas(PX_VECTOR_BYTES) A values[lanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = widen(p[i]);
  return load(values);
}

// The first n lanes of v.
template <class T>
PX_INLINE void store_first(T* p, Vec<Accumulator<T>> v, int64_t n) {
  using A = Accumulator<T>;
  alignas(PX_VECTOR_BYTES) A values[lanes<A>];
  store(values, v);
  for (int64_t i = 0; i < n; ++i) p[i] = narrow<T>(values[i]);
}

// to[0..n) = from[0..n), as A.
template <class T, class A>
PX_INLINE void widen_row(int64_t n, const T* from, A* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, Accumulator<T>>) {
    for (; i + lanes<A> <= n; i += lanes<A>) store(to + i, load_wide(from + i));
  }
  for (; i < n; ++i) to[i] = static_cast<A>(widen(from[i]));
}

// to[0..n) = from[0..n), rounded to T.
template <class A, class T>
PX_INLINE void narrow_row(int64_t n, const A* from, T* to) {
  int64_t i = 0;
  if constexpr (std::is_same_v<A, Accumulator<T>>) {
    for (; i + lanes<A> <= n; i += lanes<A>) store_narrow(to + i, load(from + i));
  }
  for (; i < n; ++i) to[i] = narrow<T>(from[i]);
}

}  // namespace perexample::cpu::PX_CAPABILITY
