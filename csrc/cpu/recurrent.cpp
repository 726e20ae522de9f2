// Recurrent layers: an LSTM over all of its steps, the cell of a GRU; what does not depend on the
// step before, the products with the input and the contractions over time, is elsewhere.
//
// LSTM, forward:   i, f, o = sigmoid, g = tanh of the gates;  c' = f c + i g;  h = o tanh(c')
// LSTM, backward:  dc += dh o (1 - tanh(c')^2);  dgates of i, f, g, o;  dc = dc f
// GRU, backward:   new = dh (1 - z) (1 - n^2);  dgates of r, z, n;  dh = dh z
//
// The weight of a recurrence is packed once into panels. Examples do not depend on one another, so
// a task takes a block of them through all of time: no step ends at a barrier.
#include "gemm_tiles.h"
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kTaskSize = 1 << 13;  // states that are worth a task

template <class A>
PX_INLINE Vec<A> select(Vec<A> bits_where_true, Vec<A> yes, Vec<A> no) {
  using Bits = Vec<std::conditional_t<sizeof(A) == 4, int32_t, int64_t>>;
  Bits mask = reinterpret_cast<Bits>(bits_where_true);
  return reinterpret_cast<Vec<A>>((mask & reinterpret_cast<Bits>(yes)) |
                                  (~mask & reinterpret_cast<Bits>(no)));
}

// exp(x) - 1 = 2^n (exp(r) - 1) + (2^n - 1) with |r| <= ln(2) / 2, exp(r) by its series. For x in
// [-87, 88].
PX_INLINE Vec<float> exp_minus_1(Vec<float> x) {
  constexpr float round = 0x1.8p23f;
  Vec<float> n = (x * broadcast(1.44269504f) + broadcast(round)) - broadcast(round);
  Vec<float> r = (x - n * broadcast(0.693145752f)) - n * broadcast(1.42860677e-6f);
  Vec<float> p = broadcast(1.0f / 5040);
  p = p * r + broadcast(1.0f / 720);
  p = p * r + broadcast(1.0f / 120);
  p = p * r + broadcast(1.0f / 24);
  p = p * r + broadcast(1.0f / 6);
  p = p * r + broadcast(0.5f);
  p = p * r * r + r;
  Vec<int32_t> exponent = (__builtin_convertvector(n, Vec<int32_t>) + 127) << 23;
  Vec<float> power = reinterpret_cast<Vec<float>>(exponent);
  return power * p + (power - broadcast(1.0f));
}

// A comparison that is false for NaN lets NaN through.
template <class A>
PX_INLINE Vec<A> limit(Vec<A> x, A low, A high) {
  x = select<A>(reinterpret_cast<Vec<A>>(x > broadcast(high)), broadcast(high), x);
  return select<A>(reinterpret_cast<Vec<A>>(x < broadcast(low)), broadcast(low), x);
}

PX_INLINE Vec<float> sigmoid(Vec<float> x) {
  return broadcast(1.0f) / (exp_minus_1(limit(-x, -87.0f, 87.0f)) + broadcast(2.0f));
}

PX_INLINE Vec<float> hyperbolic_tangent(Vec<float> x) {
  Vec<float> e = exp_minus_1(limit(x + x, -40.0f, 40.0f));
  return e / (e + broadcast(2.0f));
}

PX_INLINE Vec<double> sigmoid(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = 1 / (1 + __builtin_exp(-x[i]));
  return x;
}

PX_INLINE Vec<double> hyperbolic_tangent(Vec<double> x) {
  for (int i = 0; i < lanes<double>; ++i) x[i] = __builtin_tanh(x[i]);
  return x;
}

