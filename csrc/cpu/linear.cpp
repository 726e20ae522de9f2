// Linear layers, MATHS (3) and (4):
//
//   G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];   dw = sum_b G_b;   dw_sq = sum_b G_b^2
//   bias:  G_b[o] = sum_t dy[b,t,o];       db = sum_b G_b;   db_sq = sum_b G_b^2
//
// A matrix product whose inner loop stops at the end of each example to square. The output is cut
// into blocks, one task each. A block takes the examples in groups of some hundred rows: it packs
// its columns of one operand once per group, the other operand a few panels at a time, and runs the
// register tiles of gemm_tiles.h over all examples of the group. Nothing of size B O I exists.
//
// Which operand lies along the vectors is a matter of shape: x, unless I is too narrow (`Problem`
// says rows for the outer operand, columns for the vector operand). Small outputs are also cut
// along the examples; then the parts are added in fixed order.
#include <cstdint>
#include <cstring>

#include "gemm_tiles.h"
#include "kernels.h"
#include "vec.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

// Rows of packed operands, if T allows: so many that a panel of the columns fits the L1 cache.
constexpr int64_t kGroup = kManyRegisters ? 512 : 256;
// At most, for the rows operand of one block: with less than many registers, what the L2 cache
// holds.
constexpr int64_t kPackedBytes = kManyRegisters ? 3 << 19 : 3 << 17;
// Of a block that sums in scratch memory.
constexpr int64_t kStagedElements = kManyRegisters ? 1 << 19 : 1 << 17;
constexpr int64_t kPanelsAtOnce = 4;
constexpr int64_t kSmallOutput = 1 << 14;  // elements below which examples are split
constexpr int64_t kRowsPerSplit = 1024;
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kWorthATask = 1 << 19;  // multiply-adds
enum ScratchSlot { kTaskScratch, kStagingScratch, kSplitScratch };

// A matrix with strides.
template <class S>
struct Matrix {
  S* data;
  int64_t row_stride, column_stride;

  PX_INLINE Matrix at(int64_t m, int64_t n) const {
    return {data + m * row_stride + n * column_stride, row_stride, column_stride};
  }
};

// Where a block's sums go.
template <class S>
struct Sums {
  Matrix<S> g, s;
  S *bias_g, *bias_s;  // of the block's outputs; null: not this block's work

  PX_INLINE Sums at(int64_t m, int64_t n) const {
    return {g.at(m, n), s.at(m, n), nullptr, nullptr};
  }
};

// Of packed elements E, sums S.
template <class E>
struct Problem {
  using S = Accumulator<E>;
  int64_t B, T;
  int64_t M, N;  // rows and columns of the output: O and I, or I and O if swapped
  bool swapped;
  Operand rows, columns;
  Scheme<E> scheme;
  Pack<E> pack_rows, pack_columns;
  int64_t input_size;  // bytes of an element
  int64_t group;       // examples packed at once
  int64_t positions;   // of one example packed at once
  void (*add_bias)(const Operand&, const Rows&, int64_t, int64_t, bool, S*, S*);

  // Packed rows of so many positions of an example.
  static int64_t packed(int64_t positions) {
    return std::is_same_v<E, Bf16Pair> ? ceil_div(positions, 2) : positions;
  }
};

// One task's part of the output and of the examples.
struct Block {
  int64_t m0, m1, n0, n1, b0, b1;
};

// sum_t dy[b,t,c] for one column or, through `load_at`, one vector of columns, in short runs: the
// rounding error grows with their length and number, not with T.
template <class V, class In, class F>
PX_INLINE V sum_positions(const In* from, int64_t stride, int64_t T, const F& load_at) {
  constexpr int64_t kRun = 32;
  V total{};
  for (int64_t t0 = 0; t0 < T; t0 += kRun) {
    V run{};
    const int64_t t1 = min(T, t0 + kRun);
    for (int64_t t = t0; t < t1; ++t) run += load_at(from + t * stride);
    total += run;
  }
  return total;
}

