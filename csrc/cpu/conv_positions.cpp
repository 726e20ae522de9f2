// Convolution moments of narrow groups (depthwise, few output channels): MATHS (5)
//
//   G_b[o,(c,k)] = sum_t dy[b,o,t] x[b,c, t stride + k dilation - padding]
//   dw = sum_b G_b;   dw_sq = sum_b G_b^2;   bias: the same with x = 1
//
// Where conv.cpp lays vectors along o, here they lie along t: G_b[o,(c,k)] is the dot product of
// dy's channel o with x's channel c, shifted by k. Both are packed with one pitch: x padded, and
// split into stride phases so that a shift is always a distance between contiguous vectors; dy with
// zeros behind its rows. Few sums at a time stay in registers over the positions of one example;
// their lanes are then added up, a whole vector of sums at once.
//
// A task is one group, and one range of examples if there are few groups; the ranges depend on
// shapes only and are added in order.
#include "conv_common.h"

namespace perexample::cpu::PX_CAPABILITY {
namespace {

constexpr int64_t kBoxPositions = 8192;       // positions of one box
constexpr int64_t kBoxWindow = 1 << 16;       // input elements per channel of one box
constexpr int64_t kPackedElements = 1 << 15;  // input packed at a time, in whole channels
constexpr int64_t kTaskGroups = 8;            // groups of one task
constexpr int64_t kLineChannels = 16;         // channels that share cache lines in channels_last
constexpr int64_t kStagedElements = 1 << 18;  // of x or dy that are turned at a time
constexpr int64_t kEnoughGroups = 32;         // tasks enough without splitting the examples
constexpr int64_t kSplitElements = 1 << 18;   // sums of all ranges
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kGroupsAhead = 2;           // whose cache lines are fetched early
constexpr int64_t kFetchedLines = 64;         // of x, and of dy
constexpr int kMaxOutputs = 4, kMaxRows = 9;  // of one tile

// ---------------------------------------------------------------------------------------------
// Micro-kernel

// Where a box's positions lie: `rows` runs of `vectors` vectors, one behind the other in dy and at
// `x_offsets` in x.
struct Runs {
  int64_t rows, vectors;
  const int64_t* x_offsets;
};

// Lane i of the result is the sum of v[i].
template <int K, class V, int N>
PX_INLINE V add_lanes(V (&v)[N]) {
  if constexpr (K < N) {
    unroll<N>([&](auto r) PX_LAMBDA {
      constexpr int i = r;
      if constexpr (i % (2 * K) == 0) {
        V a = v[i], b = v[i + K];
        v[i] = exchange<K, false>(a, b, std::make_index_sequence<N>{}) +
               exchange<K, true>(a, b, std::make_index_sequence<N>{});
      }
    });
    return add_lanes<2 * K>(v);
  } else {
    return v[0];
  }
}

// out[i] = the sum of acc[i]'s lanes, zeros up to the next whole vector.
template <class S, int N>
PX_INLINE void store_lane_sums(const Vec<S> (&acc)[N], S* out) {
  constexpr int L = lanes<S>;
  unroll<(N + L - 1) / L>([&](auto chunk) PX_LAMBDA {
    Vec<S> part[L];
    unroll<L>([&](auto j) PX_LAMBDA {
      constexpr int from = chunk * L + j;
      if constexpr (from < N) {
        part[j] = acc[from];
      } else {
        part[j] = Vec<S>{};
      }
    });
    store(out + chunk * L, add_lanes<1>(part));
  });
}

// out[o * I + i] = dot product of dy[o] and x[i], for a tile of O by I.
template <class S, int O, int I>
void dot(const Runs& runs, const S* const* dy_rows, const S* const* x_rows, S* out) {
  constexpr int L = lanes<S>;
  const S *dy[O], *x[I];
  unroll<O>([&](auto o) PX_LAMBDA { dy[o] = dy_rows[o]; });
  unroll<I>([&](auto i) PX_LAMBDA { x[i] = x_rows[i]; });
  Vec<S> acc[O * I];
  unroll<O * I>([&](auto j) PX_LAMBDA { acc[j] = Vec<S>{}; });
  int64_t t = 0;
  for (int64_t row = 0; row < runs.rows; ++row) {
    int64_t p = runs.x_offsets[row];
    for (const int64_t end = p + runs.vectors * L; p < end; p += L, t += L) {
      Vec<S> shifted[I];
      unroll<I>([&](auto i) PX_LAMBDA { shifted[i] = load(x[i] + p); });
      unroll<O>([&](auto o) PX_LAMBDA {
        const Vec<S> d = load(dy[o] + t);
        unroll<I>([&](auto i) PX_LAMBDA { acc[o * I + i] += d * shifted[i]; });
      });
    }
  }
  store_lane_sums<S>(acc, out);
}

// The same of one channel of dy with one of x in a window of KH by KW taps, for a box of at least
// KH rows: what is loaded of a row of x serves all KH taps below one another. Row h and tap (kh,
// kw) meet at x + shifts[kw] + (h + kh) pitch.
template <class S, int KH, int KW>
void dot_window(int64_t rows, int64_t vectors, int64_t pitch, const int64_t* shifts, const S* dy,
                const S* x, S* out) {
  constexpr int L = lanes<S>;
  Vec<S> acc[KH * KW];
  unroll<KH * KW>([&](auto j) PX_LAMBDA { acc[j] = Vec<S>{}; });
  const int64_t step = vectors * L;
  for (int64_t column = 0; column < step; column += L) {
    const S *d = dy + column, *x_rows[KW];
    unroll<KW>([&](auto kw) PX_LAMBDA { x_rows[kw] = x + shifts[kw] + column; });
    Vec<S> above[KH];  // rows h, h - 1, ... of dy
    // A row of x, for the taps from kh = First on.
    auto add = [&](auto first, auto count) PX_LAMBDA {
      unroll<KW>([&](auto kw) PX_LAMBDA {
        const Vec<S> shifted = load(x_rows[kw]);
        x_rows[kw] += pitch;
        unroll<decltype(count)::value>([&](auto i) PX_LAMBDA {
          constexpr int kh = decltype(first)::value + decltype(i)::value;
          acc[kh * KW + kw] += above[kh] * shifted;
        });
      });
    };
    auto move = [&]() PX_LAMBDA {
      unroll<KH - 1>([&](auto i) PX_LAMBDA {
        constexpr int to = KH - 1 - decltype(i)::value;
        above[to] = above[to - 1];
      });
    };
    auto next = [&]() PX_LAMBDA {
      move();
      above[0] = load(d);
      d += step;
    };
    unroll<KH - 1>([&](auto h) PX_LAMBDA {
      next();
      add(std::integral_constant<int, 0>{}, std::integral_constant<int, decltype(h)::value + 1>{});
    });
    for (int64_t h = KH - 1; h < rows; ++h) {
      next();
      add(std::integral_constant<int, 0>{}, std::integral_constant<int, KH>{});
    }
    unroll<KH - 1>([&](auto h) PX_LAMBDA {
      constexpr int first = decltype(h)::value + 1;
      move();
      add(std::integral_constant<int, first>{}, std::integral_constant<int, KH - first>{});
    });
  }
  store_lane_sums<S>(acc, out);
}

template <class S>
using MicroKernel = void (*)(const Runs&, const S* const*, const S* const*, S*);

struct TileShape {
  int outputs, rows;
};

template <class S>
MicroKernel<S> tile_kernel(TileShape tile) {
  if (tile.outputs == 4) return dot<S, 4, 3>;
  if (tile.outputs == 2) return dot<S, 2, 4>;
  constexpr MicroKernel<S> by_rows[kMaxRows] = {dot<S, 1, 1>, dot<S, 1, 2>, dot<S, 1, 3>,
                                                dot<S, 1, 4>, dot<S, 1, 5>, dot<S, 1, 6>,
                                                dot<S, 1, 7>, dot<S, 1, 8>, dot<S, 1, 9>};
  return by_rows[tile.rows - 1];
}

PX_INLINE TileShape tile_shape(int64_t outputs, int64_t rows) {
  if (outputs > 2) return {4, 3};
  if (outputs == 2) return {2, 4};
  return {1, static_cast<int>(ceil_div(rows, ceil_div(rows, kMaxRows)))};
}

// ---------------------------------------------------------------------------------------------
// Plan

// How x and dy of one box are packed.
struct Layout {
  int64_t phases[3];   // of the stride that some tap uses
  int64_t steps[3];    // positions of one phase, in units of the stride
  int64_t pitch;       // from row to row of a phase
  int64_t phase_size;  // elements of one phase
  int64_t x_size;      // of a channel: all phases
  bool flat;           // rows follow one another in one run, the padding between them included
  int64_t rows, vectors;
  int64_t dy_size;  // of a channel

