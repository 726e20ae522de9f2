// Convolution weight gradient and its per-example second moment: MATHS (5), for one group
//
//   G_b[o,(c,k)] = sum_t dy[b,o,t] x[b,c, t stride + k dilation - padding]
//   dw = sum_b G_b;   dw_sq = sum_b G_b^2;   bias: the same with x = 1
//
// An implicit matrix product: the unfolded input never exists. Vectors run along o. The
// output gradient is transposed to panels [t][o]; the input is padded and widened as it lies, and
// its scalars are broadcast from there: a row (c, k) of the product is a constant shift, a position
// t an offset from a table. A tile of G stays in registers over the positions of one example (of
// one box, if the example is large) and is then squared into sums that lie as [(c, k)][o] and are
// transposed once, at the end.
//
// A task owns a block of weights, (some o) x (some c) x (all k), and packs what it needs in its own
// thread's scratch: no barrier, and no buffer that grows with B. Blocks may depend on the number of
// threads because they do not change the arithmetic. Small weights are split along the examples
// also; that split depends on shapes only, and its sums are added in order.
//
// conv_positions.cpp has the kernel for groups that are too narrow for this.
#include "conv_common.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kBoxPositions = 1024;       // positions of one box
constexpr int64_t kBoxWindow = 1 << 16;       // input elements per channel of one box
constexpr int64_t kGroupPositions = 512;      // positions packed at a time, in whole examples
constexpr int64_t kWindowElements = 1 << 18;  // packed input of one task
constexpr int64_t kBlockElements = 1 << 16;   // weights of one task
constexpr int64_t kSplitElements = 1 << 18;   // weights times splits along the examples
constexpr int64_t kMaxSplits = 16;

// Vectors in a panel: the widest that the outputs left fill.
template <class S>
PX_INLINE int panel_vectors(int64_t outputs) {
  constexpr int L = lanes<S>;
  if (PX_VECTOR_BYTES == 64 && outputs > 3 * L) return 4;
  return outputs > L ? 2 : 1;
}

template <class S>
inline constexpr int64_t widest_panel = (PX_VECTOR_BYTES == 64 ? 4 : 2) * lanes<S>;

// Rows in a tile, such that the tile fills the registers.
PX_INLINE int tile_rows(int vectors) { return vectors == 1 ? 8 : 6; }

// ---------------------------------------------------------------------------------------------
// Micro-kernel

template <class S>
struct Stream {
  int64_t examples, positions;
  const int64_t* offsets;  // of the positions, in x
  int64_t x_step;          // from example to example
  const S* dy;             // [example][position][vectors of o]
  bool first, last;        // whether the box is its example's first, last
};

// The end of a box: G_b is squared if it is complete; partial holds it from box to box.
template <class S, int N>
PX_INLINE void finish(const Stream<S>& in, Vec<S> (&acc)[N], S* partial, S* g, S* s) {
  constexpr int L = lanes<S>;
  if (!in.first) unroll<N>([&](auto i) PX_LAMBDA { acc[i] += load(partial + i * L); });
  if (in.last) {
    unroll<N>([&](auto i) PX_LAMBDA {
      store(g + i * L, load(g + i * L) + acc[i]);
      store(s + i * L, load(s + i * L) + acc[i] * acc[i]);
    });
  } else {
    unroll<N>([&](auto i) PX_LAMBDA { store(partial + i * L, acc[i]); });
  }
}

// One tile, rows[0..R) by NV vectors, over the examples of the stream.
template <class S, int R, int NV>
void multiply(const Stream<S>& in, const S* const* rows, S* partial, S* g, S* s) {
  constexpr int L = lanes<S>;
  const S* x[R];
  unroll<R>([&](auto r) PX_LAMBDA { x[r] = rows[r]; });
  const S* dy = in.dy;
  const int64_t* const end = in.offsets + in.positions;
  for (int64_t e = 0; e < in.examples; ++e) {
    Vec<S> acc[R * NV];
    unroll<R * NV>([&](auto i) PX_LAMBDA { acc[i] = Vec<S>{}; });
    for (const int64_t* offset = in.offsets; offset != end; ++offset, dy += NV * L) {
      const int64_t t = *offset;
      Vec<S> d[NV];
      unroll<NV>([&](auto n) PX_LAMBDA { d[n] = load(dy + n * L); });
      unroll<R>([&](auto r) PX_LAMBDA {
        const Vec<S> value = broadcast(x[r][t]);
        unroll<NV>([&](auto n) PX_LAMBDA { acc[r * NV + n] += value * d[n]; });
      });
    }
    unroll<R>([&](auto r) PX_LAMBDA { x[r] += in.x_step; });
    finish(in, acc, partial, g, s);
  }
}

