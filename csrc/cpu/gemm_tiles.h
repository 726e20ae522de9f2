// Register tiles for sums over examples of products and of their squares, and the packing that
// feeds them. One operand, D, is packed into panels of MR (a few) columns, which become rows of the
// output, the other, X, into panels of kPanel<S> columns; both run along (example, position), so
// packing copies rows and transposes nothing. A tile is all pairs of one D panel with one X panel:
//
//   G_b[m,n] = sum_t D[b,t,m] X[b,t,n];   g = sum_b G_b;   s = sum_b G_b^2.
//
// Each tile runs over all examples of a group, so g and s reach memory once per group. How G, g and
// s share the register file depends on T and on the number of registers:
//   T = 1       s is itself a product, of the squares: they are packed behind the operands.
//   resident    G, g and s all stay in registers: small tiles, no traffic.
//   paired      G of two examples in registers, g and s in an L1 buffer that is touched half as
//               often: for small T.
//   delayed     G of one example in registers, a taller tile, and the drain of the example before
//               spread over its products: for larger T.
//   single      G alone, for one example or part of it.
//
// The packed elements, E, are of the type of the sums, S, or pairs of bfloat16 where the processor
// has an instruction for them: then a packed row holds two positions of an example, the last of an
// odd number beside a zero, and T counts packed rows.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

#ifdef PX_BF16_DOT
#include PX_BF16_DOT  // the tests' own kBf16Dot and dot()
#endif

namespace perexample::cpu::PX_CAPABILITY {
namespace {

#if defined(__AVX512F__) || defined(__aarch64__) || PX_VECTOR_BYTES == 64
inline constexpr bool kManyRegisters = true;  // 32 instead of 16
#else
inline constexpr bool kManyRegisters = false;
#endif

inline constexpr int kPanelVectors = 2;
template <class S>
inline constexpr int kPanel = kPanelVectors * lanes<S>;
inline constexpr int kMaxTileRows = kManyRegisters ? 12 : 6;

PX_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
PX_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Makes GCC load a vector once, instead of once for every product that uses it.
template <class V>
PX_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif (defined(__AVX__) && PX_VECTOR_BYTES == 32) || (defined(__SSE2__) && PX_VECTOR_BYTES == 16)
  asm("" : "+x"(v));
#endif
}

// Makes GCC leave a buffer of accumulators in memory: in registers they would crowd out the ones of
// the inner loop.
template <class T>
PX_INLINE void keep_in_memory(T& buffer) {
  asm volatile("" ::"r"(&buffer) : "memory");
}

#if defined(__AVX512BF16__) && PX_VECTOR_BYTES == 64
inline constexpr bool kBf16Dot = true;

// sum + both products of each pair. Numbers below the smallest normal float32 count as 0.
PX_INLINE Vec<float> dot(Vec<float> sum, Vec<uint32_t> a, Vec<uint32_t> b) {
  return _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(a), reinterpret_cast<__m512bh>(b));
}
#elif !defined(PX_BF16_DOT)
inline constexpr bool kBf16Dot = false;  // nothing is packed as pairs, and nothing calls dot()
#endif

// What a packed element is in a register.
template <class E>
using Lane = std::conditional_t<std::is_same_v<E, Bf16Pair>, uint32_t, E>;

PX_INLINE float lane(float e) { return e; }
PX_INLINE double lane(double e) { return e; }
PX_INLINE uint32_t lane(Bf16Pair e) { return e.bits; }

// G (+)= d x for one packed row.
template <class E, int MR, int NV, bool kFirst>
PX_INLINE void multiply(Vec<Accumulator<E>> (&G)[MR * NV], const E* d, const E* x) {
  using L = Lane<E>;
  Vec<L> columns[NV];
  unroll<NV>([&](auto n) PX_LAMBDA {
    columns[n] = load(reinterpret_cast<const L*>(x) + n * lanes<L>);
    keep_in_register(columns[n]);
  });
  unroll<MR>([&](auto m) PX_LAMBDA {
    Vec<L> row = broadcast(lane(d[m]));
    unroll<NV>([&](auto n) PX_LAMBDA {
      constexpr int i = m * NV + n;
      if constexpr (std::is_same_v<E, Bf16Pair>) {
        G[i] = dot(kFirst ? Vec<float>{} : G[i], row, columns[n]);
      } else if constexpr (kFirst) {
        G[i] = row * columns[n];
      } else {
        G[i] += row * columns[n];
      }
    });
  });
}