  Layout(const Conv& conv, const int64_t (&size)[3], int64_t lane_count) {
    for (int i = 0; i < 3; ++i) {
      int64_t reach = (conv.kernel[i] - 1) * conv.dilation[i];
      phases[i] = min_of(conv.stride[i], reach + 1);
      steps[i] = size[i] + reach / conv.stride[i];
    }
    int64_t flat_vectors = ceil_div((size[1] - 1) * steps[2] + size[2], lane_count);
    int64_t row_vectors = ceil_div(size[2], lane_count);
    flat = flat_vectors <= size[1] * row_vectors;
    rows = flat ? size[0] : size[0] * size[1];
    vectors = flat ? flat_vectors : row_vectors;
    pitch = flat ? steps[2] : steps[2] - size[2] + row_vectors * lane_count;
    phase_size = steps[0] * steps[1] * pitch;
    // The last vector of a run may read past its end.
    x_size = volume(phases) * phase_size + lane_count;
    dy_size = rows * vectors * lane_count;
  }

  // Where tap (kd, kh, kw) finds position 0.
  int64_t shift(const Conv& conv, const int64_t (&tap)[3]) const {
    int64_t phase = 0, step = 0;
    for (int i = 0; i < 3; ++i) {
      int64_t distance = tap[i] * conv.dilation[i];
      phase = phase * phases[i] + distance % conv.stride[i];
      step = step * (i == 2 ? pitch : steps[i]) + distance / conv.stride[i];
    }
    return phase * phase_size + step;
  }
};

struct Plan {
  int64_t channels, outputs, taps, rows;  // of one group; rows = channels * taps
  Boxes boxes;
  Layout layout;  // of the largest box
  int64_t box_count;
  int64_t splits;
  int64_t c_block;  // channels packed at a time
  TileShape tile;
  int64_t tile_size;  // of a tile's sums, whole vectors
  int64_t o_tiles, r_tiles;
  int64_t sum_size;     // elements of a group's sums; the bias behind the tiles
  int64_t task_groups;  // neighbours, for the sake of the memory's prefetchers
  bool staged;          // their channels are turned from channels_last together