template <class S>
using MicroKernel = void (*)(const Stream<S>&, const S* const*, S*, S*, S*);

template <class S>
MicroKernel<S> tile_kernel(int vectors) {
  if (PX_VECTOR_BYTES == 64 && vectors == 4) return multiply<S, 6, 4>;
  return vectors == 2 ? multiply<S, 6, 2> : multiply<S, 8, 1>;
}

// The bias: one row of G, with x = 1.
template <class S, int NV>
void add_up(const Stream<S>& in, S* partial, S* g, S* s) {
  constexpr int L = lanes<S>;
  const S* dy = in.dy;
  for (int64_t e = 0; e < in.examples; ++e) {
    Vec<S> acc[NV];
    unroll<NV>([&](auto n) PX_LAMBDA { acc[n] = Vec<S>{}; });
    for (int64_t t = 0; t < in.positions; ++t, dy += NV * L)
      unroll<NV>([&](auto n) PX_LAMBDA { acc[n] += load(dy + n * L); });
    finish(in, acc, partial, g, s);
  }
}

template <class S>
using BiasKernel = void (*)(const Stream<S>&, S*, S*, S*);

template <class S>
BiasKernel<S> bias_kernel(int vectors) {
  if (PX_VECTOR_BYTES == 64 && vectors == 4) return add_up<S, 4>;
  return vectors == 2 ? add_up<S, 2> : add_up<S, 1>;
}

// ---------------------------------------------------------------------------------------------
// Plan

struct Plan {
  int64_t channels, outputs, taps;  // of one group
  int64_t rows;                     // channels * taps
  bool direct;                      // x is read where it lies
  Boxes boxes;
  int64_t box_count, box_positions, box_window;
  int64_t splits;            // along the examples
  int64_t c_block, o_block;  // of one task
  int64_t c_blocks, o_blocks;
  int64_t examples;  // packed at a time
  int64_t sum_size;  // elements of a block's sums, bias row and ragged tiles included
  int64_t dy_size;   // elements of a panel of packed output gradient

  template <class In>
  static Plan make(const Conv& conv, int64_t threads) {
    using S = Accumulator<In>;
    Plan p{conv};
    p.direct = std::is_same_v<In, S> && conv.padding[0] == 0 && conv.padding[1] == 0 &&
               conv.padding[2] == 0 && (p.taps == 1 || conv.x_stride[4] == 1);
    const int64_t padded =
        conv.groups * round_up(p.outputs, widest_panel<S>) * (round_up(p.rows, 8) + 1);
    p.splits = 1;
    while (p.splits < min_of(conv.B, kMaxSplits) && 2 * p.splits * padded <= kSplitElements)
      p.splits *= 2;
    p.splits = max_of(1, min_of(p.splits, conv.B));

    // Halve the block along the dimension that costs less repeated packing.
    const int64_t wanted = threads > 1 ? 4 * threads : 1;
    p.c_block = p.channels;
    p.o_block = round_up(p.outputs, widest_panel<S>);
    for (;;) {
      bool x_fits = p.direct || p.c_block * p.box_window <= kWindowElements;
      bool small = p.c_block * p.taps * p.o_block <= kBlockElements;
      int64_t tasks =
          conv.groups * p.splits * ceil_div(p.channels, p.c_block) * ceil_div(p.outputs, p.o_block);
      if (x_fits && small && tasks >= wanted) break;
      bool can_halve_o = p.o_block > widest_panel<S>;
      bool can_halve_c = p.c_block > 1 && (!x_fits || p.c_block * p.taps >= 48);
      int64_t o_cost = p.direct ? 0 : p.c_block * p.box_window;
      int64_t c_cost = p.o_block * p.box_positions;
      if (can_halve_o && (!can_halve_c || (x_fits && o_cost <= c_cost)))
        p.o_block = round_up(ceil_div(p.o_block, 2), widest_panel<S>);
      else if (can_halve_c)
        p.c_block = ceil_div(p.c_block, 2);
      else
        break;
    }
    p.c_blocks = ceil_div(p.channels, p.c_block);
    p.o_blocks = ceil_div(p.outputs, p.o_block);

    p.examples = 1;
    if (p.box_count == 1) {
      p.examples = kGroupPositions / p.box_positions;
      if (!p.direct) p.examples = min_of(p.examples, kWindowElements / (p.c_block * p.box_window));
      p.examples = max_of(1, min_of(p.examples, ceil_div(conv.B, p.splits)));
    }
    p.sum_size = p.o_block * (p.c_block * p.taps + 8 + 1);
    p.dy_size = p.examples * p.box_positions * min_of(p.o_block, widest_panel<S>);
    return p;
  }