// f(b, column, get, put) for every vector of all rows.
template <class A, class F>
void each_state(int64_t batch, int64_t width, const Parallel& parallel, const F& f) {
  int64_t tasks = max_of(1, min_of(batch, batch * width / kTaskSize));
  int64_t rows = ceil_div(batch, tasks);
  parallel(ceil_div(batch, rows), [&](int64_t task) {
    int64_t end = min_of((task + 1) * rows, batch);
    for (int64_t b = task * rows; b < end; ++b) {
      each_vector<A>(width, [&](int64_t i, auto get, auto put) PX_LAMBDA { f(b, i, get, put); });
    }
  });
}

// out (rows, N) = d (rows, K) times a packed weight, N panels of which one follows another:
// [K][kPanel] each. Every element is one sum over K in order, whatever the rows beside it.
constexpr int kProductRows = kManyRegisters ? 8 : 6;

template <class S, int MR, int kPanels>
void product_tile(const S* d, int64_t stride, const S* x, int64_t K, S* out, int64_t out_stride) {
  constexpr int NV = kPanelVectors, L = lanes<S>;
  Vec<S> G[kPanels][MR * NV];
  unroll<kPanels>(
      [&](auto p) PX_LAMBDA { unroll<MR * NV>([&](auto i) PX_LAMBDA { G[p][i] = Vec<S>{}; }); });
  for (int64_t k = 0; k < K; ++k) {
    unroll<kPanels>([&](auto p) PX_LAMBDA {
      Vec<S> columns[NV];
      unroll<NV>([&](auto n) PX_LAMBDA {
        columns[n] = load(x + p * K * kPanel<S> + n * L);
        keep_in_register(columns[n]);
      });
      unroll<MR>([&](auto m) PX_LAMBDA {
        Vec<S> row = broadcast(d[m * stride]);
        unroll<NV>([&](auto n) PX_LAMBDA { G[p][m * NV + n] += row * columns[n]; });
      });
    });
    ++d;
    x += kPanel<S>;
  }
  unroll<kPanels>([&](auto p) PX_LAMBDA {
    unroll<MR>([&](auto m) PX_LAMBDA {
      unroll<NV>([&](auto n) PX_LAMBDA {
        store(out + m * out_stride + p * kPanel<S> + n * L, G[p][m * NV + n]);
      });
    });
  });
}

template <class S>
using ProductTile = void (*)(const S*, int64_t, const S*, int64_t, S*, int64_t);

template <class S, int MR = 1>
ProductTile<S> product_tile_of(int64_t rows) {
  if constexpr (MR < kProductRows) {
    if (rows != MR) return product_tile_of<S, MR + 1>(rows);
  }
  return product_tile<S, MR, 1>;
}

template <class S>
void product(const S* d, int64_t stride, int64_t rows, const S* packed, int64_t K, int64_t N,
             S* out, int64_t out_stride) {
  if (rows == 0) return;
  const int64_t panels = ceil_div(N, kPanel<S>), tiles = ceil_div(rows, kProductRows);
  // Few rows: several panels at once, or the sums would wait for one another.
  const int64_t at_once = rows == 1 ? 4 : rows == 2 ? 2 : 1;
  const ProductTile<S> low = rows == 1 ? product_tile<S, 1, 4> : product_tile<S, 2, 2>;
  for (int64_t panel = 0; panel < panels;) {
    const S* x = packed + panel * K * kPanel<S>;
    S* to = out + panel * kPanel<S>;
    if (at_once > 1 && panel + at_once <= panels) {
      low(d, stride, x, K, to, out_stride);
      panel += at_once;
      continue;
    }
    for (int64_t i = 0; i < tiles; ++i) {
      const int64_t first = rows * i / tiles, last = rows * (i + 1) / tiles;
      product_tile_of<S>(last - first)(d + first * stride, stride, x, K, to + first * out_stride,
                                       out_stride);
    }
    ++panel;
  }
}