  Plan(const Conv& conv, int64_t lane_count, int64_t threads)
      : channels(conv.C / conv.groups),
        outputs(conv.O / conv.groups),
        taps(volume(conv.kernel)),
        rows(channels * taps),
        boxes(conv, kBoxPositions, kBoxWindow),
        layout(conv, boxes.size, lane_count),
        box_count(volume(boxes.count)) {
    tile = tile_shape(outputs, rows);
    tile_size = round_up(tile.outputs * tile.rows, lane_count);
    o_tiles = ceil_div(outputs, tile.outputs);
    c_block = max_of(1, min_of(channels, kPackedElements / layout.x_size));
    // Tiles do not cross from one block of channels to the next.
    r_tiles = channels / c_block * ceil_div(c_block * taps, tile.rows) +
              ceil_div(channels % c_block * taps, tile.rows);
    sum_size = o_tiles * r_tiles * tile_size + round_up(outputs, lane_count);
    splits = 1;
    while (conv.groups * splits < kEnoughGroups && splits < min_of(conv.B, kMaxSplits) &&
           2 * splits * conv.groups * sum_size <= kSplitElements)
      splits *= 2;
    splits = max_of(1, min_of(splits, conv.B));
    task_groups = splits > 1 ? 1 : min_of(kTaskGroups, ceil_div(conv.groups, 4 * threads));
    const int64_t line = ceil_div(kLineChannels, min_of(channels, outputs));
    staged =
        splits == 1 && conv.groups >= line && (conv.x_stride[4] != 1 || conv.dy_stride[4] != 1) &&
        line * max_of(channels * volume(conv.in), outputs * volume(conv.out)) <= kStagedElements;
    if (staged) task_groups = line;
  }
};

// ---------------------------------------------------------------------------------------------
// Packing

// Packing one channel is a list of row copies, the same for every channel and example.
struct RowCopy {
  int64_t from, to, size;
};

// x around a box, to (phases, steps..., pitch). Leaves the padding out.
RowCopy* list_x_copies(const Conv& conv, const Box& box, const Layout& layout, RowCopy* copy) {
  const int64_t* stride = conv.x_stride + 2;
  int64_t step[3], phase[3], origin[3], to = 0;
  for (int i = 0; i < 3; ++i) step[i] = conv.stride[i];
  for (phase[0] = 0; phase[0] < layout.phases[0]; ++phase[0])
    for (phase[1] = 0; phase[1] < layout.phases[1]; ++phase[1])
      for (phase[2] = 0; phase[2] < layout.phases[2]; ++phase[2], to += layout.phase_size) {
        for (int i = 0; i < 3; ++i) origin[i] = box.begin[i] * step[i] + phase[i] - conv.padding[i];
        const Inside inside(conv, origin, step, layout.steps);
        const int64_t left = inside.begin[2], size = inside.end[2] - left;
        if (size <= 0) continue;
        for (int64_t d = inside.begin[0]; d < inside.end[0]; ++d)
          for (int64_t h = inside.begin[1]; h < inside.end[1]; ++h)
            *copy++ = {(origin[0] + d * step[0]) * stride[0] +
                           (origin[1] + h * step[1]) * stride[1] +
                           (origin[2] + left * step[2]) * stride[2],
                       to + (d * layout.steps[1] + h) * layout.pitch + left, size};
      }
  return copy;
}

// dy of a box, to its runs. Leaves the gaps behind its rows out.
RowCopy* list_dy_copies(const Conv& conv, const Box& box, const Layout& layout, int64_t run,
                        RowCopy* copy) {
  for (int64_t d = 0; d < box.size[0]; ++d)
    for (int64_t h = 0; h < box.size[1]; ++h)
      *copy++ = {d * conv.dy_stride[2] + h * conv.dy_stride[3],
                 layout.flat ? d * run + h * layout.pitch : (d * box.size[1] + h) * run,
                 box.size[2]};
  return copy;
}

struct CopyList {
  const RowCopy *begin, *end;
  int64_t step;  // from value to value in the source
};

template <class In, class S>
void pack(const CopyList& list, const In* from, S* to) {
  for (const RowCopy* copy = list.begin; copy != list.end; ++copy)
    copy_row(copy->size, from + copy->from, list.step, to + copy->to);
}

// ---------------------------------------------------------------------------------------------
// One task

template <class S>
struct TaskScratch {
  int64_t *x_offsets, *shifts;  // of the runs and taps of a box
  RowCopy* copies;
  S *dy, *x, *partial, *sums;
};

template <class S>
TaskScratch<S> task_scratch(const Plan& p) {
  const Layout& layout = p.layout;
  const int64_t pad = 64 / sizeof(S);  // each array starts a cache line
  const int64_t copies =
      volume(layout.phases) * layout.steps[0] * layout.steps[1] + p.boxes.size[0] * p.boxes.size[1];
  const int64_t table_bytes = round_up(
      (layout.rows + p.taps) * int64_t{sizeof(int64_t)} + copies * int64_t{sizeof(RowCopy)}, 64);
  const int64_t dy_size = round_up(p.outputs * layout.dy_size, pad);
  const int64_t x_size = round_up(p.c_block * layout.x_size, pad);
  const int64_t partial_size = p.box_count > 1 ? round_up(p.sum_size, pad) : 0;
  const int64_t sums_size = p.splits == 1 ? p.task_groups * 2 * p.sum_size : 0;
  const int64_t total = dy_size + x_size + partial_size + sums_size;
  char* base = static_cast<char*>(scratch(table_bytes + total * int64_t{sizeof(S)}, 0));
  TaskScratch<S> out;
  out.x_offsets = reinterpret_cast<int64_t*>(base);
  out.shifts = out.x_offsets + layout.rows;
  out.copies = reinterpret_cast<RowCopy*>(out.shifts + p.taps);
  out.dy = reinterpret_cast<S*>(base + table_bytes);
  out.x = out.dy + dy_size;
  out.partial = out.x + x_size;
  out.sums = out.partial + partial_size;
  return out;
}

// A box's sums, n of them (whole vectors), into G_b, or G_b and its square into g and s.
template <class S>
PX_INLINE void finish(int64_t n, const S* sums, bool first, bool last, S* partial, S* g, S* s) {
  for (int64_t i = 0; i < n; i += lanes<S>) {
    Vec<S> total = load(sums + i);
    if (!first) total += load(partial + i);
    if (last) {
      store(g + i, load(g + i) + total);
      store(s + i, load(s + i) + total * total);
    } else {
      store(partial + i, total);
    }
  }
}

// One box of one group: where its positions and taps lie in what is packed.
struct BoxView {
  Box box;
  Layout layout;
  Runs runs;
  const int64_t* shifts;  // of the taps
  CopyList x_copies, dy_copies;
  bool dy_in_place;  // dy lies as if it were packed
  bool window;       // one 3 x 3 window of one channel is a tile