// Adds whole examples to the bias sums of columns [column, column + columns).
template <class In>
void add_bias(const Operand& dy, const Rows& rows, int64_t column, int64_t columns, bool first,
              Accumulator<In>* bias_g, Accumulator<In>* bias_s) {
  using S = Accumulator<In>;
  const In* data =
      static_cast<const In*>(dy.data) + rows.b * dy.stride_b + column * dy.stride_column;
  auto add = [&](const In* from, const auto& load_at, auto& g, auto& s) PX_LAMBDA {
    using V = std::remove_reference_t<decltype(g)>;
    g = s = V{};
    for (int64_t b = 0; b < rows.examples; ++b, from += dy.stride_b) {
      V G = sum_positions<V>(from, dy.stride_t, rows.positions, load_at);
      g += G;
      s += G * G;
    }
  };
  int64_t c = 0;
  if (dy.stride_column == 1) {
    for (; c + lanes<S> <= columns; c += lanes<S>) {
      Vec<S> g, s;
      add(data + c, [](const In* p) PX_LAMBDA { return load_wide(p); }, g, s);
      store(bias_g + c, first ? g : load(bias_g + c) + g);
      store(bias_s + c, first ? s : load(bias_s + c) + s);
    }
  }
  for (; c < columns; ++c) {
    S g, s;
    add(data + c * dy.stride_column, [](const In* p) PX_LAMBDA { return widen(*p); }, g, s);
    bias_g[c] = first ? g : bias_g[c] + g;
    bias_s[c] = first ? s : bias_s[c] + s;
  }
}

// Adds (or, the first time, stores) one row of a finished tile to the sums.
template <class S>
PX_INLINE void finish_row(const S* from, bool first, int64_t width, S* to, int64_t stride) {
  int64_t n = 0;
  if (stride == 1) {
    for (; n + lanes<S> <= width; n += lanes<S>) {
      store(to + n, first ? load(from + n) : load(to + n) + load(from + n));
    }
  }
  for (; n < width; ++n) to[n * stride] = first ? from[n] : to[n * stride] + from[n];
}

template <class S>
PX_INLINE void finish_tile(const S* from, bool first, int64_t height, int64_t width,
                           int64_t tile_width, const Matrix<S>& to) {
  for (int64_t m = 0; m < height; ++m) {
    finish_row(from + m * tile_width, first, width, to.at(m, 0).data, to.column_stride);
  }
}

template <class S>
PX_INLINE void prefetch_tile(const Matrix<S>& out, int64_t height) {
  if (out.column_stride != 1) return;
  for (int64_t m = 0; m < height; ++m) {
    for (int64_t n = 0; n < kPanel<S>; n += 64 / static_cast<int64_t>(sizeof(S))) {
      __builtin_prefetch(out.at(m, n).data, 1);
    }
  }
}

// The columns' rows that will be packed next, if fetching them early is worth it.
template <class E>
PX_INLINE Fetch fetch_columns(const Problem<E>& p, const Rows& rows, int64_t n, int64_t columns) {
  const Operand& a = p.columns;
  if (columns <= 0 || a.stride_column != 1) return {};
  const int64_t first = rows.b * a.stride_b + rows.t * a.stride_t + n;
  return {.data = static_cast<const char*>(a.data) + first * p.input_size,
          .stride_b = a.stride_b * p.input_size,
          .stride_t = a.stride_t * p.input_size,
          .bytes = columns * p.input_size,
          .T = rows.positions,
          .t = 0,
          .left = rows.examples * rows.positions};
}

