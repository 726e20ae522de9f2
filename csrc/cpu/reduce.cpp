// Sums over examples of a gradient and of its square: of the bias of a layer and, as the case
// T = 1, of any per-example gradient (MATHS (8)).
//   G_b[o] = sum_t dy[b,t,o];   sum = sum_b G_b;   sum_sq = sum_b G_b^2
//
// The work is bound by memory: dy goes by once, in the order in which it lies there.
// - o of unit stride: rows of dy are added eight at a time to accumulators in the L1 cache.
// - t of unit stride (a convolution's dy): one sum along t for each o.
// - Neither: rows are gathered, then as in the first case.
// - Stride 0 (an expanded dy): that dimension counts as one element, times its size.
// A task is (block of columns, piece); a piece is a group of whole examples or, where there are few
// of them, a part of one example's positions. The results of the pieces are combined in order.
#include "kernels.h"
#include "rows.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kSums = 16;            // columns of a block where t has unit stride
constexpr int64_t kFoldedColumns = 256;  // columns that several short rows make up
constexpr int64_t kTasks = 16;           // tasks to aim at
constexpr int64_t kTaskSize = 1 << 14;   // elements that are worth a task

// Adds rows that are one example each to the results; first to one another, which keeps the error
// of a long sum small.
template <class T, class Row>
void add_examples(int64_t n, int64_t rows, const Row& row, Block<Accumulator<T>>& block) {
  using A = Accumulator<T>;
  each_strip<T>(n, rows, row, [&](auto vectors, int64_t column, const auto& at) PX_LAMBDA {
    constexpr int V = decltype(vectors)::value;
    Vec<A> sum[V] = {}, square[V] = {};
    for (int64_t r = 0; r < rows; ++r) {
      const T* p = at(r);
      unroll<V>([&](auto v) PX_LAMBDA {
        Vec<A> g = load_wide(p + v * lanes<A>);
        sum[v] += g;
        square[v] += g * g;
      });
    }
    unroll<V>([&](auto v) PX_LAMBDA {
      int64_t i = column + v * lanes<A>;
      store(block.sum + i, load(block.sum + i) + sum[v]);
      store(block.sum_sq + i, load(block.sum_sq + i) + square[v]);
    });
  });
}

// The sum of n contiguous values.
template <class T>
Accumulator<T> row_sum(const T* p, int64_t n) {
  using A = Accumulator<T>;
  constexpr int64_t L = lanes<A>;
  Vec<A> s[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    unroll<4>([&](auto v) PX_LAMBDA { s[v] += load_wide(p + i + v * L); });
  }
  for (; i + L <= n; i += L) s[0] += load_wide(p + i);
  A rest = 0;
  for (; i < n; ++i) rest += widen(p[i]);
  return sum<A>((s[0] + s[1]) + (s[2] + s[3])) + rest;
}

// The problem without its expanded dimensions, and how it is cut.
struct Plan {
  int64_t B, T, O;     // 1 where the stride is 0
  int64_t sb, st, so;  // strides
  double times_b, times_t;
  bool along_t;                   // t has unit stride, and o has not
  int64_t columns;                // of a block
  int64_t examples;               // of a piece, if pieces are whole examples
  int64_t positions;              // of a piece; less than T only if `examples` is 1
  int64_t blocks, pieces, parts;  // parts: pieces of one example
};

Plan make_plan(int64_t B, int64_t T, int64_t O, int64_t sb, int64_t st, int64_t so) {
  Plan p{};
  p.times_b = sb == 0 ? static_cast<double>(B) : 1;
  p.times_t = st == 0 ? static_cast<double>(T) : 1;
  p.B = sb == 0 ? 1 : B;
  p.T = st == 0 ? 1 : T;
  p.O = so == 0 ? 1 : O;
  p.sb = sb;
  p.st = st;
  p.so = p.O == 1 ? 1 : so;
  p.along_t = st == 1 && p.T > 1 && (p.so != 1 || p.O == 1);
  p.columns = p.along_t ? kSums : p.so == 1 ? kBlockColumns : kGatheredColumns;
  p.blocks = ceil_div(p.O, p.columns);
  int64_t size = p.B * p.T * min_of(p.O, p.columns);
  int64_t pieces = max_of(1, min_of(kTasks / p.blocks, size / kTaskSize));
  p.examples = ceil_div(p.B, min_of(pieces, p.B));
  p.parts = p.examples > 1 ? 1 : min_of(ceil_div(pieces, p.B), p.T);
  p.positions = ceil_div(p.T, p.parts);
  p.parts = ceil_div(p.T, p.positions);
  p.pieces = ceil_div(p.B, p.examples) * p.parts;
  return p;
}