// The products of N consecutive examples side by side; d and x end behind the last. The first
// kUnroll positions are a block of straight code, as are the next; kExact: T == kUnroll.
template <class E, int MR, int NV, int N, int kUnroll, bool kExact>
PX_INLINE void multiply_examples(Vec<Accumulator<E>> (&G)[N][MR * NV], const E*& d, const E*& x,
                                 int64_t T) {
  auto position = [&](auto first) PX_LAMBDA {
    unroll<N>([&](auto e) PX_LAMBDA {
      multiply<E, MR, NV, decltype(first)::value>(G[e], d + e * T * MR, x + e * T * kPanel<E>);
    });
    d += MR;
    x += kPanel<E>;
  };
  position(std::true_type{});
  unroll<kUnroll - 1>([&](auto) PX_LAMBDA { position(std::false_type{}); });
  if constexpr (!kExact) {
    int64_t left = T - kUnroll;
    for (; left >= kUnroll; left -= kUnroll) {
      unroll<kUnroll>([&](auto) PX_LAMBDA { position(std::false_type{}); });
    }
    for (; left > 0; --left) position(std::false_type{});
  }
  d += (N - 1) * T * MR;
  x += (N - 1) * T * kPanel<E>;
}

// Where a tile of MR x NV vectors goes: row m of g is at m * g_stride. Without `add` it is stored.
// A single tile whose example has more pieces keeps G in `example` until the last of them.
template <class S>
struct TileOutput {
  S *g, *s;
  int64_t g_stride, s_stride;
  bool add;
  S* example;
  bool begin, end;
};

template <class S, int MR, int NV, class F>
PX_INLINE void put(S* out, int64_t stride, bool add, const F& value) {
  unroll<MR>([&](auto m) PX_LAMBDA {
    unroll<NV>([&](auto n) PX_LAMBDA {
      S* to = out + m * stride + n * lanes<S>;
      Vec<S> v = value(std::integral_constant<int, m * NV + n>{});
      store(to, add ? load(to) + v : v);
    });
  });
}

// g and s of a finished tile, through `sum(i)` and `square_sum(i)`.
template <class S, int MR, int NV, class F, class H>
PX_INLINE void put(const TileOutput<S>& out, const F& sum, const H& square_sum) {
  if (out.add) {
    put<S, MR, NV>(out.g, out.g_stride, true, sum);
    put<S, MR, NV>(out.s, out.s_stride, true, square_sum);
  } else {
    put<S, MR, NV>(out.g, out.g_stride, false, sum);
    put<S, MR, NV>(out.s, out.s_stride, false, square_sum);
  }
}

// G = sum over rows of d x.
template <class E, int MR, int NV>
PX_INLINE void multiply_rows(Vec<Accumulator<E>> (&G)[MR * NV], const E* d, const E* x,
                             int64_t rows) {
  unroll<MR * NV>([&](auto i) PX_LAMBDA { G[i] = Vec<Accumulator<E>>{}; });
  for (int64_t row = 0; row < rows; ++row) {
    multiply<E, MR, NV, false>(G, d, x);
    d += MR;
    x += kPanel<E>;
  }
}

// The tiles below share one signature: `examples` examples of T positions.
template <class E>
using Tile = void (*)(const E* d, const E* x, int64_t examples, int64_t T,
                      const TileOutput<Accumulator<E>>& out);

template <class E, int MR, int NV>
void single_tile(const E* d, const E* x, int64_t, int64_t T,
                 const TileOutput<Accumulator<E>>& out) {
  using S = Accumulator<E>;
  Vec<S> G[MR * NV];
  multiply_rows<E, MR, NV>(G, d, x, T);
  if (!out.begin) {
    unroll<MR * NV>([&](auto i) PX_LAMBDA { G[i] += load(out.example + i * lanes<S>); });
  }
  if (out.end) {
    put<S, MR, NV>(
        out, [&](auto i) PX_LAMBDA { return G[i]; }, [&](auto i) PX_LAMBDA { return G[i] * G[i]; });
  } else {
    unroll<MR * NV>([&](auto i) PX_LAMBDA { store(out.example + i * lanes<S>, G[i]); });
  }
}