// The sums of one block.
template <class E>
void run_block(const Problem<E>& p, const Block& block, const Sums<Accumulator<E>>& out) {
  using S = Accumulator<E>;
  static_assert(sizeof(E) == sizeof(S));
  const int64_t MR = p.scheme.rows, NR = kPanel<S>;
  const int64_t height = block.m1 - block.m0, width = block.n1 - block.n0;
  const int64_t panels = ceil_div(height, MR), column_panels = ceil_div(width, NR);
  const int64_t copies = p.scheme.squares ? 2 : 1;
  const int64_t max_rows = min(p.group, block.b1 - block.b0) * p.packed(p.positions);
  const int64_t packed_rows_size = panels * MR * max_rows * copies;
  const int64_t packed_columns_size = min(kPanelsAtOnce, column_panels) * NR * max_rows * copies;
  const int64_t examples_size = p.positions < p.T ? panels * MR * column_panels * NR : 0;
  // Vectors never straddle the parts: kPanel<S> is a multiple of a cache line, or divides one.
  const int64_t columns_start = ceil_div(packed_rows_size, 64) * 64;
  E* packed_rows = static_cast<E*>(scratch(
      (columns_start + packed_columns_size + examples_size) * static_cast<int64_t>(sizeof(S)),
      kTaskScratch));
  E* packed_columns = packed_rows + columns_start;
  S* examples = reinterpret_cast<S*>(packed_columns + packed_columns_size);
  alignas(64) S g[kMaxTileRows * kPanel<S>], s[kMaxTileRows * kPanel<S>];
  Fetch fetch = {};

  for (int64_t b = block.b0; b < block.b1; b += p.group) {
    const bool first = b == block.b0;
    const int64_t count = min(p.group, block.b1 - b);
    if (out.bias_g != nullptr) {
      const Rows whole = {b, count, 0, p.T};
      if (p.swapped) {
        p.add_bias(p.columns, whole, block.n0, width, first, out.bias_g, out.bias_s);
      } else {
        p.add_bias(p.rows, whole, block.m0, height, first, out.bias_g, out.bias_s);
      }
    }
    for (int64_t t = 0; t < p.T; t += p.positions) {
      const Rows rows = {b, count, t, min(p.positions, p.T - t)};
      const int64_t packed_positions = p.packed(rows.positions);
      const int64_t panel_rows = rows.examples * packed_positions * copies;
      p.pack_rows(p.rows, rows, block.m0, height, packed_rows);
      for (int64_t n = 0; n < width; n += NR) {
        const int64_t tile_columns = min(NR, width - n);
        const int vectors = tile_columns > lanes<S> ? 2 : 1;
        const int64_t tile_width = vectors * lanes<S>;
        const int64_t slot = n / NR % kPanelsAtOnce;
        if (slot == 0) {
          const int64_t strip = kPanelsAtOnce * NR;
          p.pack_columns(p.columns, rows, block.n0 + n, min(strip, width - n), packed_columns);
          fetch = fetch_columns(p, rows, block.n0 + n + strip, min(strip, width - n - strip));
        }
        const int64_t fetched_at_once =
            ceil_div(rows.examples * rows.positions, panels * kPanelsAtOnce);
        for (int64_t m = 0; m < height; m += MR) {
          const int64_t tile_rows = min(MR, height - m);
          const Sums<S> to = out.at(m, n);
          const bool direct = to.g.column_stride == 1 && to.s.column_stride == 1 &&
                              tile_rows == MR && tile_columns == tile_width;
          TileOutput<S> tile = {to.g.data,       to.s.data,
                                to.g.row_stride, to.s.row_stride,
                                !first,          examples + m * column_panels * NR + n * MR,
                                t == 0,          t + rows.positions == p.T};
          if (!direct) {
            tile.g = g;
            tile.s = s;
            tile.g_stride = tile.s_stride = tile_width;
            tile.add = false;
          }
          prefetch_tile(to.g, tile_rows);
          prefetch_tile(to.s, tile_rows);
          fetch.rows(fetched_at_once);
          p.scheme.tile[vectors - 1](packed_rows + m * panel_rows,
                                     packed_columns + slot * NR * panel_rows, rows.examples,
                                     packed_positions, tile);
          if (!direct && tile.end) {
            finish_tile(g, first, tile_rows, tile_columns, tile_width, to.g);
            finish_tile(s, first, tile_rows, tile_columns, tile_width, to.s);
          }
        }
      }
    }
  }
}