 private:
  explicit Plan(const Conv& conv)
      : channels(conv.C / conv.groups),
        outputs(conv.O / conv.groups),
        taps(volume(conv.kernel)),
        rows(channels * taps),
        boxes(conv, kBoxPositions, kBoxWindow),
        box_count(volume(boxes.count)),
        box_positions(volume(boxes.size)),
        box_window(boxes.window(conv)) {}
};

// The part of the weights that a task owns; c and o count from the start of the tensors.
struct Block {
  int64_t c_begin, channels, o_begin, outputs;

  Block(const Plan& p, int64_t index) {
    int64_t o_index = index % p.o_blocks, c_index = index / p.o_blocks % p.c_blocks;
    int64_t group = index / (p.o_blocks * p.c_blocks);
    c_begin = group * p.channels + c_index * p.c_block;
    channels = min_of(p.c_block, p.channels - c_index * p.c_block);
    o_begin = group * p.outputs + o_index * p.o_block;
    outputs = min_of(p.o_block, p.outputs - o_index * p.o_block);
  }
};

// f(vectors, first output, row count of the sums incl. bias, their offset) for each panel.
template <class S, class F>
PX_INLINE void for_each_panel(const Plan& p, const Block& block, const F& f) {
  int64_t sums = 0;
  for (int64_t o = 0; o < block.outputs;) {
    int vectors = panel_vectors<S>(block.outputs - o);
    int64_t padded_rows = round_up(block.channels * p.taps, tile_rows(vectors));
    f(vectors, o, padded_rows, sums);
    sums += (padded_rows + 1) * vectors * lanes<S>;
    o += vectors * lanes<S>;
  }
}

// ---------------------------------------------------------------------------------------------
// Packing

// to[t][0..width) = dy of one example, box and panel, zeros past the last output.
template <class In, class S>
void pack_dy(const Conv& conv, const Box& box, const In* dy, int64_t outputs, int64_t width,
             S* to) {
  if (outputs < width) zero(to, volume(box.size) * width);
  const int64_t* stride = conv.dy_stride + 2;
  // Rows that follow one another without a gap are one row.
  int64_t rows = box.size[1], row = box.size[2];
  if (stride[1] == row * stride[2]) {
    row *= rows;
    rows = 1;
  }
  for (int64_t d = 0; d < box.size[0]; ++d) {
    for (int64_t h = 0; h < rows; ++h) {
      const In* from = dy + d * stride[0] + h * stride[1];
      if (stride[2] == 1) {
        transpose(outputs, row, from, conv.dy_stride[1], to, width);
      } else if (conv.dy_stride[1] == 1) {
        for (int64_t t = 0; t < row; ++t) widen_row(outputs, from + t * stride[2], to + t * width);
      } else {
        for (int64_t t = 0; t < row; ++t)
          for (int64_t o = 0; o < outputs; ++o)
            to[t * width + o] = widen(from[t * stride[2] + o * conv.dy_stride[1]]);
      }
      to += row * width;
    }
  }
}

