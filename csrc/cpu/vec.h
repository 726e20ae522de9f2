// Vectors of PX_VECTOR_BYTES bytes through the compiler's vector extension: one source for every
// instruction set, as fast as intrinsics (products and sums contract to FMA under
// -ffp-contract=fast). Included by kernel sources only, once per capability.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#ifndef PX_CAPABILITY
#define PX_CAPABILITY generic
#endif
#ifndef PX_VECTOR_BYTES
#if defined(__AVX512F__)
#define PX_VECTOR_BYTES 64
#elif defined(__AVX__)
#define PX_VECTOR_BYTES 32
#else
#define PX_VECTOR_BYTES 16
#endif
#endif

#define PX_INLINE inline __attribute__((always_inline))
#define PX_LAMBDA __attribute__((always_inline))

namespace perexample::cpu::PX_CAPABILITY {

template <class S>
struct VecOf {
  typedef S type __attribute__((vector_size(PX_VECTOR_BYTES)));
  typedef S unaligned __attribute__((vector_size(PX_VECTOR_BYTES), aligned(alignof(S)), may_alias));
};

template <class S>
using Vec = typename VecOf<S>::type;

template <class S>
inline constexpr int lanes = PX_VECTOR_BYTES / static_cast<int>(sizeof(S));

template <class S>
PX_INLINE Vec<S> load(const S* p) {
  return *reinterpret_cast<const typename VecOf<S>::unaligned*>(p);
}

template <class S>
PX_INLINE void store(S* p, Vec<S> v) {
  *reinterpret_cast<typename VecOf<S>::unaligned*>(p) = v;
}

template <class S>
PX_INLINE Vec<S> broadcast(S value) {
  return value - Vec<S>{};
}

PX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// f(std::integral_constant<int, i>) for i in [0, N), unrolled by construction: GCC 12 spills
// register arrays under #pragma GCC unroll.
template <int N, class F>
PX_INLINE void unroll(const F& f) {
  if constexpr (N > 0) {
    unroll<N - 1>(f);
    f(std::integral_constant<int, N - 1>{});
  }
}

// The sum of all lanes, by halves: every lane adds the one at distance `half`.
template <class S, int half, int... lane>
PX_INLINE S sum_halves(Vec<S> v, std::integer_sequence<int, lane...> all) {
  if constexpr (half == 0) {
    return v[0];
  } else {
    return sum_halves<S, half / 2>(v + __builtin_shufflevector(v, v, (lane ^ half)...), all);
  }
}

template <class S>
PX_INLINE S sum(Vec<S> v) {
  return sum_halves<S, lanes<S> / 2>(v, std::make_integer_sequence<int, lanes<S>>{});
}

// The sums of L vectors, each in the lane of its number: a tree in which two vectors become one.
template <class S, int count, int... lane>
PX_INLINE Vec<S> sums_pairwise(const Vec<S>* v, std::integer_sequence<int, lane...> all) {
  if constexpr (count == 1) {
    return v[0];
  } else {
    // Lane i of `half` becomes the sum of two lanes of one vector: of the first where bit
    // lanes / count of i is not set, else of the second.
    constexpr int L = lanes<S>, bit = L / count;
    Vec<S> half[count / 2];
    for (int i = 0; i < count / 2; ++i) {
      Vec<S> a = v[2 * i], b = v[2 * i + 1];
      half[i] = __builtin_shufflevector(a, b, ((lane & bit) ? lane - bit + L : lane)...) +
                __builtin_shufflevector(a, b, ((lane & bit) ? lane + L : lane + bit)...);
    }
    return sums_pairwise<S, count / 2>(half, all);
  }
}

template <class S>
PX_INLINE Vec<S> sums(const Vec<S>* v) {
  return sums_pairwise<S, lanes<S>>(v, std::make_integer_sequence<int, lanes<S>>{});
}

// Storage types of half-precision inputs.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  _Float16 value;
};