// Packs a weight of which (k, n) is at k * stride_k + n * stride_n; returns what lies behind it.
template <class S>
S* pack_weight(const void* weight, int64_t K, int64_t N, int64_t stride_k, int64_t stride_n, S* out,
               const Parallel& parallel) {
  constexpr int64_t kPanelsPerTask = 4;
  const int64_t columns = kPanelsPerTask * kPanel<S>;
  parallel(ceil_div(N, columns), [&](int64_t task) {
    const int64_t n = task * columns;
    pack<S, kPanel<S>, false>({weight, 0, stride_k, stride_n}, {0, 1, 0, K}, n, min(columns, N - n),
                              out + n * K);
  });
  return out + ceil_div(N, kPanel<S>) * kPanel<S> * K;
}

// f(first, last) for blocks of examples: each runs over all time by itself, so no step waits for
// another block.
template <class F>
void each_block(const Lstm& a, const Parallel& parallel, const F& f) {
  constexpr int64_t kMostRows = 48;         // whose products stay in the L2 cache
  constexpr int64_t kWorthATask = 1 << 18;  // multiply-adds
  const int64_t work = a.T * a.B * 4 * a.H * a.P;
  int64_t blocks = max(1, min(min(parallel.threads, a.B), work / kWorthATask));
  if (a.B > blocks * kMostRows) {
    blocks = ceil_div(a.B, kMostRows * parallel.threads) * parallel.threads;
  }
  parallel(blocks, [&](int64_t i) { f(a.B * i / blocks, a.B * (i + 1) / blocks); });
}

// One block of an Lstm: where things are at step t, and how many rows are there.
template <class S>
struct LstmBlock {
  const Lstm& a;
  int64_t first, rows;

  int64_t active(int64_t t) const {
    return a.active == nullptr ? rows : max(0, min(a.active[t] - first, rows));
  }
  int64_t before(int64_t t) const { return a.reverse ? t + 1 : t; }
  int64_t after(int64_t t) const { return a.reverse ? t : t + 1; }
  S* at(void* data, int64_t t, int64_t width) const {
    return static_cast<S*>(data) + (t * a.B + first) * width;
  }
};

PX_INLINE int64_t padded(int64_t n) { return ceil_div(n, Lstm::kPadding) * Lstm::kPadding; }

template <class S>
void clear(int64_t n, S* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = S{0};
}

template <class S>
void lstm_forward_block(const LstmBlock<S>& block, const S* packed_hh, const S* packed_hr) {
  const Lstm& a = block.a;
  const int64_t H = a.H, P = a.P, width = padded(4 * H), narrow = padded(P);
  const bool projects = packed_hr != nullptr;
  const int64_t size = block.rows * (width + (projects ? narrow + H : 0));
  S* products = static_cast<S*>(scratch(size * static_cast<int64_t>(sizeof(S)), 0));
  S* projected = products + block.rows * width;
  S* squashed = projected + block.rows * narrow;
  for (int64_t step = 0; step < a.T; ++step) {
    const int64_t t = a.reverse ? a.T - 1 - step : step, n = block.active(t);
    const S* h = block.at(a.states, block.before(t), P);
    const S* cells = block.at(a.cells, block.before(t), H);
    S* h_after = block.at(a.states, block.after(t), P);
    S* cells_after = block.at(a.cells, block.after(t), H);
    S* gate_rows = block.at(a.gates, t, 4 * H);
    product(h, P, n, packed_hh, P, 4 * H, products, width);
    for (int64_t b = 0; b < n; ++b) {
      const S* sums = products + b * width;
      S* gates = gate_rows + b * 4 * H;
      const S* cell = cells + b * H;
      S* state = cells_after + b * H;
      S* out = projects ? squashed + b * H : h_after + b * H;
      each_vector<S>(H, [&](int64_t j, auto get, auto put) PX_LAMBDA {
        auto sum = [&](int64_t gate) PX_LAMBDA {
          return get(static_cast<const S*>(gates) + gate * H + j) + get(sums + gate * H + j);
        };
        Vec<S> i = sigmoid(sum(0)), f = sigmoid(sum(1));
        Vec<S> g = hyperbolic_tangent(sum(2)), o = sigmoid(sum(3));
        Vec<S> c = f * get(cell + j) + i * g;
        put(gates + j, i);
        put(gates + H + j, f);
        put(gates + 2 * H + j, g);
        put(gates + 3 * H + j, o);
        put(state + j, c);
        put(out + j, o * hyperbolic_tangent(c));
      });
    }
    if (projects) {
      product<S>(squashed, H, n, packed_hr, H, P, projected, narrow);
      for (int64_t b = 0; b < n; ++b) widen_row(P, projected + b * narrow, h_after + b * P);
    }
    widen_row((block.rows - n) * P, h + n * P, h_after + n * P);
    widen_row((block.rows - n) * H, cells + n * H, cells_after + n * H);
  }
}