  template <class In, class S>
  static BoxView make(const Conv& conv, const Plan& p, int64_t index,
                      const TaskScratch<S>& scratch) {
    const Box box(conv, p.boxes, index);
    const Layout layout(conv, box.size, lanes<S>);
    for (int64_t row = 0; row < layout.rows; ++row) {
      int64_t d = layout.flat ? row : row / box.size[1], h = layout.flat ? 0 : row % box.size[1];
      scratch.x_offsets[row] = (d * layout.steps[1] + h) * layout.pitch;
    }
    int64_t* shift = scratch.shifts;
    int64_t tap[3];
    for (tap[0] = 0; tap[0] < conv.kernel[0]; ++tap[0])
      for (tap[1] = 0; tap[1] < conv.kernel[1]; ++tap[1])
        for (tap[2] = 0; tap[2] < conv.kernel[2]; ++tap[2]) *shift++ = layout.shift(conv, tap);
    const int64_t* stride = conv.dy_stride + 2;
    const int64_t* size = box.size;
    bool in_place = std::is_same_v<In, S> && layout.dy_size == volume(box.size) && stride[2] == 1 &&
                    (size[1] == 1 || stride[1] == size[2]) &&
                    (size[0] == 1 || stride[0] == size[1] * size[2]);
    zero(scratch.x, p.c_block * layout.x_size);
    if (!in_place) zero(scratch.dy, p.outputs * layout.dy_size);
    RowCopy* const x_end = list_x_copies(conv, box, layout, scratch.copies);
    RowCopy* const dy_end = list_dy_copies(conv, box, layout, layout.vectors * lanes<S>, x_end);
    return {box,
            layout,
            {layout.rows, layout.vectors, scratch.x_offsets},
            scratch.shifts,
            {scratch.copies, x_end, conv.stride[2] * conv.x_stride[4]},
            {x_end, dy_end, conv.dy_stride[4]},
            in_place,
            p.tile.outputs == 1 && p.tile.rows == 9 && conv.kernel[1] == 3 && conv.kernel[2] == 3 &&
                conv.stride[1] == 1 && conv.dilation[1] == 1 && !layout.flat && box.size[0] == 1 &&
                box.size[1] >= 3};
  }
};

// sums (2, sum_size) += g, s of one box of one group of example b.
template <class In, class S>
void sum_box(const Conv& conv, const Plan& p, const BoxView& view, int64_t group, int64_t b,
             bool first, bool last, const TaskScratch<S>& scratch, S* sums) {
  const Layout& layout = view.layout;
  const MicroKernel<S> kernel = tile_kernel<S>(p.tile);
  const S* dy = scratch.dy;
  int64_t dy_step = layout.dy_size;  // from output to output
  int64_t dy_begin = b * conv.dy_stride[0] + group * p.outputs * conv.dy_stride[1];
  for (int i = 0; i < 3; ++i) dy_begin += view.box.begin[i] * conv.dy_stride[2 + i];
  if (view.dy_in_place) {
    dy = at<S>(conv.dy, dy_begin);
    dy_step = conv.dy_stride[1];
  } else {
    for (int64_t o = 0; o < p.outputs; ++o)
      pack(view.dy_copies, at<In>(conv.dy, dy_begin + o * conv.dy_stride[1]),
           scratch.dy + o * dy_step);
  }

  int64_t done = 0;  // sums so far
  for (int64_t c0 = 0; c0 < p.channels; c0 += p.c_block) {
    const int64_t channels = min_of(p.c_block, p.channels - c0), rows = channels * p.taps;
    const int64_t x_begin = b * conv.x_stride[0] + (group * p.channels + c0) * conv.x_stride[1];
    for (int64_t c = 0; c < channels; ++c)
      pack(view.x_copies, at<In>(conv.x, x_begin + c * conv.x_stride[1]),
           scratch.x + c * layout.x_size);
    const S* x = scratch.x;
    int64_t tap = 0;
    for (int64_t row = 0; row < rows; row += p.tile.rows) {
      const S* x_rows[kMaxRows];
      for (int r = 0; r < p.tile.rows; ++r) {
        if (row + r >= rows) {  // ragged last tile: nobody reads these sums
          x_rows[r] = x_rows[0];
          continue;
        }
        x_rows[r] = x + view.shifts[tap];
        if (++tap == p.taps) {
          tap = 0;
          x += layout.x_size;
        }
      }
      for (int64_t o = 0; o < p.outputs; o += p.tile.outputs) {
        const S* dy_rows[kMaxOutputs];
        for (int j = 0; j < p.tile.outputs; ++j)
          dy_rows[j] = dy + min_of(o + j, p.outputs - 1) * dy_step;
        alignas(64) S tile[kMaxOutputs * kMaxRows + 16];
        if (view.window) {
          dot_window<S, 3, 3>(layout.rows, layout.vectors, layout.pitch, view.shifts, dy_rows[0],
                              x_rows[0] - view.shifts[0], tile);
        } else {
          kernel(view.runs, dy_rows, x_rows, tile);
        }
        finish(p.tile_size, tile, first, last, scratch.partial + done, sums + done,
               sums + p.sum_size + done);
        done += p.tile_size;
      }
    }
  }
  if (conv.db == nullptr) return;
  for (int64_t o = 0; o < p.outputs; o += lanes<S>) {
    alignas(64) S totals[lanes<S>] = {};
    for (int64_t j = 0; j < min_of(lanes<S>, p.outputs - o); ++j) {
      Vec<S> total{};
      for (int64_t t = 0; t < layout.dy_size; t += lanes<S>)
        total += load(dy + (o + j) * dy_step + t);
      totals[j] = sum<S>(total);
    }
    finish(lanes<S>, totals, first, last, scratch.partial + done, sums + done,
           sums + p.sum_size + done);
    done += lanes<S>;
  }
}

// to (channels, size...) = some channels of one example, whatever their strides.
template <class In, class S>
void stage(const int64_t (&size)[3], const int64_t* stride, int64_t channels, const In* from,
           S* to) {
  int64_t rows = size[1], row = size[2];
  if (stride[2] == row * stride[3]) {  // rows that follow one another without a gap are one
    row *= rows;
    rows = 1;
  }
  for (int64_t d = 0; d < size[0]; ++d)
    for (int64_t h = 0; h < rows; ++h, to += row) {
      const In* begin = from + d * stride[1] + h * stride[2];
      if (stride[0] == 1) {
        transpose(row, channels, begin, stride[3], to, volume(size));
      } else {
        for (int64_t c = 0; c < channels; ++c)
          copy_row(row, begin + c * stride[0], stride[3], to + c * volume(size));
      }
    }
}

PX_INLINE void set_contiguous(const int64_t (&size)[3], int64_t (&stride)[5]) {
  stride[4] = 1;
  stride[3] = size[2];
  stride[2] = size[1] * size[2];
  stride[1] = volume(size);
}

// Asks for the first cache lines of one group of one example, where its channels are contiguous.
template <class In>
PX_INLINE void fetch_group(const Conv& conv, const Plan& p, int64_t group, int64_t b) {
  if (b >= conv.B) return;
  auto fetch_channels = [](const void* base, const int64_t* stride, int64_t begin, int64_t n)
                            PX_LAMBDA {
                              if (stride[4] != 1) return;
                              constexpr int64_t kLine = 64 / int64_t{sizeof(In)};
                              const In* first = at<In>(base, begin);
                              for (int64_t i = 0; i < min_of(n, kFetchedLines * kLine); i += kLine)
                                fetch(first, i);
                            };
  fetch_channels(conv.x, conv.x_stride,
                 b * conv.x_stride[0] + group * p.channels * conv.x_stride[1],
                 p.channels * volume(conv.in));
  fetch_channels(conv.dy, conv.dy_stride,
                 b * conv.dy_stride[0] + group * p.outputs * conv.dy_stride[1],
                 p.outputs * volume(conv.out));
}

// sums (groups, 2, sum_size) = g, s of some groups over the examples [b_begin, b_end).
template <class In, class S>
void sum_groups(const Conv& conv, const Plan& p, int64_t first_group, int64_t groups,
                int64_t b_begin, int64_t b_end, const TaskScratch<S>& scratch, S* sums) {
  zero(sums, groups * 2 * p.sum_size);
  BoxView view = BoxView::make<In>(conv, p, 0, scratch);
  for (int64_t b = b_begin; b < b_end; ++b)
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t ahead = group + kGroupsAhead;
      fetch_group<In>(conv, p, first_group + ahead % groups, b + ahead / groups);
      for (int64_t i = 0; i < p.box_count; ++i) {
        if (p.box_count > 1) view = BoxView::make<In>(conv, p, i, scratch);
        sum_box<In>(conv, p, view, first_group + group, b, i == 0, i == p.box_count - 1, scratch,
                    sums + group * 2 * p.sum_size);
      }
    }
}

// The same, one example at a time turned to contiguous channels of S.
template <class In, class S>
void sum_staged_groups(const Conv& conv, const Plan& p, int64_t first_group, int64_t groups,
                       const TaskScratch<S>& own, S* sums) {
  const int64_t x_size = p.task_groups * p.channels * volume(conv.in);
  const int64_t dy_size = p.task_groups * p.outputs * volume(conv.out);
  S* x = static_cast<S*>(scratch((x_size + dy_size) * int64_t{sizeof(S)}, 2));
  Conv turned = conv;
  turned.x = x;
  turned.dy = x + x_size;
  set_contiguous(conv.in, turned.x_stride);
  set_contiguous(conv.out, turned.dy_stride);
  zero(sums, groups * 2 * p.sum_size);
  BoxView view = BoxView::make<S>(turned, p, 0, own);
  for (int64_t b = 0; b < conv.B; ++b) {
    const int64_t c = first_group * p.channels, o = first_group * p.outputs;
    stage(conv.in, conv.x_stride + 1, groups * p.channels,
          at<In>(conv.x, b * conv.x_stride[0] + c * conv.x_stride[1]), x);
    stage(conv.out, conv.dy_stride + 1, groups * p.outputs,
          at<In>(conv.dy, b * conv.dy_stride[0] + o * conv.dy_stride[1]), x + x_size);
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < p.box_count; ++i) {
        if (p.box_count > 1) view = BoxView::make<S>(turned, p, i, own);
        sum_box<S>(turned, p, view, group, 0, i == 0, i == p.box_count - 1, own,
                   sums + group * 2 * p.sum_size);
      }
  }
}

