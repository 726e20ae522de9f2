// Rows of contiguous values of any dtype: what the kernels that are bound by memory share.
#pragma once

#include "kernels.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {

PX_INLINE int64_t min_of(int64_t a, int64_t b) { return a < b ? a : b; }
PX_INLINE int64_t max_of(int64_t a, int64_t b) { return a > b ? a : b; }

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

// Asks for the cache line of p[offset], to read it later (into L2) or to write it soon. The address
// may lie outside of any array: nothing is read.
template <class T>
PX_INLINE void fetch(const T* p, int64_t offset) {
  uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(at), 0, 2);
}
template <class T>
PX_INLINE void fetch_to_write(const T* p, int64_t offset) {
  uintptr_t at = reinterpret_cast<uintptr_t>(p) + static_cast<uintptr_t>(offset) * sizeof(T);
  __builtin_prefetch(reinterpret_cast<const void*>(at), 1);
}

// The first n values at p, zeros in the remaining lanes.
template <class T>
PX_INLINE Vec<Accumulator<T>> load_first(const T* p, int64_t n) {
  using A = Accumulator<T>;
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>)
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
#endif
  alignas(PX_VECTOR_BYTES) A values[lanes<A>] = {};
  for (int64_t i = 0; i < n; ++i) values[i] = widen(p[i]);
  return load(values);
}

// The first n lanes of v.
template <class T>
PX_INLINE void store_first(T* p, Vec<Accumulator<T>> v, int64_t n) {
  using A = Accumulator<T>;
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
  if constexpr (std::is_same_v<T, float>)
    return _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), v);
#endif
  alignas(PX_VECTOR_BYTES) A values[lanes<A>];
  store(values, v);
  for (int64_t i = 0; i < n; ++i) p[i] = narrow<T>(values[i]);
}

// f(offset, load, store) for every vector of a row of n values; the last may be partial, with zeros
// in its other lanes.
template <class A, class F>
PX_INLINE void each_vector(int64_t n, const F& f) {
  constexpr int64_t L = lanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    f(
        i, [](auto* p) PX_LAMBDA { return load_wide(p); },
        [](auto* p, Vec<A> v) PX_LAMBDA { store_narrow(p, v); });
  }
  if (int64_t rest = n - i; rest > 0) {
    f(
        i, [rest](auto* p) PX_LAMBDA { return load_first(p, rest); },
        [rest](auto* p, Vec<A> v) PX_LAMBDA { store_first(p, v, rest); });
  }
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

constexpr int64_t kBlockRows = 8;          // rows that are added at a time
constexpr int64_t kBlockColumns = 1024;    // columns of a block whose accumulators fit the L1 cache
constexpr int64_t kGatheredColumns = 256;  // the same where rows are gathered

// The accumulators of a block of columns: G of the current example, and the results.
template <class A>
struct Block {
  alignas(64) A G[kBlockColumns], sum[kBlockColumns], sum_sq[kBlockColumns];
};

// Across n columns of `rows` rows (at most kRows), of which row(r) points to the first column:
// strip(vectors, column, at) for strips of four vectors, then single ones; at(r) points to the
// strip in row r. The last columns are in a padded copy.
template <class T, int64_t kRows = kBlockRows, class Row, class F>
PX_INLINE void each_strip(int64_t n, int64_t rows, const Row& row, const F& strip) {
  constexpr int64_t L = lanes<Accumulator<T>>;
  int64_t i = 0;
  auto at = [&](int64_t r) PX_LAMBDA { return row(r) + i; };
  for (; i + 4 * L <= n; i += 4 * L) strip(std::integral_constant<int, 4>{}, i, at);
  for (; i + L <= n; i += L) strip(std::integral_constant<int, 1>{}, i, at);
  if (i < n) {
    T last[kRows * L] = {};
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t j = i; j < n; ++j) last[r * L + j - i] = row(r)[j];
    }
    strip(std::integral_constant<int, 1>{}, i,
          [&](int64_t r) PX_LAMBDA { return static_cast<const T*>(last) + r * L; });
  }
}

// Adds rows of one example, summed first, to G, which its first rows start; with its last ones, G
// and its square go to the results.
template <class T, class Row>
void add_rows(int64_t n, int64_t rows, const Row& row, bool first, bool last,
              Block<Accumulator<T>>& block) {
  using A = Accumulator<T>;
  each_strip<T>(n, rows, row, [&](auto vectors, int64_t column, const auto& at) PX_LAMBDA {
    constexpr int V = decltype(vectors)::value;
    Vec<A> g[V] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = at(r);
      unroll<V>([&](auto v) PX_LAMBDA { g[v] += load_wide(p + v * lanes<A>); });
    }
    unroll<V>([&](auto v) PX_LAMBDA {
      int64_t i = column + v * lanes<A>;
      if (!first) g[v] += load(block.G + i);
      if (last) {
        store(block.sum + i, load(block.sum + i) + g[v]);
        store(block.sum_sq + i, load(block.sum_sq + i) + g[v] * g[v]);
      } else {
        store(block.G + i, g[v]);
      }
    });
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
