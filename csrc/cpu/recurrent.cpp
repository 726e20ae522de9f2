// The cells of recurrent layers, element by element; the products with the weights are elsewhere.
//
// LSTM, forward:   i, f, o = sigmoid, g = tanh of the gates;  c' = f c + i g;  h = o tanh(c')
// LSTM, backward:  dc += dh o (1 - tanh(c')^2);  dgates of i, f, g, o;  dc = dc f
// GRU, backward:   new = dh (1 - z) (1 - n^2);  dgates of r, z, n;  dh = dh z
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

template <class T>
void lstm_forward(const LstmCell& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  each_state<A>(a.B, a.H, parallel, [&](int64_t b, int64_t j, auto get, auto put) PX_LAMBDA {
    T* gates = static_cast<T*>(a.gates) + b * a.gates_stride + j;
    Vec<A> i = sigmoid(get(gates));
    Vec<A> f = sigmoid(get(gates + a.H));
    Vec<A> g = hyperbolic_tangent(get(gates + 2 * a.H));
    Vec<A> o = sigmoid(get(gates + 3 * a.H));
    Vec<A> c = f * get(static_cast<const T*>(a.cell) + b * a.cell_stride + j) + i * g;
    put(gates, i);
    put(gates + a.H, f);
    put(gates + 2 * a.H, g);
    put(gates + 3 * a.H, o);
    put(static_cast<T*>(a.state) + b * a.state_stride + j, c);
    put(static_cast<T*>(a.h) + b * a.h_stride + j, o * hyperbolic_tangent(c));
  });
}

template <class T>
void lstm_backward(const LstmCellBackward& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  each_state<A>(a.B, a.H, parallel, [&](int64_t b, int64_t j, auto get, auto put) PX_LAMBDA {
    const T* gates = static_cast<const T*>(a.gates) + b * a.gates_stride + j;
    T* dgates = static_cast<T*>(a.dgates) + b * a.dgates_stride + j;
    T* dc = static_cast<T*>(a.dc) + b * a.dc_stride + j;
    Vec<A> one = broadcast(A{1});
    Vec<A> i = get(gates), f = get(gates + a.H), g = get(gates + 2 * a.H), o = get(gates + 3 * a.H);
    Vec<A> squashed =
        hyperbolic_tangent(get(static_cast<const T*>(a.state) + b * a.state_stride + j));
    Vec<A> dh = get(static_cast<const T*>(a.dh) + b * a.dh_stride + j);
    Vec<A> d = get(static_cast<const T*>(dc)) + dh * o * (one - squashed * squashed);
    Vec<A> cell = get(static_cast<const T*>(a.cell) + b * a.cell_stride + j);
    put(dgates, d * g * i * (one - i));
    put(dgates + a.H, d * cell * f * (one - f));
    put(dgates + 2 * a.H, d * i * (one - g * g));
    put(dgates + 3 * a.H, dh * squashed * o * (one - o));
    put(dc, d * f);
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

void lstm_cell(const LstmCell& a, const Parallel& parallel) {
  if (a.B == 0) return;
  with_type(a.dtype, [&](auto tag) { lstm_forward<decltype(tag)>(a, parallel); });
}

void lstm_cell_backward(const LstmCellBackward& a, const Parallel& parallel) {
  if (a.B == 0) return;
  with_type(a.dtype, [&](auto tag) { lstm_backward<decltype(tag)>(a, parallel); });
}

void gru_cell_backward(const GruCellBackward& a, const Parallel& parallel) {
  if (a.B == 0) return;
  with_type(a.dtype, [&](auto tag) { gru_backward<decltype(tag)>(a, parallel); });
}

}  // namespace perexample::cpu::PX_CAPABILITY