// Sizes of the blocks, and the number of parts into which the examples are split.
struct Cut {
  int64_t height, width, splits;
};

template <class E>
Cut choose_cut(const Problem<E>& p, bool staged, int64_t threads) {
  using S = Accumulator<E>;
  const int64_t MR = p.scheme.rows, NR = kPanel<S>;
  const int64_t copies = p.scheme.squares ? 2 : 1;
  const int64_t total_rows = p.B * p.T;
  Cut cut = {};
  cut.splits = 1;
  if (p.M * p.N <= kSmallOutput) {
    cut.splits = max(1, min(min(kMaxSplits, p.B), total_rows / kRowsPerSplit));
  }
  const int64_t packed_row =
      static_cast<int64_t>(sizeof(S)) * p.group * p.packed(p.positions) * copies;
  int64_t row_blocks = ceil_div(p.M, max(MR, kPackedBytes / packed_row));
  int64_t column_blocks = 1;
  const int64_t largest = staged || p.scheme.single ? kStagedElements : p.M * p.N;
  const int64_t wanted =
      threads == 1 ? 1 : min(threads, total_rows * p.M * p.N / kWorthATask) / cut.splits;
  // Cutting changes no sum: blocks begin at whole tiles.
  auto cut_into = [&](int64_t rows, int64_t columns) PX_LAMBDA {
    cut.height = ceil_div(ceil_div(p.M, rows), MR) * MR;
    cut.width = ceil_div(ceil_div(p.N, columns), NR) * NR;
  };
  for (;;) {
    cut_into(row_blocks, column_blocks);
    const bool small_enough = cut.height * cut.width <= largest;
    if (small_enough && row_blocks * column_blocks >= wanted) break;
    const bool can_cut_rows = cut.height > 4 * MR, can_cut_columns = cut.width > NR;
    if (!can_cut_rows && !can_cut_columns) break;
    if (can_cut_rows && (cut.height >= cut.width || !can_cut_columns)) {
      ++row_blocks;
    } else {
      ++column_blocks;
    }
  }
  if (wanted > 1 && wanted == threads) {
    // As many blocks as threads, or a multiple, so that none waits for the last block.
    const int64_t even = ceil_div(row_blocks * column_blocks, threads) * threads;
    const int64_t rows = ceil_div(even, column_blocks);
    if (p.M >= rows * 4 * MR) cut_into(rows, column_blocks);
  }
  return cut;
}

// to = the sum of all parts, in order, rounded to the type of the output.
template <class Out, class S>
void publish(const S* from, int64_t parts, int64_t part_stride, int64_t rows, int64_t columns,
             Out* to, int64_t row_stride, int64_t column_stride) {
  for (int64_t m = 0; m < rows; ++m, from += columns, to += row_stride) {
    int64_t n = 0;
    if constexpr (std::is_same_v<Accumulator<Out>, S>) {
      for (; column_stride == 1 && n + lanes<S> <= columns; n += lanes<S>) {
        Vec<S> sum = load(from + n);
        for (int64_t part = 1; part < parts; ++part) sum += load(from + part * part_stride + n);
        store_narrow(to + n, sum);
      }
    }
    for (; n < columns; ++n) {
      S sum = from[n];
      for (int64_t part = 1; part < parts; ++part) sum += from[part * part_stride + n];
      to[n * column_stride] = narrow<Out>(sum);
    }
  }
}

template <class S>
void publish(DType type, const S* from, int64_t parts, int64_t part_stride, int64_t rows,
             int64_t columns, void* to, int64_t offset, int64_t row_stride, int64_t column_stride) {
  auto as = [&](auto* out) {
    publish(from, parts, part_stride, rows, columns, out + offset, row_stride, column_stride);
  };
  switch (type) {
    case DType::f32:
      return as(static_cast<float*>(to));
    case DType::f64:
      return as(static_cast<double*>(to));
    case DType::bf16:
      return as(static_cast<bf16*>(to));
    case DType::f16:
      return as(static_cast<f16*>(to));
  }
}