template <class S, int MR, int NV>
void squared_operands_tile(const S* d, const S* x, int64_t examples, int64_t,
                           const TileOutput<S>& out) {
  auto product = [&](S* to, int64_t stride) PX_LAMBDA {
    Vec<S> G[MR * NV];
    multiply_rows<S, MR, NV>(G, d, x, examples);
    auto value = [&](auto i) PX_LAMBDA { return G[i]; };
    if (out.add) {
      put<S, MR, NV>(to, stride, true, value);
    } else {
      put<S, MR, NV>(to, stride, false, value);
    }
    d += examples * MR;
    x += examples * kPanel<S>;
  };
  product(out.g, out.g_stride);
  product(out.s, out.s_stride);
}

template <class E, int MR, int NV, int kUnroll, bool kExact>
void resident_tile(const E* d, const E* x, int64_t examples, int64_t T,
                   const TileOutput<Accumulator<E>>& out) {
  using S = Accumulator<E>;
  Vec<S> sum[MR * NV], square_sum[MR * NV];
  unroll<MR * NV>([&](auto i) PX_LAMBDA { sum[i] = square_sum[i] = Vec<S>{}; });
  for (int64_t b = 0; b < examples; ++b) {
    Vec<S> G[1][MR * NV];
    multiply_examples<E, MR, NV, 1, kUnroll, kExact>(G, d, x, kExact ? kUnroll : T);
    unroll<MR * NV>([&](auto i) PX_LAMBDA {
      sum[i] += G[0][i];
      square_sum[i] += G[0][i] * G[0][i];
    });
  }
  put<S, MR, NV>(
      out, [&](auto i) PX_LAMBDA { return sum[i]; },
      [&](auto i) PX_LAMBDA { return square_sum[i]; });
}

// Two examples at a time in registers, so that g and s are in memory half as often.
template <class S, int MR, int NV, int kUnroll>
void paired_tile(const S* d, const S* x, int64_t examples, int64_t T, const TileOutput<S>& out) {
  constexpr int N = MR * NV, L = lanes<S>;
  struct {
    alignas(64) S g[N * L], s[N * L];
  } sums;
  S *const g = sums.g, *const s = sums.s;
  unroll<N>([&](auto i) PX_LAMBDA {
    store(g + i * L, Vec<S>{});
    store(s + i * L, Vec<S>{});
  });
  auto add = [&](auto count) PX_LAMBDA {
    constexpr int E = decltype(count)::value;
    keep_in_memory(sums);
    Vec<S> G[E][N];
    multiply_examples<S, MR, NV, E, kUnroll, false>(G, d, x, T);
    unroll<N>([&](auto i) PX_LAMBDA {
      Vec<S> sum = G[0][i];
      Vec<S> square_sum = load(s + i * L) + G[0][i] * G[0][i];
      if constexpr (E == 2) {
        sum += G[1][i];
        square_sum += G[1][i] * G[1][i];
      }
      store(g + i * L, load(g + i * L) + sum);
      store(s + i * L, square_sum);
    });
  };
  int64_t b = 0;
  for (; b + 2 <= examples; b += 2) add(std::integral_constant<int, 2>{});
  if (b < examples) add(std::integral_constant<int, 1>{});
  put<S, MR, NV>(
      out, [&](auto i) PX_LAMBDA { return load(g + i * L); },
      [&](auto i) PX_LAMBDA { return load(s + i * L); });
}

