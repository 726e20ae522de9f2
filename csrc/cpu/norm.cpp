// Backward of LayerNorm, RMSNorm and GroupNorm with the per-example moments of weight and bias,
// MATHS (7):
//   xhat = (x - mean) rstd;   G_b = sum_t dy xhat (weight), sum_t dy (bias);
//   dw = sum_b G_b, dw_sq = sum_b G_b^2;   h = dy weight;
//   dx = rstd (h - mean(h) - xhat mean(h xhat)), means over what was normalized together.
// RMSNorm is LayerNorm without the means of x and of h.
//
// Both read dy and x from memory once: a first sweep over a few rows (LayerNorm) or over one group
// (GroupNorm) takes all sums, a second one, now from the cache, writes dx. Meanwhile the first asks
// for the lines that the second will write, the second for those that the next first one will read.
//
// A task is a piece: a group of whole examples or, in LayerNorm with few examples, a part of one
// example's positions. Each piece has its own sums; they are combined in order.
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kTasks = 32;                        // tasks to aim at
constexpr int64_t kTaskSize = 1 << 15;                // elements that are worth a task
constexpr int64_t kMaxSums = 1 << 19;                 // elements of all pieces' sums
constexpr int64_t kCombined = 512;                    // columns that one task combines
constexpr int64_t kFetched = 1 << 14;                 // bytes of a group that are fetched early
constexpr int kRows = PX_VECTOR_BYTES == 64 ? 4 : 2;  // rows at a time: what the registers hold

PX_INLINE float square_root(float v) { return __builtin_sqrtf(v); }
PX_INLINE double square_root(double v) { return __builtin_sqrt(v); }

template <class A>
struct Statistics {
  A mean, rstd;
};

// Of n contiguous values; where they are not centered, the mean is 0.
template <class T>
Statistics<Accumulator<T>> statistics(const T* x, int64_t n, double eps, bool centered = true) {
  using A = Accumulator<T>;
  constexpr int64_t L = lanes<A>;
  auto average = [&](A center, bool squared) {
    Vec<A> total[4] = {};
    int64_t i = 0;
    for (; i + 4 * L <= n; i += 4 * L) {
      unroll<4>([&](auto v) PX_LAMBDA {
        Vec<A> d = load_wide(x + i + v * L) - broadcast(center);
        total[v] += squared ? d * d : d;
      });
    }
    A rest = 0;
    for (; i < n; ++i) {
      A d = widen(x[i]) - center;
      rest += squared ? d * d : d;
    }
    return (sum<A>((total[0] + total[1]) + (total[2] + total[3])) + rest) / static_cast<A>(n);
  };
  A mean = centered ? average(0, false) : A{0};
  A variance = average(mean, true);
  return {mean, 1 / square_root(variance + static_cast<A>(eps))};
}

// The weights as A, ones if there are none, zeros in the padding.
template <class A>
void widen_weight(DType dtype, const void* weight, int64_t n, int64_t padded, A* out) {
  for (int64_t i = 0; i < padded; ++i) out[i] = i < n ? 1 : 0;
  if (weight == nullptr) return;
  with_type(dtype, [&](auto tag) { widen_row(n, static_cast<const decltype(tag)*>(weight), out); });
}

// The sums of one piece, each `width` elements: G of the current example, and over examples the
// sums of G and of G^2; for the weight and for the bias.
template <class A>
struct Sums {
  A *G_w, *G_b, *sum_w, *sum_b, *square_w, *square_b;
  static constexpr int64_t kArrays = 6;

  Sums(A* memory, int64_t width)
      : G_w(memory),
        G_b(memory + width),
        sum_w(memory + 2 * width),
        sum_b(memory + 3 * width),
        square_w(memory + 4 * width),
        square_b(memory + 5 * width) {}
};

// At an example's end: adds G and its square over columns [begin, end).
template <class A>
void add_example(const Sums<A>& s, int64_t begin, int64_t end) {
  auto add = [&](const A* __restrict G, A* __restrict total, A* __restrict square) {
    for (int64_t i = begin; i < end; ++i) {
      total[i] += G[i];
      square[i] += G[i] * G[i];
    }
  };
  add(s.G_w, s.sum_w, s.square_w);
  add(s.G_b, s.sum_b, s.square_b);
}