template <class S>
void lstm_backward_block(const LstmBackward& a, const LstmBlock<S>& block, const S* packed_hh,
                         const S* packed_hr) {
  const int64_t T = block.a.T, H = block.a.H, P = block.a.P;
  const int64_t width = padded(P), wide = padded(H);
  const bool projects = packed_hr != nullptr;
  const int64_t size = block.rows * (width + (projects ? wide : 0));
  // dh lies in rows of `width` while it runs back through time.
  S* dh = static_cast<S*>(scratch(size * static_cast<int64_t>(sizeof(S)), 0));
  S* projected = dh + block.rows * width;
  S* const outer_dh = block.at(a.dh, 0, P);
  S* const dc_rows = block.at(a.dc, 0, H);
  for (int64_t b = 0; b < block.rows; ++b) widen_row(P, outer_dh + b * P, dh + b * width);
  for (int64_t step = T; step-- > 0;) {
    const int64_t t = block.a.reverse ? T - 1 - step : step, n = block.active(t);
    const S* cells = block.at(block.a.cells, block.before(t), H);
    const S* cells_after = block.at(block.a.cells, block.after(t), H);
    const S* gate_rows = block.at(block.a.gates, t, 4 * H);
    S* dgate_rows = block.at(a.dgates, t, 4 * H);
    for (int64_t b = 0; b < n; ++b) {
      const S* dy =
          static_cast<const S*>(a.dy) + t * a.dy_stride[0] + (block.first + b) * a.dy_stride[1];
      each_vector<S>(P, [&](int64_t j, auto get, auto put) PX_LAMBDA {
        S* to = dh + b * width + j;
        put(to, get(static_cast<const S*>(to)) + get(dy + j));
      });
    }
    if (projects) {
      S* dstates = block.at(a.dstates, t, P);
      for (int64_t b = 0; b < n; ++b) widen_row(P, dh + b * width, dstates + b * P);
      clear((block.rows - n) * P, dstates + n * P);
      product<S>(dh, width, n, packed_hr, P, H, projected, wide);
    }
    for (int64_t b = 0; b < n; ++b) {
      const S* gates = gate_rows + b * 4 * H;
      const S *cell = cells + b * H, *state = cells_after + b * H;
      const S* dout = projects ? projected + b * wide : dh + b * width;
      S *dgates = dgate_rows + b * 4 * H, *dc = dc_rows + b * H;
      each_vector<S>(H, [&](int64_t j, auto get, auto put) PX_LAMBDA {
        Vec<S> one = broadcast(S{1});
        Vec<S> i = get(gates + j), f = get(gates + H + j);
        Vec<S> g = get(gates + 2 * H + j), o = get(gates + 3 * H + j);
        Vec<S> squashed = hyperbolic_tangent(get(state + j)), dm = get(dout + j);
        Vec<S> d = get(static_cast<const S*>(dc) + j) + dm * o * (one - squashed * squashed);
        put(dgates + j, d * g * i * (one - i));
        put(dgates + H + j, d * get(cell + j) * f * (one - f));
        put(dgates + 2 * H + j, d * i * (one - g * g));
        put(dgates + 3 * H + j, dm * squashed * o * (one - o));
        put(dc + j, d * f);
      });
    }
    clear((block.rows - n) * 4 * H, dgate_rows + n * 4 * H);
    product<S>(dgate_rows, 4 * H, n, packed_hh, 4 * H, P, dh, width);
  }
  for (int64_t b = 0; b < block.rows; ++b) widen_row(P, dh + b * width, outer_dh + b * P);
}