// Two consecutive positions, the first in the low half: what AVX-512-BF16 multiplies at once.
struct Bf16Pair {
  uint32_t bits;
};

PX_INLINE float widen(float v) { return v; }
PX_INLINE double widen(double v) { return v; }
PX_INLINE float widen(bf16 v) {
  uint32_t bits = static_cast<uint32_t>(v.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
PX_INLINE float widen(f16 v) { return static_cast<float>(v.value); }

// Round to nearest even; NaN stays NaN.
template <class To, class From>
PX_INLINE To narrow(From v) {
  if constexpr (std::is_same_v<To, bf16>) {
    float f = static_cast<float>(v);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    if (f != f) return bf16{0x7fc0};
    return bf16{static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else if constexpr (std::is_same_v<To, f16>) {
    return f16{static_cast<_Float16>(v)};
  } else {
    return static_cast<To>(v);
  }
}

// The type in which values stored as T are added up.
template <class T>
using Accumulator = std::conditional_t<std::is_same_v<T, double>, double, float>;

// One vector of accumulators from contiguous values of any storage type. On x86 the
// conversions are spelled out: GCC 12 widens vectors of uint16_t in halves and those of _Float16
// lane by lane. They are masked where the plain intrinsic makes GCC 12 warn of its own
// uninitialized variable.
template <class T>
PX_INLINE Vec<Accumulator<T>> load_wide(const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    Vec<uint32_t> bits;
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
    bits = reinterpret_cast<Vec<uint32_t>>(_mm512_maskz_cvtepu16_epi32(
        0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#elif defined(__AVX2__)
    for (int i = 0; i < lanes<float>; i += 8) {
      __m256i part =
          _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
      std::memcpy(reinterpret_cast<uint32_t*>(&bits) + i, &part, sizeof(part));
    }
#else
    typedef uint16_t Halves __attribute__((vector_size(PX_VECTOR_BYTES / 2)));
    Halves halves;
    std::memcpy(&halves, p, sizeof(halves));
    bits = __builtin_convertvector(halves, Vec<uint32_t>);
#endif
    return reinterpret_cast<Vec<float>>(bits << 16);
  } else if constexpr (std::is_same_v<T, f16>) {
    Vec<float> out;
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
    out = _mm512_maskz_cvtph_ps(0xffff, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
    for (int i = 0; i < lanes<float>; i += 8) {
      __m256 part = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p + i)));
      std::memcpy(reinterpret_cast<float*>(&out) + i, &part, sizeof(part));
    }
#else
    for (int i = 0; i < lanes<float>; ++i) out[i] = widen(p[i]);
#endif
    return out;
  } else {
    return load(p);
  }
}

// The reverse of load_wide, rounding to nearest even.
template <class T>
PX_INLINE void store_narrow(T* p, Vec<Accumulator<T>> v) {
  if constexpr (std::is_same_v<T, bf16>) {
    typedef uint16_t Halves __attribute__((vector_size(PX_VECTOR_BYTES / 2)));
    Vec<uint32_t> bits = reinterpret_cast<Vec<uint32_t>>(v);
    bits = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    Vec<uint32_t> nan = reinterpret_cast<Vec<uint32_t>>(v != v);
    Halves halves = __builtin_convertvector((bits & ~nan) | (nan & 0x7fc0), Halves);
    std::memcpy(p, &halves, sizeof(halves));
  } else if constexpr (std::is_same_v<T, f16>) {
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                        _mm512_maskz_cvtps_ph(0xffff, v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
    for (int i = 0; i < lanes<float>; i += 8) {
      __m256 part;
      std::memcpy(&part, reinterpret_cast<const float*>(&v) + i, sizeof(part));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + i),
                       _mm256_cvtps_ph(part, _MM_FROUND_TO_NEAREST_INT));
    }
#else
    for (int i = 0; i < lanes<float>; ++i) p[i] = narrow<f16>(v[i]);
#endif
  } else {
    store(p, v);
  }
}

}  // namespace perexample::cpu::PX_CAPABILITY