// Combines the sums of all pieces and writes the outputs. With several parts to an example, their
// G are added before squaring. `sums` gives those of a piece.
template <class A, class Op, class F>
void combine(const Op& a, int64_t width, int64_t pieces, int64_t parts, const F& sums,
             const Parallel& parallel) {
  parallel(ceil_div(width, kCombined), [&](int64_t task) {
    int64_t begin = task * kCombined;
    int64_t n = min_of(kCombined, width - begin);
    auto write = [&](auto G, auto total, auto square, void* out, void* out_sq) {
      if (out == nullptr) return;
      A first[kCombined] = {}, second[kCombined] = {};
      for (int64_t piece = 0; piece < pieces; piece += parts) {
        if (parts == 1) {
          const A* from = sums(piece).*total + begin;
          const A* from_sq = sums(piece).*square + begin;
          for (int64_t i = 0; i < n; ++i) first[i] += from[i];
          for (int64_t i = 0; i < n; ++i) second[i] += from_sq[i];
        } else {
          A example[kCombined] = {};
          for (int64_t part = 0; part < parts; ++part) {
            const A* from = sums(piece + part).*G + begin;
            for (int64_t i = 0; i < n; ++i) example[i] += from[i];
          }
          for (int64_t i = 0; i < n; ++i) {
            first[i] += example[i];
            second[i] += example[i] * example[i];
          }
        }
      }
      with_type(a.weight_dtype,
                [&](auto tag) { narrow_row(n, first, static_cast<decltype(tag)*>(out) + begin); });
      narrow_row(n, second, static_cast<A*>(out_sq) + begin);
    };
    using S = Sums<A>;
    write(&S::G_w, &S::sum_w, &S::square_w, a.dw, a.dw_sq);
    write(&S::G_b, &S::sum_b, &S::square_b, a.db, a.db_sq);
  });
}

// --- LayerNorm, RMSNorm ---

// What a group of rows means to its example.
enum class Span { kInside, kWholeExamples };

// R rows from example b, position t on. With kInside they are positions of that example and are
// added to its G, which is started at its first rows and squared at its last; with kWholeExamples
// they are the same position of R examples, each of one position.
template <int R, bool affine, Span span, class T>
void layer_norm_rows(const LayerNorm& a, const Accumulator<T>* weight, int64_t b, int64_t t,
                     bool first, bool last, const Sums<Accumulator<T>>& sums) {
  using A = Accumulator<T>;
  constexpr int along = span == Span::kInside ? 1 : 0;
  const T* dy = static_cast<const T*>(a.dy) + b * a.dy_stride[0] + t * a.dy_stride[1];
  const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + t * a.x_stride[1];
  int64_t dy_step = a.dy_stride[along], x_step = a.x_stride[along];
  A mean[R], rstd[R];
  for (int r = 0; r < R; ++r) {
    if (a.rstd != nullptr) {
      int64_t at = b * a.T + t + r;
      mean[r] = a.mean != nullptr ? static_cast<const A*>(a.mean)[at] : A{0};
      rstd[r] = static_cast<const A*>(a.rstd)[at];
    } else {
      Statistics<A> s = statistics(x + r * x_step, a.D, a.eps, a.centered);
      mean[r] = s.mean;
      rstd[r] = s.rstd;
    }
  }

  T* dx = static_cast<T*>(a.dx) + (b * a.T + t) * a.D;
  bool wanted = a.dx != nullptr;
  Vec<A> total_h[R] = {}, total_hx[R] = {};
  each_vector<A>(a.D, [&](int64_t i, auto get, auto) PX_LAMBDA {
    Vec<A> w = load(weight + i);
    Vec<A> g_w{}, g_b{}, square_w{}, square_b{};
    if (affine && span == Span::kInside && !first) {
      g_w = load(sums.G_w + i);
      g_b = load(sums.G_b + i);
    }
    unroll<R>([&](auto r) PX_LAMBDA {
      Vec<A> d = get(dy + r * dy_step + i);
      Vec<A> xhat = (get(x + r * x_step + i) - broadcast(mean[r])) * broadcast(rstd[r]);
      Vec<A> h = d * w;
      if (wanted) fetch_to_write(dx + r * a.D, i);
      total_h[r] += h;
      total_hx[r] += h * xhat;
      if constexpr (span == Span::kInside) {
        g_w += d * xhat;
        g_b += d;
      } else {
        Vec<A> one = d * xhat;
        g_w += one;
        g_b += d;
        square_w += one * one;
        square_b += d * d;
      }
    });
    if constexpr (affine) {
      if (span == Span::kInside && !last) {
        store(sums.G_w + i, g_w);
        store(sums.G_b + i, g_b);
      } else {
        if constexpr (span == Span::kInside) {
          square_w = g_w * g_w;
          square_b = g_b * g_b;
        }
        store(sums.sum_w + i, load(sums.sum_w + i) + g_w);
        store(sums.sum_b + i, load(sums.sum_b + i) + g_b);
        store(sums.square_w + i, load(sums.square_w + i) + square_w);
        store(sums.square_b + i, load(sums.square_b + i) + square_b);
      }
    }
  });
  if (!wanted) return;

  A mean_h[R], slope[R];
  for (int r = 0; r < R; ++r) {
    mean_h[r] = a.centered ? sum<A>(total_h[r]) / static_cast<A>(a.D) : A{0};
    slope[r] = rstd[r] * (sum<A>(total_hx[r]) / static_cast<A>(a.D));
  }
  each_vector<A>(a.D, [&](int64_t i, auto get, auto put) PX_LAMBDA {
    Vec<A> w = load(weight + i);
    unroll<R>([&](auto r) PX_LAMBDA {
      Vec<A> h = get(dy + r * dy_step + i) * w - broadcast(mean_h[r]);
      Vec<A> centered = get(x + r * x_step + i) - broadcast(mean[r]);
      fetch(dy + r * dy_step, R * dy_step + i);
      fetch(x + r * x_step, R * x_step + i);
      put(dx + r * a.D + i, (h - centered * broadcast(slope[r])) * broadcast(rstd[r]));
    });
  });
}