template <class S>
void lstm_forward_of(const Lstm& a, const Parallel& parallel) {
  S *hh = static_cast<S*>(a.workspace), *hr = nullptr;
  S* end = pack_weight(a.weight_hh, a.P, 4 * a.H, 1, a.P, hh, parallel);
  if (a.weight_hr != nullptr) pack_weight(a.weight_hr, a.H, a.P, 1, a.H, hr = end, parallel);
  each_block(a, parallel, [&](int64_t first, int64_t last) {
    lstm_forward_block<S>({a, first, last - first}, hh, hr);
  });
}

template <class S>
void lstm_backward_of(const LstmBackward& b, const Parallel& parallel) {
  const Lstm& a = b.forward;
  S *hh = static_cast<S*>(a.workspace), *hr = nullptr;
  S* end = pack_weight(a.weight_hh, 4 * a.H, a.P, a.P, 1, hh, parallel);
  if (a.weight_hr != nullptr) pack_weight(a.weight_hr, a.P, a.H, a.H, 1, hr = end, parallel);
  each_block(a, parallel, [&](int64_t first, int64_t last) {
    lstm_backward_block<S>(b, {a, first, last - first}, hh, hr);
  });
}

template <class T>
void gru_backward(const GruCellBackward& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  each_state<A>(a.B, a.H, parallel, [&](int64_t b, int64_t j, auto get, auto put) PX_LAMBDA {
    const T* gates = static_cast<const T*>(a.gates) + b * a.gates_stride + j;
    T* dgates = static_cast<T*>(a.dgates) + b * a.dgates_stride + j;
    T* dhidden = static_cast<T*>(a.dhidden) + b * a.dhidden_stride + j;
    T* dh = static_cast<T*>(a.dh) + b * a.dh_stride + j;
    Vec<A> one = broadcast(A{1});
    Vec<A> r = get(gates), z = get(gates + a.H), n = get(gates + 2 * a.H);
    Vec<A> d = get(static_cast<const T*>(dh));
    Vec<A> hidden = get(static_cast<const T*>(a.hidden) + b * a.hidden_stride + j);
    Vec<A> state = get(static_cast<const T*>(a.state) + b * a.state_stride + j);
    Vec<A> new_n = d * (one - z) * (one - n * n);
    Vec<A> new_r = new_n * hidden * r * (one - r);
    Vec<A> new_z = d * (state - n) * z * (one - z);
    put(dgates, new_r);
    put(dgates + a.H, new_z);
    put(dgates + 2 * a.H, new_n);
    put(dhidden, new_r);
    put(dhidden + a.H, new_z);
    put(dhidden + 2 * a.H, new_n * r);
    put(dh, d * z);
  });
}

}  // namespace

void lstm_forward(const Lstm& a, const Parallel& parallel) {
  if (a.B == 0 || a.H == 0) return;
  a.dtype == DType::f64 ? lstm_forward_of<double>(a, parallel)
                        : lstm_forward_of<float>(a, parallel);
}

void lstm_backward(const LstmBackward& a, const Parallel& parallel) {
  if (a.forward.B == 0 || a.forward.H == 0) return;
  a.forward.dtype == DType::f64 ? lstm_backward_of<double>(a, parallel)
                                : lstm_backward_of<float>(a, parallel);
}

void gru_cell_backward(const GruCellBackward& a, const Parallel& parallel) {
  if (a.B == 0) return;
  with_type(a.dtype, [&](auto tag) { gru_backward<decltype(tag)>(a, parallel); });
}

}  // namespace perexample::cpu::PX_CAPABILITY