// to[c][window] = the input of one example around a box. Leaves the padding alone.
template <class In, class S>
void pack_window(const Conv& conv, const Box& box, const int64_t (&window)[3], const In* x,
                 int64_t channels, S* to) {
  const int64_t* stride = conv.x_stride + 1;  // c, d, h, w
  const int64_t size = volume(window), unit[3] = {1, 1, 1};
  int64_t origin[3];
  for (int i = 0; i < 3; ++i) origin[i] = box.begin[i] * conv.stride[i] - conv.padding[i];
  const Inside inside(conv, origin, unit, window);
  const int64_t left = inside.begin[2], width = inside.end[2] - left;
  if (width <= 0) return;
  x += (origin[2] + left) * stride[3];
  to += left;
  if (stride[3] != 1 && stride[0] == 1) {  // channels_last
    for (int64_t d = inside.begin[0]; d < inside.end[0]; ++d)
      for (int64_t h = inside.begin[1]; h < inside.end[1]; ++h)
        transpose(width, channels, x + (origin[0] + d) * stride[1] + (origin[1] + h) * stride[2],
                  stride[3], to + (d * window[1] + h) * window[2], size);
    return;
  }
  for (int64_t c = 0; c < channels; ++c, x += stride[0], to += size)
    for (int64_t d = inside.begin[0]; d < inside.end[0]; ++d)
      for (int64_t h = inside.begin[1]; h < inside.end[1]; ++h)
        copy_row(width, x + (origin[0] + d) * stride[1] + (origin[1] + h) * stride[2], stride[3],
                 to + (d * window[1] + h) * window[2]);
}

// ---------------------------------------------------------------------------------------------
// One task

template <class S>
struct TaskScratch {
  int64_t* offsets;  // of the positions of a box
  S *dy, *x, *partial, *sums;
};

template <class S>
TaskScratch<S> task_scratch(const Plan& p) {
  const int64_t x_size = p.direct ? 0 : p.examples * p.c_block * p.box_window;
  const int64_t partial_size = p.box_count > 1 ? p.sum_size : 0;
  const int64_t sums_size = p.splits == 1 ? 2 * p.sum_size : 0;
  const int64_t pad = 64 / sizeof(S);  // each array starts a cache line
  int64_t bytes = (p.box_positions + 8) * int64_t{sizeof(int64_t)};
  bytes = round_up(bytes, 64);
  int64_t total = round_up(p.dy_size, pad) + round_up(x_size, pad) + round_up(partial_size, pad);
  char* base = static_cast<char*>(scratch(bytes + (total + sums_size) * int64_t{sizeof(S)}, 0));
  TaskScratch<S> out;
  out.offsets = reinterpret_cast<int64_t*>(base);
  out.dy = reinterpret_cast<S*>(base + bytes);
  out.x = out.dy + round_up(p.dy_size, pad);
  out.partial = out.x + round_up(x_size, pad);
  out.sums = out.partial + round_up(partial_size, pad);
  return out;
}