template <bool affine, class T>
void layer_norm(const LayerNorm& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  int64_t width = ceil_div(a.D, lanes<A>) * lanes<A>;
  int64_t limit = min_of(kTasks, max_of(2, kMaxSums / (Sums<A>::kArrays * width)));
  int64_t pieces = max_of(1, min_of(limit, a.B * a.T * a.D / kTaskSize));
  int64_t examples = ceil_div(a.B, min_of(pieces, a.B));  // of a piece
  int64_t parts = examples > 1 ? 1 : min_of(max_of(pieces / a.B, 1), a.T);
  int64_t positions = ceil_div(a.T, parts);  // of a piece
  parts = ceil_div(a.T, positions);
  pieces = ceil_div(a.B, examples) * parts;

  int64_t elements = width + (affine ? pieces * Sums<A>::kArrays * width : 0);
  A* weight = static_cast<A*>(scratch(elements * static_cast<int64_t>(sizeof(A)), 0));
  widen_weight(a.weight_dtype, a.weight, a.D, width, weight);
  auto sums = [&](int64_t piece) {
    return Sums<A>(weight + width + piece * Sums<A>::kArrays * width, width);
  };

  parallel(pieces, [&](int64_t piece) {
    Sums<A> own = sums(piece);
    if constexpr (affine) {
      for (int64_t i = 0; i < Sums<A>::kArrays * width; ++i) own.G_w[i] = 0;
    }
    int64_t begin = piece / parts * examples;
    int64_t end = min_of(begin + examples, a.B);
    if (a.T == 1) {
      int64_t b = begin;
      for (; b + kRows <= end; b += kRows)
        layer_norm_rows<kRows, affine, Span::kWholeExamples, T>(a, weight, b, 0, true, true, own);
      for (; b < end; ++b)
        layer_norm_rows<1, affine, Span::kWholeExamples, T>(a, weight, b, 0, true, true, own);
      return;
    }
    int64_t from = piece % parts * positions;
    int64_t to = min_of(from + positions, a.T);
    for (int64_t b = begin; b < end; ++b) {
      int64_t t = from;
      for (; t + kRows <= to; t += kRows)
        layer_norm_rows<kRows, affine, Span::kInside, T>(a, weight, b, t, t == from,
                                                         parts == 1 && t + kRows == to, own);
      for (; t < to; ++t)
        layer_norm_rows<1, affine, Span::kInside, T>(a, weight, b, t, t == from,
                                                     parts == 1 && t + 1 == to, own);
    }
  });
  if constexpr (affine) combine<A>(a, a.D, pieces, parts, sums, parallel);
}

// --- GroupNorm ---