// The G of one example is put aside and added to g and s between the products of the next one: g
// and s of a tile this size, written at once, would fill the store queue.
template <class S, int MR, int NV, int kUnroll>
void delayed_tile(const S* d, const S* x, int64_t examples, int64_t T, const TileOutput<S>& out) {
  constexpr int N = MR * NV, L = lanes<S>;
  struct {
    alignas(64) S last[N * L], g[N * L], s[N * L];
  } sums;
  S *const last = sums.last, *const g = sums.g, *const s = sums.s;
  auto example = [&](const auto& work) PX_LAMBDA {
    Vec<S> G[N];
    unroll<kUnroll>([&](auto t) PX_LAMBDA {
      multiply<S, MR, NV, t == 0>(G, d + t * MR, x + t * kPanel<S>);
      // Not at once: `last` has only just been stored.
      constexpr int kWait = 2;
      constexpr int begin = t < kWait ? 0 : N * (t - kWait) / (kUnroll - kWait);
      constexpr int end = t < kWait ? 0 : N * (t - kWait + 1) / (kUnroll - kWait);
      keep_in_memory(sums);
      unroll<end - begin>([&](auto i) PX_LAMBDA { work(begin + i); });
      keep_in_memory(sums);
    });
    d += kUnroll * MR;
    x += kUnroll * kPanel<S>;
    auto position = [&](auto) PX_LAMBDA {
      multiply<S, MR, NV, false>(G, d, x);
      d += MR;
      x += kPanel<S>;
    };
    int64_t left = T - kUnroll;
    for (; left >= kUnroll; left -= kUnroll) unroll<kUnroll>(position);
    for (; left > 0; --left) position(0);
    unroll<N>([&](auto i) PX_LAMBDA { store(last + i * L, G[i]); });
  };
  example([&](int i) PX_LAMBDA {
    store(g + i * L, Vec<S>{});
    store(s + i * L, Vec<S>{});
  });
  auto sum = [&](int i) PX_LAMBDA { return load(g + i * L) + load(last + i * L); };
  auto square_sum = [&](int i) PX_LAMBDA {
    Vec<S> G = load(last + i * L);
    return load(s + i * L) + G * G;
  };
  for (int64_t b = 1; b < examples; ++b) {
    example([&](int i) PX_LAMBDA {
      store(s + i * L, square_sum(i));
      store(g + i * L, sum(i));
    });
  }
  put<S, MR, NV>(out, sum, square_sum);
}

// How one (B, T) is computed: the width of a D panel and the tile for 1 or 2 vectors of an X panel.
template <class E>
struct Scheme {
  int rows;
  Tile<E> tile[kPanelVectors];
  bool squares = false;  // the operands' squares are packed behind them
  bool single = false;   // a tile holds one example, or part of it
};

// Beyond this a tile of one example has enough positions to go to memory with.
inline constexpr int64_t kLongExample = kManyRegisters ? 256 : 128;

// T: in packed rows.
template <class E>
Scheme<E> choose_scheme(int64_t B, int64_t T) {
  constexpr int kTall = kMaxTileRows;
  constexpr int kLow = kManyRegisters ? 4 : 2;
  if constexpr (std::is_same_v<E, Bf16Pair>) {
    if (T == 1) {
      return {.rows = kLow,
              .tile = {resident_tile<E, kLow, 1, 1, true>, resident_tile<E, kLow, 2, 1, true>}};
    }
  } else {
    if (T == 1) {
      return {.rows = kTall,
              .tile = {squared_operands_tile<E, kTall, 1>, squared_operands_tile<E, kTall, 2>},
              .squares = true};
    }
  }
  if (T > kLongExample || B == 1) {
    return {.rows = kTall,
            .tile = {single_tile<E, kTall, 1>, single_tile<E, kTall, 2>},
            .single = true};
  }
  if (T == 2) {
    return {.rows = kLow,
            .tile = {resident_tile<E, kLow, 1, 2, true>, resident_tile<E, kLow, 2, 2, true>}};
  }
  if (T == 3) {
    return {.rows = kLow,
            .tile = {resident_tile<E, kLow, 1, 3, true>, resident_tile<E, kLow, 2, 3, true>}};
  }
  if constexpr (kManyRegisters || std::is_same_v<E, Bf16Pair>) {
    return {.rows = kLow,
            .tile = {resident_tile<E, kLow, 1, 4, false>, resident_tile<E, kLow, 2, 4, false>}};
  } else if (T < 8) {
    return {.rows = 3, .tile = {paired_tile<E, 3, 1, 4>, paired_tile<E, 3, 2, 4>}};
  } else if (T < 16) {
    return {.rows = 3, .tile = {paired_tile<E, 3, 1, 8>, paired_tile<E, 3, 2, 8>}};
  } else {
    return {.rows = 5, .tile = {delayed_tile<E, 5, 1, 8>, delayed_tile<E, 5, 2, 8>}};
  }
}

