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
//   drained     G of one or two examples in registers, g and s in an L1 buffer: two for small T, so
//               that the buffer is touched half as often, one and a taller tile for large T.
//   single      G alone, for one example or part of it.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

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
PX_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Makes GCC load a vector once, instead of once for every product that uses it.
template <class V>
PX_INLINE void keep_in_register([[maybe_unused]] V& v) {
#if defined(__AVX512F__) && PX_VECTOR_BYTES == 64
  asm("" : "+v"(v));
#elif (defined(__AVX__) && PX_VECTOR_BYTES == 32) || (defined(__SSE2__) && PX_VECTOR_BYTES == 16)
  asm("" : "+x"(v));
#endif
}

// Makes GCC leave accumulators that live in memory there: in registers they would crowd out the
// ones of the inner loop.
PX_INLINE void keep_in_memory() { asm volatile("" ::: "memory"); }

// G (+)= d x for one position.
template <class S, int MR, int NV, bool kFirst>
PX_INLINE void multiply(Vec<S> (&G)[MR * NV], const S* d, const S* x) {
  Vec<S> columns[NV];
  unroll<NV>([&](auto n) PX_LAMBDA {
    columns[n] = load(x + n * lanes<S>);
    keep_in_register(columns[n]);
  });
  unroll<MR>([&](auto m) PX_LAMBDA {
    Vec<S> row = broadcast(d[m]);
    unroll<NV>([&](auto n) PX_LAMBDA {
      constexpr int i = m * NV + n;
      if constexpr (kFirst) {
        G[i] = row * columns[n];
      } else {
        G[i] += row * columns[n];
      }
    });
  });
}