// Of one channel's n positions, the sum of dy (x - mean) and the sum of dy; dx, if wanted, is
// written next.
template <class T, class A>
void channel_sums(const T* dy, const T* x, const T* dx, int64_t n, A mean, A& product, A& plain) {
  constexpr int64_t L = lanes<A>;
  Vec<A> products[2] = {}, plains[2] = {};
  int64_t i = 0;
  auto add = [&](auto v) PX_LAMBDA {
    Vec<A> d = load_wide(dy + i + v * L);
    if (dx != nullptr) fetch_to_write(dx, i + v * L);
    products[v] += d * (load_wide(x + i + v * L) - broadcast(mean));
    plains[v] += d;
  };
  for (; i + 2 * L <= n; i += 2 * L) unroll<2>(add);
  for (; i + L <= n; i += L) unroll<1>(add);
  A product_rest = 0, plain_rest = 0;
  for (; i < n; ++i) {
    A d = widen(dy[i]);
    product_rest += d * (widen(x[i]) - mean);
    plain_rest += d;
  }
  product = sum<A>(products[0] + products[1]) + product_rest;
  plain = sum<A>(plains[0] + plains[1]) + plain_rest;
}

// dx = scale dy - slope (x - mean) - offset over one channel's n positions; those `ahead` are read
// next.
template <class T, class A>
void channel_gradient(const T* dy, const T* x, T* dx, int64_t n, int64_t ahead, A mean, A scale,
                      A slope, A offset) {
  constexpr int64_t L = lanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) {
    Vec<A> centered = load_wide(x + i) - broadcast(mean);
    fetch(dy, ahead + i);
    fetch(x, ahead + i);
    store_narrow(dx + i, broadcast(scale) * load_wide(dy + i) -
                             (broadcast(slope) * centered + broadcast(offset)));
  }
  for (; i < n; ++i) {
    dx[i] = narrow<T>(scale * widen(dy[i]) - (slope * (widen(x[i]) - mean) + offset));
  }
}

// The same two where every channel is one position, over the n channels of a group: G of weight and
// bias, and the sums of h xhat and h.
template <class T, class A>
void point_sums(const T* dy, const T* x, const A* weight, int64_t n, Statistics<A> s, A* G_w,
                A* G_b, A& sum_hx, A& sum_h) {
  Vec<A> total_hx{}, total_h{};
  each_vector<A>(n, [&](int64_t i, auto get, auto put) PX_LAMBDA {
    Vec<A> d = get(dy + i), w = get(weight + i);
    Vec<A> product = d * ((get(x + i) - broadcast(s.mean)) * broadcast(s.rstd));
    put(G_w + i, product);
    put(G_b + i, d);
    total_hx += w * product;
    total_h += w * d;
  });
  sum_hx = sum<A>(total_hx);
  sum_h = sum<A>(total_h);
}

template <class T, class A>
void point_gradient(const T* dy, const T* x, T* dx, const A* weight, int64_t n, Statistics<A> s,
                    A slope, A offset) {
  each_vector<A>(n, [&](int64_t i, auto get, auto put) PX_LAMBDA {
    Vec<A> scaled = get(dy + i) * (get(weight + i) * broadcast(s.rstd));
    Vec<A> centered = get(x + i) - broadcast(s.mean);
    put(dx + i, scaled - (broadcast(slope) * centered + broadcast(offset)));
  });
}

