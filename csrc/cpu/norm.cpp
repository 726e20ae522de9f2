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

constexpr int64_t kTasks = 32;               // tasks to aim at
constexpr int64_t kTaskSize = 1 << 15;       // elements that are worth a task
constexpr int64_t kGroupTaskSize = 1 << 14;  // the same in GroupNorm
constexpr int64_t kMaxSums = 1 << 19;        // elements of all pieces' sums
constexpr int64_t kCombined = 512;           // columns that one task combines
constexpr int64_t kFetched = 1 << 14;        // bytes of a group that are fetched early
constexpr int64_t kTogether = 8;             // groups
constexpr int64_t kTogetherBytes = 1 << 12;  // of dy of all groups that share a sweep
constexpr int kRows = 2;                     // rows at a time: what the L1 cache holds, dx too
constexpr int kExamples = PX_VECTOR_BYTES == 64 ? 4 : 2;  // of one row each: what registers hold
// Whether to ask early for lines of dx in GroupNorm: with AVX-512 (Zen 4) it costs up to a fifth.
constexpr bool kFetchDx = PX_VECTOR_BYTES < 64;

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

// Combines the sums of all pieces in columns [begin, end) and writes them to the outputs. With
// several parts to an example, their G are added before squaring. `sums` gives those of a piece.
template <class A, class Op, class F>
void combine_columns(const Op& a, int64_t begin, int64_t end, int64_t pieces, int64_t parts,
                     const F& sums) {
  int64_t n = end - begin;
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
}