// One piece of one block: results in block.sum and block.sum_sq or, for a part of an example, its
// share of G in block.G.
template <class T>
void run_piece(const Plan& p, const T* dy, int64_t column, int64_t n, int64_t piece,
               Block<Accumulator<T>>& block) {
  using A = Accumulator<T>;
  for (int64_t i = 0; i < kBlockColumns; ++i) block.sum[i] = block.sum_sq[i] = 0;
  int64_t b_begin = piece / p.parts * p.examples;
  int64_t b_end = min_of(b_begin + p.examples, p.B);
  int64_t t_begin = piece % p.parts * p.positions;
  int64_t t_end = min_of(t_begin + p.positions, p.T);
  bool whole = p.parts == 1;
  dy += column * p.so;

  if (p.along_t) {
    for (int64_t b = b_begin; b < b_end; ++b) {
      for (int64_t o = 0; o < n; ++o) {
        A g = row_sum(dy + b * p.sb + o * p.so + t_begin, t_end - t_begin);
        block.G[o] = g;
        block.sum[o] += g;
        block.sum_sq[o] += g * g;
      }
    }
    return;
  }

  // f(rows, row) with `rows` rows from `from` on, as they lie or gathered; row(r) is where one is.
  T gathered[kBlockRows * kGatheredColumns];
  auto with_rows = [&](const T* from, int64_t stride, int64_t rows, const auto& f) {
    if (p.so == 1) return f(rows, [=](int64_t r) PX_LAMBDA { return from + r * stride; });
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < n; ++o)
        gathered[r * kGatheredColumns + o] = from[r * stride + o * p.so];
    }
    f(rows, [&](int64_t r) PX_LAMBDA { return gathered + r * kGatheredColumns; });
  };
  if (p.T == 1) {
    // Short rows that lie end to end: several of them are taken for one, and folded at last.
    int64_t folds = p.so == 1 && p.sb == p.O ? kFoldedColumns / p.O : 1;
    if (folds > 1) {
      while (b_begin + folds <= b_end) {
        int64_t rows = min_of(kBlockRows, (b_end - b_begin) / folds);
        const T* from = dy + b_begin * n;
        add_examples<T>(
            folds * n, rows, [=](int64_t r) PX_LAMBDA { return from + r * folds * n; }, block);
        b_begin += rows * folds;
      }
      for (int64_t i = n; i < folds * n; ++i) {
        block.sum[i % n] += block.sum[i];
        block.sum_sq[i % n] += block.sum_sq[i];
      }
    }
    for (int64_t b = b_begin; b < b_end; b += kBlockRows) {
      with_rows(dy + b * p.sb, p.sb, min_of(kBlockRows, b_end - b),
                [&](int64_t rows, const auto& row) { add_examples<T>(n, rows, row, block); });
    }
    return;
  }
  for (int64_t b = b_begin; b < b_end; ++b) {
    for (int64_t t = t_begin; t < t_end; t += kBlockRows) {
      with_rows(dy + b * p.sb + t * p.st, p.st, min_of(kBlockRows, t_end - t),
                [&](int64_t rows, const auto& row) {
                  add_rows<T>(n, rows, row, t == t_begin, whole && t + rows == t_end, block);
                });
    }
  }
}