// An operand (B, T, columns) with its strides, and a part of its rows.
struct Operand {
  const void* data;
  int64_t stride_b, stride_t, stride_column;
};
struct Rows {
  int64_t b, examples, t, positions;
};

// Rows as a grid of as few lines as the strides allow.
struct Grid {
  int64_t outer, inner, outer_stride, inner_stride;
};

PX_INLINE Grid grid_of(const Operand& a, const Rows& rows) {
  if (rows.positions == 1) return {1, rows.examples, 0, a.stride_b};
  if (rows.examples == 1 || a.stride_b == rows.positions * a.stride_t)
    return {1, rows.examples * rows.positions, 0, a.stride_t};
  return {rows.examples, rows.positions, a.stride_b, a.stride_t};
}

// Packs columns [column, column + columns) into consecutive panels of W columns, [row][W] each,
// padded with zeros, and behind each panel its squares if kSquares. Some rows at a time for all
// panels, so that neither source nor destination is visited in many long strides.
template <class In, int W, bool kSquares>
void pack(const Operand& a, const Rows& rows, int64_t column, int64_t columns,
          Accumulator<In>* out) {
  using S = Accumulator<In>;
  constexpr int64_t kRowsAtOnce = 8;
  const In* data = static_cast<const In*>(a.data) + rows.b * a.stride_b + rows.t * a.stride_t +
                   column * a.stride_column;
  const Grid grid = grid_of(a, rows);
  const int64_t squares = grid.outer * grid.inner * W;
  const int64_t panel_size = kSquares ? 2 * squares : squares;
  for (int64_t b = 0; b < grid.outer; ++b) {
    for (int64_t t0 = 0; t0 < grid.inner; t0 += kRowsAtOnce) {
      const int64_t t1 = min(grid.inner, t0 + kRowsAtOnce);
      for (int64_t c = 0; c < columns; c += W) {
        S* to = out + c / W * panel_size + (b * grid.inner + t0) * W;
        const In* from =
            data + b * grid.outer_stride + t0 * grid.inner_stride + c * a.stride_column;
        if (columns - c >= W && a.stride_column == 1) {
          for (int64_t t = t0; t < t1; ++t, from += grid.inner_stride, to += W) {
            if constexpr (W % lanes<S> == 0) {
              unroll<W / lanes<S>>([&](auto n) PX_LAMBDA {
                Vec<S> v = load_wide(from + n * lanes<S>);
                store(to + n * lanes<S>, v);
                if constexpr (kSquares) store(to + squares + n * lanes<S>, v * v);
              });
            } else if constexpr (std::is_same_v<In, S> && !kSquares) {
              std::memcpy(to, from, sizeof(S) * W);
            } else {
              unroll<W>([&](auto n) PX_LAMBDA {
                S v = widen(from[n]);
                to[n] = v;
                if constexpr (kSquares) to[squares + n] = v * v;
              });
            }
          }
        } else {
          const int64_t width = min(W, columns - c);
          for (int64_t t = t0; t < t1; ++t, from += grid.inner_stride, to += W) {
            for (int64_t n = 0; n < W; ++n) {
              S v = n < width ? widen(from[n * a.stride_column]) : S{0};
              to[n] = v;
              if constexpr (kSquares) to[squares + n] = v * v;
            }
          }
        }
      }
    }
  }
}

// Fetches some rows of an operand, to be packed later, into the cache.
struct Fetch {
  const char* data;  // position 0 of the example that is under way
  int64_t stride_b, stride_t, bytes;
  int64_t T, t, left;

  PX_INLINE void rows(int64_t count) {
    for (count = min(count, left), left -= count; count > 0; --count) {
      for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(data + t * stride_t + i, 0, 2);
      if (++t == T) {
        t = 0;
        data += stride_b;
      }
    }
  }
};

// The pairs of one vector of consecutive columns of two positions.
PX_INLINE Vec<uint32_t> load_pairs(const bf16* first, const bf16* second) {
  auto bits = [](const bf16* p) PX_LAMBDA { return reinterpret_cast<Vec<uint32_t>>(load_wide(p)); };
  Vec<uint32_t> pairs = bits(first) >> 16;
  if (second != nullptr) pairs |= bits(second);
  return pairs;
}