template <class T>
void group_norm(const GroupNorm& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  int64_t channels = a.C / a.groups;  // of a group
  int64_t size = channels * a.S;      // of a group
  int64_t ahead = size * static_cast<int64_t>(sizeof(T)) <= kFetched ? size : 0;
  int64_t limit = min_of(kTasks, max_of(2, kMaxSums / (Sums<A>::kArrays * a.C)));
  int64_t pieces = max_of(1, min_of(min_of(limit, a.B), a.B * a.C * a.S / kTaskSize));
  int64_t examples = ceil_div(a.B, pieces);  // of a piece
  pieces = ceil_div(a.B, examples);
  int64_t groups = ceil_div(a.groups, max_of(1, kTasks / pieces));  // of a task
  int64_t ranges = ceil_div(a.groups, groups);

  int64_t elements = a.C + pieces * Sums<A>::kArrays * a.C;
  A* weight = static_cast<A*>(scratch(elements * static_cast<int64_t>(sizeof(A)), 0));
  widen_weight(a.weight_dtype, a.weight, a.C, a.C, weight);
  auto sums = [&](int64_t piece) {
    return Sums<A>(weight + a.C + piece * Sums<A>::kArrays * a.C, a.C);
  };

  auto statistics_of = [&](int64_t b, int64_t g) -> Statistics<A> {
    int64_t i = a.constant ? g : b * a.groups + g;
    if (a.mean != nullptr && a.rstd != nullptr)
      return {static_cast<const A*>(a.mean)[i], static_cast<const A*>(a.rstd)[i]};
    return statistics(x + i * size, size, a.eps);
  };

  parallel(pieces * ranges, [&](int64_t task) {
    Sums<A> own = sums(task / ranges);
    int64_t b_begin = task / ranges * examples;
    int64_t b_end = min_of(b_begin + examples, a.B);
    int64_t g_begin = task % ranges * groups;
    int64_t g_end = min_of(g_begin + groups, a.groups);
    for (int64_t c = g_begin * channels; c < g_end * channels; ++c)
      own.sum_w[c] = own.sum_b[c] = own.square_w[c] = own.square_b[c] = 0;
    for (int64_t b = b_begin; b < b_end; ++b) {
      for (int64_t g = g_begin; g < g_end; ++g) {
        Statistics<A> s = statistics_of(b, g);
        int64_t c_begin = g * channels;
        int64_t c_end = c_begin + channels;
        int64_t first = (b * a.C + c_begin) * a.S;
        A total_h = 0, total_hx = 0;
        if (a.S == 1) {
          point_sums(dy + first, x + first, weight + c_begin, channels, s, own.G_w + c_begin,
                     own.G_b + c_begin, total_hx, total_h);
        }
        for (int64_t c = c_begin; c < c_end && a.S > 1; ++c) {
          int64_t at = (b * a.C + c) * a.S;
          A G_w, G_b;
          channel_sums(dy + at, x + at, dx == nullptr ? nullptr : dx + at, a.S, s.mean, G_w, G_b);
          G_w *= s.rstd;
          own.G_w[c] = G_w;
          own.G_b[c] = G_b;
          total_hx += weight[c] * G_w;
          total_h += weight[c] * G_b;
        }
        if (dx == nullptr) continue;
        A slope = a.constant ? A{0} : s.rstd * s.rstd * (total_hx / static_cast<A>(size));
        A offset = a.constant ? A{0} : s.rstd * (total_h / static_cast<A>(size));
        if (a.S == 1) {
          point_gradient(dy + first, x + first, dx + first, weight + c_begin, channels, s, slope,
                         offset);
          continue;
        }
        for (int64_t c = c_begin; c < c_end; ++c) {
          int64_t at = (b * a.C + c) * a.S;
          channel_gradient(dy + at, x + at, dx + at, a.S, ahead, s.mean, s.rstd * weight[c], slope,
                           offset);
        }
      }
      add_example(own, g_begin * channels, g_end * channels);
    }
  });
  combine<A>(a, a.C, pieces, 1, sums, parallel);
}

// Zeros for n elements of a possibly unwanted output.
void clear(DType dtype, void* out, int64_t n) {
  if (out == nullptr) return;
  with_type(dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < n; ++i) static_cast<T*>(out)[i] = narrow<T>(0.0f);
  });
}

template <class Op>
void clear_affine(const Op& a, int64_t n) {
  DType square = a.dtype == DType::f64 ? DType::f64 : DType::f32;
  clear(a.weight_dtype, a.dw, n);
  clear(square, a.dw_sq, n);
  clear(a.weight_dtype, a.db, n);
  clear(square, a.db_sq, n);
}

}  // namespace

void layer_norm_moments(const LayerNorm& a, const Parallel& parallel) {
  if (a.B == 0 || a.T == 0 || a.D == 0) return clear_affine(a, a.D);
  with_type(a.dtype, [&](auto tag) {
    using T = decltype(tag);
    if (a.dw != nullptr || a.db != nullptr) {
      layer_norm<true, T>(a, parallel);
    } else {
      layer_norm<false, T>(a, parallel);
    }
  });
}

void group_norm_moments(const GroupNorm& a, const Parallel& parallel) {
  if (a.B == 0 || a.C == 0 || a.S == 0) return clear_affine(a, a.C);
  with_type(a.dtype, [&](auto tag) { group_norm<decltype(tag)>(a, parallel); });
}

}  // namespace perexample::cpu::PX_CAPABILITY