template <class A, class Op, class F>
void combine(const Op& a, int64_t width, int64_t pieces, int64_t parts, const F& sums,
             const Parallel& parallel) {
  parallel(ceil_div(width, kCombined), [&](int64_t task) {
    int64_t begin = task * kCombined;
    combine_columns<A>(a, begin, min_of(begin + kCombined, width), pieces, parts, sums);
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
      for (; b + kExamples <= end; b += kExamples)
        layer_norm_rows<kExamples, affine, Span::kWholeExamples, T>(a, weight, b, 0, true, true,
                                                                    own);
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

// The vectors of one cache line of T.
template <class T>
constexpr int kLineVectors = 64 / (lanes<Accumulator<T>> * static_cast<int>(sizeof(T)));

// Of one channel's n positions, the sums of dy (x - mean) and of dy, spread over the lanes; dx, if
// wanted, is written next.
template <bool wanted, class T, class A>
PX_INLINE void channel_sums(const T* dy, const T* x, const T* dx, int64_t n, A mean,
                            Vec<A>& product, Vec<A>& plain) {
  constexpr int64_t L = lanes<A>;
  constexpr int V = kLineVectors<T>;
  Vec<A> products[V] = {}, plains[V] = {};
  int64_t i = 0;
  auto add = [&](auto v) PX_LAMBDA {
    Vec<A> d = load_wide(dy + i + v * L);
    products[v] += d * (load_wide(x + i + v * L) - broadcast(mean));
    plains[v] += d;
  };
  for (; i + V * L <= n; i += V * L) {
    if (wanted && kFetchDx) fetch_to_write(dx, i);
    unroll<V>(add);
  }
  unroll<V - 1>([&](auto v) PX_LAMBDA {
    products[0] += products[v + 1];
    plains[0] += plains[v + 1];
  });
  for (; i + L <= n; i += L) unroll<1>(add);
  if (i < n) {
    Vec<A> product_rest{}, plain_rest{};
    for (; i < n; ++i) {
      A d = widen(dy[i]);
      product_rest[0] += d * (widen(x[i]) - mean);
      plain_rest[0] += d;
    }
    products[0] += product_rest;
    plains[0] += plain_rest;
  }
  product = products[0];
  plain = plains[0];
}

// G of weight and bias of the n channels of a group, which `sums_at` makes by vectors from channel
// c on (`get` loads one), and the sums of h xhat and h.
template <class A, class F>
PX_INLINE void weighted_sums(const A* weight, int64_t n, A* G_w, A* G_b, A& sum_hx, A& sum_h,
                             const F& sums_at) {
  Vec<A> total_hx{}, total_h{};
  each_vector<A>(n, [&](int64_t c, auto get, auto put) PX_LAMBDA {
    Vec<A> g_w, g_b, w = get(weight + c);
    sums_at(c, get, g_w, g_b);
    put(G_w + c, g_w);
    put(G_b + c, g_b);
    total_hx += w * g_w;
    total_h += w * g_b;
  });
  sum_hx = sum<A>(total_hx);
  sum_h = sum<A>(total_h);
}

// The first lanes of v are half of it, its lower or its upper one, the others 0.
template <class A, bool upper, int... lane>
PX_INLINE Vec<A> half_of(Vec<A> v, std::integer_sequence<int, lane...>) {
  constexpr int L = lanes<A>;
  return __builtin_shufflevector(v, Vec<A>{}, (lane < L / 2 ? lane + upper * L / 2 : L + lane)...);
}

// The same of channels of S positions each.
template <bool wanted, class T, class A>
void group_sums(const T* dy, const T* x, const T* dx, const A* weight, int64_t n, int64_t S,
                Statistics<A> s, A* G_w, A* G_b, A& sum_hx, A& sum_h) {
  constexpr int64_t L = lanes<A>;
  auto sums_at = [&](int64_t c, auto, Vec<A>& g_w, Vec<A>& g_b) PX_LAMBDA {
    int64_t present = min_of(L, n - c);
    if (present <= L / 2) {  // both in one tree
      Vec<A> both[L];
      for (int64_t j = present; j < L / 2; ++j) both[j] = both[L / 2 + j] = Vec<A>{};
      for (int64_t j = 0; j < present; ++j) {
        int64_t at = (c + j) * S;
        channel_sums<wanted>(dy + at, x + at, dx + at, S, s.mean, both[j], both[L / 2 + j]);
      }
      Vec<A> totals = sums<A>(both);
      constexpr auto all = std::make_integer_sequence<int, lanes<A>>{};
      g_w = half_of<A, false>(totals, all) * broadcast(s.rstd);
      g_b = half_of<A, true>(totals, all);
      return;
    }
    Vec<A> product[L], plain[L];
    for (int64_t j = present; j < L; ++j) product[j] = plain[j] = Vec<A>{};
    for (int64_t j = 0; j < present; ++j) {
      int64_t at = (c + j) * S;
      channel_sums<wanted>(dy + at, x + at, dx + at, S, s.mean, product[j], plain[j]);
    }
    g_w = sums<A>(product) * broadcast(s.rstd);
    g_b = sums<A>(plain);
  };
  weighted_sums(weight, n, G_w, G_b, sum_hx, sum_h, sums_at);
}

// dx = rstd weight dy - slope (x - mean) - offset over the n channels of a group; what lies `ahead`
// is read next.
template <class T, class A>
void group_gradient(const T* dy, const T* x, T* dx, const A* weight, int64_t n, int64_t S,
                    int64_t ahead, Statistics<A> s, A slope, A offset) {
  constexpr int64_t L = lanes<A>;
  constexpr int V = kLineVectors<T>;
  for (int64_t c = 0; c < n; ++c, dy += S, x += S, dx += S) {
    A scale = s.rstd * weight[c];
    int64_t i = 0;
    auto write = [&](auto v) PX_LAMBDA {
      Vec<A> centered = load_wide(x + i + v * L) - broadcast(s.mean);
      store_narrow(dx + i + v * L, broadcast(scale) * load_wide(dy + i + v * L) -
                                       (broadcast(slope) * centered + broadcast(offset)));
    };
    for (; i + V * L <= S; i += V * L) {
      fetch(dy, ahead + i);
      fetch(x, ahead + i);
      unroll<V>(write);
    }
    for (; i + L <= S; i += L) unroll<1>(write);
    for (; i < S; ++i) {
      dx[i] = narrow<T>(scale * widen(dy[i]) - (slope * (widen(x[i]) - s.mean) + offset));
    }
  }
}

// The same two where every channel is one position.
template <class T, class A>
void point_sums(const T* dy, const T* x, const A* weight, int64_t n, Statistics<A> s, A* G_w,
                A* G_b, A& sum_hx, A& sum_h) {
  auto sums_at = [&](int64_t c, auto get, Vec<A>& g_w, Vec<A>& g_b) PX_LAMBDA {
    g_b = get(dy + c);
    g_w = g_b * ((get(x + c) - broadcast(s.mean)) * broadcast(s.rstd));
  };
  weighted_sums(weight, n, G_w, G_b, sum_hx, sum_h, sums_at);
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

// What the second sweep over a group takes from the first.
template <class A>
struct Group {
  Statistics<A> statistics;
  A slope, offset;
};

template <class T>
void group_norm(const GroupNorm& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  const T* dy = static_cast<const T*>(a.dy);
  const T* x = static_cast<const T*>(a.x);
  T* dx = static_cast<T*>(a.dx);
  int64_t channels = a.C / a.groups;  // of a group
  int64_t size = channels * a.S;      // of a group
  int64_t bytes = size * static_cast<int64_t>(sizeof(T));
  // Groups that share a sweep: the sums of one are there only some time after its last element.
  int64_t together = max_of(1, min_of(kTogether, kTogetherBytes / bytes));
  int64_t tasks = max_of(1, min_of(kTasks, a.B * a.C * a.S / kGroupTaskSize));
  int64_t limit = max_of(2, kMaxSums / (Sums<A>::kArrays * a.C));
  int64_t examples = ceil_div(a.B, min_of(min_of(limit, a.B), tasks));  // of a piece
  int64_t pieces = ceil_div(a.B, examples);
  int64_t groups = ceil_div(a.groups, ceil_div(tasks, pieces));  // of a task
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

  auto sums_of = [&](const Sums<A>& own, int64_t b, int64_t g) -> Group<A> {
    Statistics<A> s = statistics_of(b, g);
    int64_t c = g * channels, at = (b * a.C + c) * a.S;
    A total_h = 0, total_hx = 0;
    if (a.S == 1) {
      point_sums(dy + at, x + at, weight + c, channels, s, own.G_w + c, own.G_b + c, total_hx,
                 total_h);
    } else if (dx == nullptr) {
      group_sums<false>(dy + at, x + at, x, weight + c, channels, a.S, s, own.G_w + c, own.G_b + c,
                        total_hx, total_h);
    } else {
      group_sums<true>(dy + at, x + at, dx + at, weight + c, channels, a.S, s, own.G_w + c,
                       own.G_b + c, total_hx, total_h);
    }
    if (a.constant) return {s, 0, 0};
    return {s, s.rstd * s.rstd * (total_hx / static_cast<A>(size)),
            s.rstd * (total_h / static_cast<A>(size))};
  };
  auto gradient_of = [&](int64_t b, int64_t g, const Group<A>& group, int64_t ahead) {
    const auto& [s, slope, offset] = group;
    int64_t c = g * channels, at = (b * a.C + c) * a.S;
    if (a.S == 1) {
      point_gradient(dy + at, x + at, dx + at, weight + c, channels, s, slope, offset);
    } else {
      group_gradient(dy + at, x + at, dx + at, weight + c, channels, a.S, ahead, s, slope, offset);
    }
  };

  parallel(pieces * ranges, [&](int64_t task) {
    Sums<A> own = sums(task / ranges);
    int64_t b_begin = task / ranges * examples;
    int64_t b_end = min_of(b_begin + examples, a.B);
    int64_t g_begin = task % ranges * groups;
    int64_t g_end = min_of(g_begin + groups, a.groups);
    int64_t c_begin = g_begin * channels, c_end = g_end * channels;
    for (int64_t c = c_begin; c < c_end; ++c)
      own.sum_w[c] = own.sum_b[c] = own.square_w[c] = own.square_b[c] = 0;
    for (int64_t b = b_begin; b < b_end; ++b) {
      for (int64_t g = g_begin; g < g_end; g += together) {
        Group<A> some[kTogether];
        int64_t n = min_of(together, g_end - g);
        for (int64_t i = 0; i < n; ++i) some[i] = sums_of(own, b, g + i);
        if (dx == nullptr) continue;
        int64_t ahead = bytes > kFetched ? 0
                        : g + n < g_end  ? n * size
                                         : (a.groups - (g - g_begin)) * size;
        for (int64_t i = 0; i < n; ++i) gradient_of(b, g + i, some[i], ahead);
      }
      add_example(own, c_begin, c_end);
    }
    for (int64_t c = c_begin; pieces == 1 && c < c_end; c += kCombined)
      combine_columns<A>(a, c, min_of(c + kCombined, c_end), 1, 1, sums);
  });
  if (pieces > 1) combine<A>(a, a.C, pieces, 1, sums, parallel);
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