// The sums of a group, from the order of the tiles to (o, (c, k)), rounded.
template <class S, class G>
void write_group(const Plan& p, int64_t group, const S* sums, void* dw, void* db) {
  for (int64_t c0 = 0; c0 < p.channels; c0 += p.c_block) {
    const int64_t rows = min_of(p.c_block, p.channels - c0) * p.taps;
    for (int64_t row = 0; row < rows; row += p.tile.rows)
      for (int64_t o = 0; o < p.outputs; o += p.tile.outputs, sums += p.tile_size)
        for (int64_t j = 0; j < min_of(p.tile.outputs, p.outputs - o); ++j)
          narrow_row(
              min_of(p.tile.rows, rows - row), sums + j * p.tile.rows,
              static_cast<G*>(dw) + (group * p.outputs + o + j) * p.rows + c0 * p.taps + row);
  }
  if (db != nullptr) narrow_row(p.outputs, sums, static_cast<G*>(db) + group * p.outputs);
}

template <class In, class S>
void conv_by_positions(const Conv& conv, const Parallel& parallel) {
  const Plan p(conv, lanes<S>, parallel.threads);
  auto write = [&](int64_t group, const S* sums) {
    with_type(conv.grad_dtype,
              [&](auto type) { write_group<S, decltype(type)>(p, group, sums, conv.dw, conv.db); });
    write_group<S, S>(p, group, sums + p.sum_size, conv.dw_sq, conv.db_sq);
  };
  if (p.splits == 1) {
    parallel(ceil_div(conv.groups, p.task_groups), [&](int64_t task) {
      const TaskScratch<S> own = task_scratch<S>(p);
      const int64_t first = task * p.task_groups;
      const int64_t groups = min_of(p.task_groups, conv.groups - first);
      if (p.staged)
        sum_staged_groups<In, S>(conv, p, first, groups, own, own.sums);
      else
        sum_groups<In, S>(conv, p, first, groups, 0, conv.B, own, own.sums);
      for (int64_t i = 0; i < groups; ++i) write(first + i, own.sums + i * 2 * p.sum_size);
    });
    return;
  }
  const int64_t size = 2 * p.sum_size;
  S* split_sums = static_cast<S*>(scratch(conv.groups * p.splits * size * int64_t{sizeof(S)}, 1));
  parallel(conv.groups * p.splits, [&](int64_t task) {
    const int64_t split = task % p.splits;
    sum_groups<In, S>(conv, p, task / p.splits, 1, conv.B * split / p.splits,
                      conv.B * (split + 1) / p.splits, task_scratch<S>(p),
                      split_sums + task * size);
  });
  for (int64_t group = 0; group < conv.groups; ++group) {
    S* sums = split_sums + group * p.splits * size;
    for (int64_t split = 1; split < p.splits; ++split)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[split * size + i];
    write(group, sums);
  }
}

}  // namespace

bool prefers_positions(const Conv& conv) { return conv.O / conv.groups <= 4; }

void conv_moments_by_positions(const Conv& conv, const Parallel& parallel) {
  with_type(conv.dtype, [&](auto type) {
    using In = decltype(type);
    conv_by_positions<In, Accumulator<In>>(conv, parallel);
  });
}

}  // namespace perexample::cpu::PX_CAPABILITY