// sums (2, sum_size) = g, s of a block over the examples [b_begin, b_end).
template <class In, class S>
void sum_block(const Conv& conv, const Plan& p, const Block& block, int64_t b_begin, int64_t b_end,
               const TaskScratch<S>& scratch, S* sums) {
  zero(sums, 2 * p.sum_size);
  const bool with_bias = conv.db != nullptr && block.c_begin % p.channels == 0;
  for (int64_t b0 = b_begin; b0 < b_end; b0 += p.examples) {
    const int64_t examples = min_of(p.examples, b_end - b0);
    for (int64_t box_index = 0; box_index < p.box_count; ++box_index) {
      const Box box(conv, p.boxes, box_index);
      const int64_t positions = volume(box.size);

      // Where x of this block and box begins, and its strides: c, d, h, w.
      int64_t window[3], stride[4];
      for (int i = 0; i < 3; ++i) window[i] = Boxes::extent(conv, i, box.size[i]);
      Stream<S> stream;
      const S* x;
      if (p.direct) {
        int64_t offset = b0 * conv.x_stride[0] + block.c_begin * conv.x_stride[1];
        for (int i = 0; i < 3; ++i) offset += box.begin[i] * conv.stride[i] * conv.x_stride[2 + i];
        x = at<S>(conv.x, offset);
        for (int i = 0; i < 4; ++i) stride[i] = conv.x_stride[1 + i];
        stream.x_step = conv.x_stride[0];
      } else {
        x = scratch.x;
        stride[3] = 1;
        for (int i = 2; i >= 0; --i) stride[i] = stride[i + 1] * window[i];
        stream.x_step = block.channels * stride[0];
        // The padding stays zero from group to group unless the box changes.
        if (p.box_count > 1 || b0 == b_begin) zero(scratch.x, examples * stream.x_step);
        for (int64_t e = 0; e < examples; ++e) {
          const In* from =
              at<In>(conv.x, (b0 + e) * conv.x_stride[0] + block.c_begin * conv.x_stride[1]);
          pack_window(conv, box, window, from, block.channels, scratch.x + e * stream.x_step);
        }
      }
      int64_t* offset = scratch.offsets;
      for (int64_t d = 0; d < box.size[0]; ++d)
        for (int64_t h = 0; h < box.size[1]; ++h)
          for (int64_t w = 0; w < box.size[2]; ++w)
            *offset++ = d * conv.stride[0] * stride[1] + h * conv.stride[1] * stride[2] +
                        w * conv.stride[2] * stride[3];

      stream.examples = examples;
      stream.positions = positions;
      stream.offsets = scratch.offsets;
      stream.dy = scratch.dy;
      stream.first = box_index == 0;
      stream.last = box_index == p.box_count - 1;
      int64_t box_offset = 0;
      for (int i = 0; i < 3; ++i) box_offset += box.begin[i] * conv.dy_stride[2 + i];

      for_each_panel<S>(
          p, block, [&](int vectors, int64_t o, int64_t padded_rows, int64_t at_sums) {
            const int64_t width = vectors * lanes<S>;
            for (int64_t e = 0; e < examples; ++e) {
              const In* from =
                  at<In>(conv.dy, (b0 + e) * conv.dy_stride[0] +
                                      (block.o_begin + o) * conv.dy_stride[1] + box_offset);
              pack_dy(conv, box, from, min_of(width, block.outputs - o), width,
                      scratch.dy + e * positions * width);
            }
            const int64_t rows = block.channels * p.taps;
            const int tile = tile_rows(vectors);
            const MicroKernel<S> kernel = tile_kernel<S>(vectors);
            S *partial = scratch.partial + at_sums, *g = sums + at_sums, *s = g + p.sum_size;
            const int64_t* k = conv.kernel;
            int64_t c = 0, kd = 0, kh = 0, kw = 0;
            for (int64_t row = 0; row < rows; row += tile) {
              const S* shifted[8];
              for (int r = 0; r < tile; ++r) {
                if (row + r >= rows) {  // ragged last tile: any row will do, nobody reads its sums
                  shifted[r] = shifted[0];
                  continue;
                }
                shifted[r] = x + c * stride[0] + kd * conv.dilation[0] * stride[1] +
                             kh * conv.dilation[1] * stride[2] + kw * conv.dilation[2] * stride[3];
                if (++kw < k[2]) continue;
                kw = 0;
                if (++kh < k[1]) continue;
                kh = 0;
                if (++kd < k[0]) continue;
                kd = 0;
                ++c;
              }
              kernel(stream, shifted, partial + row * width, g + row * width, s + row * width);
            }
            if (with_bias)
              bias_kernel<S>(vectors)(stream, partial + padded_rows * width,
                                      g + padded_rows * width, s + padded_rows * width);
          });
    }
  }
}

// The sums of a block, turned to (o, (c, k)) and rounded, into dw or dw_sq and db or db_sq.
template <class S, class G>
void write_block(const Plan& p, const Block& block, const S* sums, void* dw, void* db) {
  const int64_t rows = block.channels * p.taps;
  for_each_panel<S>(p, block, [&](int vectors, int64_t o, int64_t padded_rows, int64_t at_sums) {
    const int64_t width = vectors * lanes<S>;
    const int64_t outputs = min_of(width, block.outputs - o);
    G* to =
        static_cast<G*>(dw) + (block.o_begin + o) * p.rows + block.c_begin % p.channels * p.taps;
    transpose(rows, outputs, sums + at_sums, width, to, p.rows);
    if (db != nullptr && block.c_begin % p.channels == 0)
      narrow_row(outputs, sums + at_sums + padded_rows * width,
                 static_cast<G*>(db) + block.o_begin + o);
  });
}

