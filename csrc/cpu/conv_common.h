// What the convolution kernels share: boxes of output positions, the input window that a box needs,
// and the copies that pad, widen and transpose.
#pragma once

#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {

// Convolutions whose groups are too narrow to fill vectors with output channels.
bool prefers_positions(const Conv& conv);
void conv_moments_by_positions(const Conv& conv, const Parallel& parallel);

namespace {

PX_INLINE int64_t volume(const int64_t (&size)[3]) { return size[0] * size[1] * size[2]; }
PX_INLINE int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }

// The output positions of one example, cut into equal boxes that follow one another in t: only when
// a box is one row thick is it cut along the row. Depends on shapes only, because a box ends a sum.
struct Boxes {
  int64_t size[3], count[3];

  Boxes(const Conv& conv, int64_t max_positions, int64_t max_window) {
    for (int i = 0; i < 3; ++i) size[i] = conv.out[i];
    for (int i = 0; i < 3; ++i) {
      while (size[i] > 1 && (volume(size) > max_positions || window(conv) > max_window))
        size[i] = ceil_div(size[i], 2);
      count[i] = ceil_div(conv.out[i], size[i]);
    }
  }

  // The elements per channel that the largest box reads, padding included.
  int64_t window(const Conv& conv) const {
    int64_t total = 1;
    for (int i = 0; i < 3; ++i) total *= extent(conv, i, size[i]);
    return total;
  }

  static int64_t extent(const Conv& conv, int i, int64_t positions) {
    return (positions - 1) * conv.stride[i] + (conv.kernel[i] - 1) * conv.dilation[i] + 1;
  }
};

struct Box {
  int64_t begin[3], size[3];

  Box(const Conv& conv, const Boxes& boxes, int64_t index) {
    for (int i = 2; i >= 0; --i) {
      begin[i] = index % boxes.count[i] * boxes.size[i];
      size[i] = min_of(boxes.size[i], conv.out[i] - begin[i]);
      index /= boxes.count[i];
    }
  }
};

// Lanes of the butterfly that exchanges blocks of K lanes between two rows of a square.
template <int K, bool Upper, class V, std::size_t... Lane>
PX_INLINE V exchange(V a, V b, std::index_sequence<Lane...>) {
  constexpr int N = sizeof...(Lane);
  if constexpr (Upper) {
    return __builtin_shufflevector(a, b, ((Lane & K) ? N + Lane : Lane + K)...);
  } else {
    return __builtin_shufflevector(a, b, ((Lane & K) ? N + Lane - K : Lane)...);
  }
}

// a[0], a[2], ... b[1], b[3], ...
template <class V, std::size_t... Lane>
PX_INLINE V even_lanes(V a, V b, std::index_sequence<Lane...>) {
  constexpr std::size_t N = sizeof...(Lane);
  return __builtin_shufflevector(a, b, (Lane < N / 2 ? 2 * Lane : 2 * Lane + 1)...);
}

template <int K, class V, int N>
PX_INLINE void transpose_stages(V (&row)[N]) {
  if constexpr (K < N) {
    unroll<N>([&](auto r) PX_LAMBDA {
      constexpr int i = r;
      if constexpr ((i & K) == 0) {
        V a = row[i], b = row[i + K];
        row[i] = exchange<K, false>(a, b, std::make_index_sequence<N>{});
        row[i + K] = exchange<K, true>(a, b, std::make_index_sequence<N>{});
      }
    });
    transpose_stages<2 * K>(row);
  }
}

// to[c][r] = from[r][c] for r < rows, c < columns; both contiguous along their last index.
template <class From, class To>
void transpose(int64_t rows, int64_t columns, const From* from, int64_t from_stride, To* to,
               int64_t to_stride) {
  using S = Accumulator<From>;
  constexpr int L = lanes<S>;
  if constexpr (std::is_same_v<S, Accumulator<To>>) {
    if (rows >= L && columns >= L) {
      // The last squares overlap their neighbours, which writes the same values again.
      for (int64_t r = 0; r < rows; r += L) {
        int64_t r0 = min_of(r, rows - L);
        for (int64_t c = 0; c < columns; c += L) {
          int64_t c0 = min_of(c, columns - L);
          Vec<S> square[L];
          unroll<L>([&](auto i)
                        PX_LAMBDA { square[i] = load_wide(from + (r0 + i) * from_stride + c0); });
          transpose_stages<1>(square);
          unroll<L>([&](auto i)
                        PX_LAMBDA { store_narrow(to + (c0 + i) * to_stride + r0, square[i]); });
        }
      }
      return;
    }
  }
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      to[c * to_stride + r] = narrow<To>(widen(from[r * from_stride + c]));
}

// to[i] = from[i * step] for i < n.
template <class In, class S>
PX_INLINE void copy_row(int64_t n, const In* from, int64_t step, S* to) {
  static_assert(std::is_same_v<S, Accumulator<In>>);
  constexpr int L = lanes<S>;
  if (n >= L && step == 1) {
    for (int64_t i = 0; i < n - L; i += L) store(to + i, load_wide(from + i));
    store(to + n - L, load_wide(from + n - L));
  } else if (n >= L && step == 2) {
    for (int64_t i = 0;; i = min_of(i + L, n - L)) {
      // The even values; the second load starts one early so as not to pass the last.
      const In* pair = from + 2 * i;
      store(to + i,
            even_lanes(load_wide(pair), load_wide(pair + L - 1), std::make_index_sequence<L>{}));
      if (i == n - L) break;
    }
  } else {
    for (int64_t i = 0; i < n; ++i) to[i] = widen(from[i * step]);
  }
}

// The part of a grid (origin + step * i, i < size) of input positions that is not padding.
struct Inside {
  int64_t begin[3], end[3];

  Inside(const Conv& conv, const int64_t (&origin)[3], const int64_t (&step)[3],
         const int64_t (&size)[3]) {
    for (int i = 0; i < 3; ++i) {
      begin[i] = origin[i] < 0 ? ceil_div(-origin[i], step[i]) : 0;
      end[i] =
          origin[i] < conv.in[i] ? min_of(ceil_div(conv.in[i] - origin[i], step[i]), size[i]) : 0;
    }
  }
};

template <class S>
PX_INLINE void zero(S* to, int64_t n) {
  std::memset(static_cast<void*>(to), 0, static_cast<size_t>(n) * sizeof(S));
}

template <class T>
PX_INLINE const T* at(const void* base, int64_t offset) {
  return static_cast<const T*>(base) + offset;
}

}  // namespace
}  // namespace perexample::cpu::PX_CAPABILITY