// The products of E consecutive examples side by side; d and x end behind the last. The first
// kUnroll positions are a block of straight code, as are the next; kExact: T == kUnroll.
template <class S, int MR, int NV, int E, int kUnroll, bool kExact>
PX_INLINE void multiply_examples(Vec<S> (&G)[E][MR * NV], const S*& d, const S*& x, int64_t T) {
  auto position = [&](auto first) PX_LAMBDA {
    unroll<E>([&](auto e) PX_LAMBDA {
      multiply<S, MR, NV, decltype(first)::value>(G[e], d + e * T * MR, x + e * T * kPanel<S>);
    });
    d += MR;
    x += kPanel<S>;
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
  d += (E - 1) * T * MR;
  x += (E - 1) * T * kPanel<S>;
}

// out = sum over rows of d x.
template <class S, int MR, int NV>
PX_INLINE void product_tile(const S* d, const S* x, int64_t rows, S* out) {
  Vec<S> G[MR * NV];
  unroll<MR * NV>([&](auto i) PX_LAMBDA { G[i] = Vec<S>{}; });
  for (int64_t row = 0; row < rows; ++row) {
    multiply<S, MR, NV, false>(G, d, x);
    d += MR;
    x += kPanel<S>;
  }
  unroll<MR * NV>([&](auto i) PX_LAMBDA { store(out + i * lanes<S>, G[i]); });
}

// The tiles below share one signature: `examples` examples of T positions; g and s are buffers of
// MR x NV vectors.
template <class S>
using Tile = void (*)(const S* d, const S* x, int64_t examples, int64_t T, S* g, S* s);

template <class S, int MR, int NV>
void single_tile(const S* d, const S* x, int64_t examples, int64_t T, S* g, S*) {
  product_tile<S, MR, NV>(d, x, examples * T, g);
}

template <class S, int MR, int NV>
void squared_operands_tile(const S* d, const S* x, int64_t examples, int64_t, S* g, S* s) {
  product_tile<S, MR, NV>(d, x, examples, g);
  product_tile<S, MR, NV>(d + examples * MR, x + examples * kPanel<S>, examples, s);
}

template <class S, int MR, int NV, int kUnroll, bool kExact>
void resident_tile(const S* d, const S* x, int64_t examples, int64_t T, S* g, S* s) {
  Vec<S> sum[MR * NV], square_sum[MR * NV];
  unroll<MR * NV>([&](auto i) PX_LAMBDA { sum[i] = square_sum[i] = Vec<S>{}; });
  for (int64_t b = 0; b < examples; ++b) {
    Vec<S> G[1][MR * NV];
    multiply_examples<S, MR, NV, 1, kUnroll, kExact>(G, d, x, kExact ? kUnroll : T);
    unroll<MR * NV>([&](auto i) PX_LAMBDA {
      sum[i] += G[0][i];
      square_sum[i] += G[0][i] * G[0][i];
    });
  }
  unroll<MR * NV>([&](auto i) PX_LAMBDA {
    store(g + i * lanes<S>, sum[i]);
    store(s + i * lanes<S>, square_sum[i]);
  });
}

template <class S, int MR, int NV, int kExamples, int kUnroll>
void drained_tile(const S* d, const S* x, int64_t examples, int64_t T, S* g, S* s) {
  unroll<MR * NV>([&](auto i) PX_LAMBDA {
    store(g + i * lanes<S>, Vec<S>{});
    store(s + i * lanes<S>, Vec<S>{});
  });
  auto add = [&](auto count) PX_LAMBDA {
    constexpr int E = decltype(count)::value;
    keep_in_memory();
    Vec<S> G[E][MR * NV];
    multiply_examples<S, MR, NV, E, kUnroll, false>(G, d, x, T);
    unroll<MR * NV>([&](auto i) PX_LAMBDA {
      Vec<S> sum = G[0][i];
      Vec<S> square_sum = load(s + i * lanes<S>) + G[0][i] * G[0][i];
      if constexpr (E == 2) {
        sum += G[1][i];
        square_sum += G[1][i] * G[1][i];
      }
      store(g + i * lanes<S>, load(g + i * lanes<S>) + sum);
      store(s + i * lanes<S>, square_sum);
    });
  };
  int64_t b = 0;
  for (; b + kExamples <= examples; b += kExamples) {
    add(std::integral_constant<int, kExamples>{});
  }
  if constexpr (kExamples == 2) {
    if (b < examples) add(std::integral_constant<int, 1>{});
  }
}

// How one (B, T) is computed: the width of a D panel and the tile for 1 or 2 vectors of an X panel.
template <class S>
struct Scheme {
  int rows;
  Tile<S> tile[kPanelVectors];
  bool squares = false;  // the operands' squares are packed behind them
  bool single = false;   // a tile holds one example, or part of it, and has no s
};

// From here on a tile of one example has enough positions to go to memory with.
inline constexpr int64_t kLongExample = 256;

template <class S>
Scheme<S> choose_scheme(int64_t B, int64_t T) {
  constexpr int kTall = kMaxTileRows;
  constexpr int kLow = kManyRegisters ? 4 : 2;
  if (T == 1) {
    return {.rows = kTall,
            .tile = {squared_operands_tile<S, kTall, 1>, squared_operands_tile<S, kTall, 2>},
            .squares = true};
  }
  if (T > kLongExample || B == 1) {
    return {.rows = kTall,
            .tile = {single_tile<S, kTall, 1>, single_tile<S, kTall, 2>},
            .single = true};
  }
  if (T == 2) {
    return {.rows = kLow,
            .tile = {resident_tile<S, kLow, 1, 2, true>, resident_tile<S, kLow, 2, 2, true>}};
  }
  if (T == 3) {
    return {.rows = kLow,
            .tile = {resident_tile<S, kLow, 1, 3, true>, resident_tile<S, kLow, 2, 3, true>}};
  }
  if constexpr (kManyRegisters) {
    return {.rows = kLow,
            .tile = {resident_tile<S, kLow, 1, 4, false>, resident_tile<S, kLow, 2, 4, false>}};
  } else if (T < 8) {
    return {.rows = 3, .tile = {drained_tile<S, 3, 1, 2, 4>, drained_tile<S, 3, 2, 2, 4>}};
  } else if (T < 64) {
    return {.rows = 3, .tile = {drained_tile<S, 3, 1, 2, 8>, drained_tile<S, 3, 2, 2, 8>}};
  } else {
    return {.rows = kTall,
            .tile = {drained_tile<S, kTall, 1, 1, 8>, drained_tile<S, kTall, 2, 1, 8>}};
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

template <class S>
using Pack = void (*)(const Operand&, const Rows&, int64_t column, int64_t columns, S* out);

// The packing of D for a scheme.
template <class In>
Pack<Accumulator<In>> choose_row_pack(const Scheme<Accumulator<In>>& scheme) {
  if (scheme.squares) return pack<In, kMaxTileRows, true>;
  switch (scheme.rows) {
    case 2:
      return pack<In, 2, false>;
    case 3:
      return pack<In, 3, false>;
    case 4:
      return pack<In, 4, false>;
    default:
      return pack<In, kMaxTileRows, false>;
  }
}

}  // namespace
}  // namespace perexample::cpu::PX_CAPABILITY