// Writes results of columns [column, column + n), with the factors of expanded dimensions.
template <class A>
void write_results(const Plan& p, int64_t O, DType grad_dtype, int64_t column, int64_t n, A* sum,
                   A* sum_sq, void* out, void* out_sq) {
  A scale = static_cast<A>(p.times_b * p.times_t);
  A scale_sq = static_cast<A>(p.times_b * p.times_t * p.times_t);
  for (int64_t i = 0; i < n; ++i) {
    sum[i] *= scale;
    sum_sq[i] *= scale_sq;
  }
  with_type(grad_dtype, [&](auto tag) {
    using G = decltype(tag);
    int64_t copies = p.O == O ? 1 : O;
    for (int64_t c = 0; c < copies; ++c) {
      narrow_row(n, sum, static_cast<G*>(out) + column + c);
      narrow_row(n, sum_sq, static_cast<A*>(out_sq) + column + c);
    }
  });
}

template <class T>
void moments(const Bias& a, const Parallel& parallel) {
  using A = Accumulator<T>;
  if (a.B == 0 || a.T == 0) {
    with_type(a.grad_dtype, [&](auto tag) {
      for (int64_t o = 0; o < a.O; ++o) {
        static_cast<decltype(tag)*>(a.db)[o] = narrow<decltype(tag)>(A{0});
        static_cast<A*>(a.db_sq)[o] = 0;
      }
    });
    return;
  }
  Plan p = make_plan(a.B, a.T, a.O, a.dy_stride[0], a.dy_stride[1], a.dy_stride[2]);
  const T* dy = static_cast<const T*>(a.dy);

  // Of several pieces: their two results each, or their shares of G.
  int64_t kept = p.parts == 1 ? 2 : 1;
  A* partial = nullptr;
  if (p.pieces > 1) {
    partial = static_cast<A*>(scratch(p.pieces * kept * p.O * static_cast<int64_t>(sizeof(A)), 0));
  }
  parallel(p.blocks * p.pieces, [&](int64_t task) {
    int64_t piece = task / p.blocks;
    int64_t column = task % p.blocks * p.columns;
    int64_t n = min_of(p.columns, p.O - column);
    Block<A> block;
    run_piece(p, dy, column, n, piece, block);
    if (p.pieces == 1) {
      write_results(p, a.O, a.grad_dtype, column, n, block.sum, block.sum_sq, a.db, a.db_sq);
    } else if (kept == 2) {
      narrow_row(n, block.sum, partial + 2 * piece * p.O + column);
      narrow_row(n, block.sum_sq, partial + (2 * piece + 1) * p.O + column);
    } else {
      narrow_row(n, block.G, partial + piece * p.O + column);
    }
  });
  if (p.pieces == 1) return;

  for (int64_t column = 0; column < p.O; column += kBlockColumns) {
    int64_t n = min_of(kBlockColumns, p.O - column);
    Block<A> block = {};
    if (kept == 2) {
      for (int64_t piece = 0; piece < p.pieces; ++piece) {
        const A* from = partial + 2 * piece * p.O + column;
        for (int64_t i = 0; i < n; ++i) block.sum[i] += from[i];
        for (int64_t i = 0; i < n; ++i) block.sum_sq[i] += from[p.O + i];
      }
    } else {
      for (int64_t b = 0; b < p.B; ++b) {
        for (int64_t k = 0; k < p.parts; k += kBlockRows) {
          const A* from = partial + (b * p.parts + k) * p.O + column;
          int64_t rows = min_of(kBlockRows, p.parts - k);
          add_rows<A>(
              n, rows, [=](int64_t r) PX_LAMBDA { return from + r * p.O; }, k == 0,
              k + rows == p.parts, block);
        }
      }
    }
    write_results(p, a.O, a.grad_dtype, column, n, block.sum, block.sum_sq, a.db, a.db_sq);
  }
}

}  // namespace

void bias_moments(const Bias& a, const Parallel& parallel) {
  if (a.O == 0) return;
  with_type(a.dtype, [&](auto tag) { moments<decltype(tag)>(a, parallel); });
}

void reduce_moments(const Reduce& a, const Parallel& parallel) {
  Bias as_bias = {a.B,          1,     a.N,     a.dtype, a.g, {a.g_stride[0], 0, a.g_stride[1]},
                  a.grad_dtype, a.sum, a.sum_sq};
  bias_moments(as_bias, parallel);
}

}  // namespace perexample::cpu::PX_CAPABILITY