// The sums of parts of the examples in scratch memory, one part after another: g, s, then those of
// the bias.
template <class S>
struct Parts {
  S* data;
  int64_t rows, columns, biases;

  int64_t size() const { return 2 * (rows * columns + biases); }
  Sums<S> part(int64_t i) const {
    S* g = data + i * size();
    S* bias = g + 2 * rows * columns;
    return {{g, columns, 1},
            {g + rows * columns, columns, 1},
            biases > 0 ? bias : nullptr,
            bias + biases};
  }
};

template <class S>
inline constexpr DType kSums = std::is_same_v<S, double> ? DType::f64 : DType::f32;

// The output is the sum of all parts.
template <class S>
void publish(const Linear& a, bool swapped, const Parts<S>& from, int64_t parts) {
  const int64_t row_stride = swapped ? 1 : a.I, column_stride = swapped ? a.I : 1;
  const Sums<S> sums = from.part(0);
  const int64_t size = from.size();
  publish(a.grad_dtype, sums.g.data, parts, size, from.rows, from.columns, a.dw, 0, row_stride,
          column_stride);
  publish(kSums<S>, sums.s.data, parts, size, from.rows, from.columns, a.dw_sq, 0, row_stride,
          column_stride);
  if (from.biases > 0) {
    publish(a.grad_dtype, sums.bias_g, parts, size, 1, from.biases, a.db, 0, 0, 1);
    publish(kSums<S>, sums.bias_s, parts, size, 1, from.biases, a.db_sq, 0, 0, 1);
  }
}

template <class In, class E = Accumulator<In>>
void linear_moments_of(const Linear& a, const Parallel& parallel) {
  using S = Accumulator<In>;
  const Operand dy = {a.dy, a.dy_stride[0], a.dy_stride[1], a.dy_stride[2]};
  const Operand x = {a.x, a.x_stride[0], a.x_stride[1], a.x_stride[2]};

  Problem<E> p = {};
  const int64_t packed_T = p.packed(a.T);
  p.B = a.B;
  p.T = a.T;
  p.input_size = sizeof(In);
  p.scheme = choose_scheme<E>(a.B, packed_T);
  p.swapped = a.I <= lanes<S> && a.O > kPanel<S>;
  p.M = p.swapped ? a.I : a.O;
  p.N = p.swapped ? a.O : a.I;
  p.rows = p.swapped ? x : dy;
  p.columns = p.swapped ? dy : x;
  p.pack_rows = choose_row_pack<In>(p.scheme);
  p.pack_columns =
      p.scheme.squares ? packing<In, E, kPanel<S>, true>() : packing<In, E, kPanel<S>, false>();
  p.add_bias = add_bias<In>;
  p.group = p.scheme.single ? 1 : max(1, kGroup / packed_T);
  if (p.group > 1) p.group -= p.group % 2;  // examples are best taken in pairs
  p.group = min(p.group, a.B);
  p.positions = ceil_div(a.T, ceil_div(packed_T, kGroup));

  const bool has_bias = a.db != nullptr;
  const bool rounds = a.grad_dtype != kSums<S>;
  const Cut cut = choose_cut(p, rounds, parallel.threads);
  const int64_t row_blocks = ceil_div(p.M, cut.height), column_blocks = ceil_div(p.N, cut.width);
  const int64_t row_stride = p.swapped ? 1 : a.I, column_stride = p.swapped ? a.I : 1;
  // Splits end at whole groups of examples.
  const int64_t split = ceil_div(ceil_div(a.B, cut.splits), p.group) * p.group;
  const int64_t splits = ceil_div(a.B, split);

  Parts<S> parts = {nullptr, p.M, p.N, has_bias ? a.O : 0};
  if (splits > 1) {
    parts.data = static_cast<S*>(
        scratch(splits * parts.size() * static_cast<int64_t>(sizeof(S)), kSplitScratch));
  }

  auto run = [&](int64_t task) {
    const int64_t m0 = task % row_blocks * cut.height;
    const int64_t n0 = task / row_blocks % column_blocks * cut.width;
    const int64_t part = task / (row_blocks * column_blocks);
    const Block block = {m0,           min(p.M, m0 + cut.height),   n0, min(p.N, n0 + cut.width),
                         part * split, min(a.B, (part + 1) * split)};
    const bool bias_block = has_bias && (p.swapped ? m0 : n0) == 0;
    const int64_t bias_offset = p.swapped ? n0 : m0;
    if (splits > 1) {
      Sums<S> out = parts.part(part).at(m0, n0);
      if (bias_block) {
        out.bias_g = parts.part(part).bias_g + bias_offset;
        out.bias_s = parts.part(part).bias_s + bias_offset;
      }
      run_block(p, block, out);
      return;
    }
    const int64_t offset = m0 * row_stride + n0 * column_stride;
    const int64_t rows = block.m1 - m0, columns = block.n1 - n0,
                  biases = p.swapped ? columns : rows;
    Sums<S> out = {{nullptr, row_stride, column_stride},
                   {static_cast<S*>(a.dw_sq) + offset, row_stride, column_stride},
                   nullptr,
                   bias_block ? static_cast<S*>(a.db_sq) + bias_offset : nullptr};
    if (rounds) {
      // What will be rounded is added up in scratch memory.
      out.g = {static_cast<S*>(scratch((rows * columns + biases) * static_cast<int64_t>(sizeof(S)),
                                       kStagingScratch)),
               columns, 1};
      if (bias_block) out.bias_g = out.g.data + rows * columns;
    } else {
      out.g.data = static_cast<S*>(a.dw) + offset;
      if (bias_block) out.bias_g = static_cast<S*>(a.db) + bias_offset;
    }
    run_block(p, block, out);
    if (rounds) {
      publish(a.grad_dtype, out.g.data, 1, 0, rows, columns, a.dw, offset, row_stride,
              column_stride);
      if (bias_block) publish(a.grad_dtype, out.bias_g, 1, 0, 1, biases, a.db, bias_offset, 0, 1);
    }
  };
  const int64_t tasks = row_blocks * column_blocks * splits;
  if (tasks == 1) {
    run(0);
  } else {
    parallel(tasks, run);
  }
  if (splits > 1) publish(a, p.swapped, parts, splits);
}