template <class In, class S>
void conv_by_outputs(const Conv& conv, const Parallel& parallel) {
  const Plan p = Plan::make<In>(conv, parallel.threads);
  const int64_t blocks = conv.groups * p.c_blocks * p.o_blocks;
  auto write = [&](const Block& block, const S* sums) {
    with_type(conv.grad_dtype,
              [&](auto type) { write_block<S, decltype(type)>(p, block, sums, conv.dw, conv.db); });
    write_block<S, S>(p, block, sums + p.sum_size, conv.dw_sq, conv.db_sq);
  };
  if (p.splits == 1) {
    parallel(blocks, [&](int64_t task) {
      const Block block(p, task);
      const TaskScratch<S> own = task_scratch<S>(p);
      sum_block<In, S>(conv, p, block, 0, conv.B, own, own.sums);
      write(block, own.sums);
    });
    return;
  }
  S* split_sums =
      static_cast<S*>(scratch(blocks * p.splits * 2 * p.sum_size * int64_t{sizeof(S)}, 1));
  parallel(blocks * p.splits, [&](int64_t task) {
    const int64_t split = task % p.splits;
    sum_block<In, S>(conv, p, Block(p, task / p.splits), conv.B * split / p.splits,
                     conv.B * (split + 1) / p.splits, task_scratch<S>(p),
                     split_sums + task * 2 * p.sum_size);
  });
  parallel(blocks, [&](int64_t index) {
    S* sums = split_sums + index * p.splits * 2 * p.sum_size;
    for (int64_t split = 1; split < p.splits; ++split) {
      const S* more = sums + split * 2 * p.sum_size;
      for (int64_t i = 0; i < 2 * p.sum_size; ++i) sums[i] += more[i];
    }
    write(Block(p, index), sums);
  });
}

template <class T>
void fill_zero(void* to, int64_t n) {
  if (to != nullptr) zero(static_cast<T*>(to), n);
}

// The bias where there is no weight gradient to compute it along with.
template <class In, class Out>
void bias_alone(const Conv& conv) {
  using S = Accumulator<In>;
  const In* dy = static_cast<const In*>(conv.dy);
  const int64_t* stride = conv.dy_stride;
  for (int64_t o = 0; o < conv.O; ++o) {
    S g = 0, s = 0;
    for (int64_t b = 0; b < conv.B; ++b) {
      S sum = 0;
      for (int64_t z = 0; z < conv.out[0]; ++z)
        for (int64_t y = 0; y < conv.out[1]; ++y)
          for (int64_t x = 0; x < conv.out[2]; ++x)
            sum += widen(
                dy[b * stride[0] + o * stride[1] + z * stride[2] + y * stride[3] + x * stride[4]]);
      g += sum;
      s += sum * sum;
    }
    static_cast<Out*>(conv.db)[o] = narrow<Out>(g);
    static_cast<S*>(conv.db_sq)[o] = s;
  }
}

}  // namespace

void conv_moments(const Conv& conv, const Parallel& parallel) {
  if (conv.O == 0) return;
  if (conv.B == 0 || conv.C == 0 || volume(conv.out) <= 0 || volume(conv.kernel) == 0) {
    const int64_t size = conv.O * (conv.C / conv.groups) * volume(conv.kernel);
    with_type(conv.grad_dtype, [&](auto to) {
      using Out = decltype(to);
      with_type(conv.dtype, [&](auto from) {
        using In = decltype(from);
        fill_zero<Out>(conv.dw, size);
        fill_zero<Accumulator<In>>(conv.dw_sq, size);
        if (conv.db != nullptr) bias_alone<In, Out>(conv);
      });
    });
    return;
  }
  if (prefers_positions(conv)) return conv_moments_by_positions(conv, parallel);
  with_type(conv.dtype, [&](auto type) {
    using In = decltype(type);
    conv_by_outputs<In, Accumulator<In>>(conv, parallel);
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