// One row of pairs, column by column, from those of two positions; from zeros where there is no
// second.
template <int W>
PX_INLINE void pack_pair(const bf16* first, const bf16* second, int64_t stride, int64_t width,
                         Bf16Pair* out) {
  for (int64_t n = 0; n < W; ++n) {
    uint32_t bits = n < width ? first[n * stride].bits : 0u;
    if (n < width && second != nullptr) bits |= uint32_t{second[n * stride].bits} << 16;
    out[n].bits = bits;
  }
}

// The same as `pack`, for pairs of positions.
template <int W>
void pack_pairs(const Operand& a, const Rows& rows, int64_t column, int64_t columns,
                Bf16Pair* out) {
  constexpr int kRowsAtOnce = 8;
  const bf16* data = static_cast<const bf16*>(a.data) + rows.b * a.stride_b + rows.t * a.stride_t +
                     column * a.stride_column;
  const int64_t pairs = ceil_div(rows.positions, 2), packed_rows = rows.examples * pairs;
  int64_t b = 0, t = 0;
  for (int64_t row = 0; row < packed_rows; row += kRowsAtOnce) {
    const bf16 *first[kRowsAtOnce], *second[kRowsAtOnce];
    const int64_t count = min(kRowsAtOnce, packed_rows - row);
    for (int64_t i = 0; i < count; ++i) {
      first[i] = data + b * a.stride_b + t * a.stride_t;
      second[i] = t + 1 < rows.positions ? first[i] + a.stride_t : nullptr;
      if ((t += 2) >= rows.positions) t = 0, ++b;
    }
    auto second_at = [&](int64_t i, int64_t offset)
                         PX_LAMBDA { return second[i] == nullptr ? nullptr : second[i] + offset; };
    int64_t c = 0;
    if (a.stride_column == 1) {
      // A vector's columns are several panels, or one panel is one or several vectors, or less.
      constexpr int L = lanes<uint32_t>;
      constexpr int kPanels = W < L ? L / W : 1, kVectors = W < L ? 1 : W / L;
      constexpr int kColumns = kVectors * L;  // that are loaded
      static_assert(W < L || W % L == 0);
      for (; c + kColumns <= columns; c += kPanels * W) {
        Bf16Pair* to = out + c * packed_rows + row * W;
        for (int64_t i = 0; i < count; ++i, to += W) {
          unroll<kVectors>([&](auto v) PX_LAMBDA {
            const int64_t offset = c + v * L;
            const Vec<uint32_t> pairs = load_pairs(first[i] + offset, second_at(i, offset));
            unroll<kPanels>([&](auto p) PX_LAMBDA {
              std::memcpy(to + v * L + p * W * packed_rows,
                          reinterpret_cast<const uint32_t*>(&pairs) + p * W,
                          sizeof(uint32_t) * (W < L ? W : L));
            });
          });
        }
      }
    }
    for (; c < columns; c += W) {
      Bf16Pair* to = out + c * packed_rows + row * W;
      const int64_t offset = c * a.stride_column, width = min(W, columns - c);
      for (int64_t i = 0; i < count; ++i, to += W) {
        pack_pair<W>(first[i] + offset, second_at(i, offset), a.stride_column, width, to);
      }
    }
  }
}

template <class E>
using Pack = void (*)(const Operand&, const Rows&, int64_t column, int64_t columns, E* out);

// The packing of values of type In as E into panels of W columns.
template <class In, class E, int W, bool kSquares>
Pack<E> packing() {
  if constexpr (std::is_same_v<E, Bf16Pair>) {
    return pack_pairs<W>;
  } else {
    return pack<In, W, kSquares>;
  }
}

// That of D for a scheme.
template <class In, class E>
Pack<E> choose_row_pack(const Scheme<E>& scheme) {
  if (scheme.squares) return packing<In, E, kMaxTileRows, true>();
  switch (scheme.rows) {
    case 2:
      return packing<In, E, 2, false>();
    case 3:
      return packing<In, E, 3, false>();
    case 4:
      return packing<In, E, 4, false>();
    case 5:
      return packing<In, E, 5, false>();
    default:
      return packing<In, E, kMaxTileRows, false>();
  }
}

}  // namespace
}  // namespace perexample::cpu::PX_CAPABILITY