int64_t size_of(DType type) { return type == DType::f64 ? 8 : type == DType::f32 ? 4 : 2; }

}  // namespace

void bias_moments(const Bias&, const Parallel&);

void linear_moments(const Linear& a, const Parallel& parallel) {
  if (a.B == 0 || a.T == 0 || a.O == 0 || a.I == 0) {
    const DType sums = a.dtype == DType::f64 ? DType::f64 : DType::f32;
    const size_t elements = static_cast<size_t>(a.O * a.I);
    if (elements != 0) {
      std::memset(a.dw, 0, elements * static_cast<size_t>(size_of(a.grad_dtype)));
      std::memset(a.dw_sq, 0, elements * static_cast<size_t>(size_of(sums)));
    }
    if (a.db != nullptr) {
      const int64_t* s = a.dy_stride;
      bias_moments({a.B, a.T, a.O, a.dtype, a.dy, {s[0], s[1], s[2]}, a.grad_dtype, a.db, a.db_sq},
                   parallel);
    }
    return;
  }
  switch (a.dtype) {
    case DType::f32:
      return linear_moments_of<float>(a, parallel);
    case DType::f64:
      return linear_moments_of<double>(a, parallel);
    case DType::bf16:
      // T = 1 takes squares of single products, which pairs do not give.
      if constexpr (kBf16Dot) {
        if (a.T > 1) return linear_moments_of<bf16, Bf16Pair>(a, parallel);
      }
      return linear_moments_of<bf16>(a, parallel);
    case DType::f16:
      return linear_moments_of<f16>(a, parallel);
  }
}

}  // namespace perexample::cpu::PX_CAPABILITY
