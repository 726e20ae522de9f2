// bias_moments and reduce_moments: sums over examples, and over the positions of each.
//
//   G_b[o] = sum_t dy[b,t,o];   db = sum_b G_b;   db_sq = sum_b G_b^2                 MATHS (3),
//   (8)
#include "common.cuh"

namespace perexample::cuda {
namespace {

constexpr int kThreads = 256;

// How the threads of a CTA share its columns, examples and positions.
enum class Share {
  kColumns,    // one thread a column
  kExamples,   // 8 threads a column: each sums every eighth example
  kPositions,  // 8 threads a column: each sums every eighth position of an example
  kWarps,      // 32 threads a column, neighbours in the positions, along which dy is dense
};

template <Share kShare>
constexpr int kColumnsOf = kShare == Share::kColumns ? kThreads
                           : kShare == Share::kWarps ? 8
                                                     : 32;

// The columns of dy are rows of the plan's tiles, as those of a bias are. slots: see `put_bias`.
template <class T, Share kShare>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 2 : 4)
    column_moments(const T* dy, const int64_t b_stride, const int64_t t_stride,
                   const int64_t o_stride, const int64_t columns, const Plan plan,
                   const Moments out, Wide<T>* slots) {
  using A = Wide<T>;
  constexpr int kColumns = kColumnsOf<kShare>, kSharers = kThreads / kColumns;
  __shared__ A part[2][kSharers][kColumns];
  const int thread = static_cast<int>(threadIdx.x);
  const int mine = kShare == Share::kWarps ? thread / 32 : thread % kColumns;
  const int sharer = kShare == Share::kWarps ? thread % 32 : thread / kColumns;
  for (int64_t index = blockIdx.x; index < plan.jobs; index += gridDim.x) {
    const Job j = job(plan, index);
    const int64_t column = j.row * kColumns + mine;
    const bool exists = column < columns;
    const T* first = dy + (exists ? column : 0) * o_stride;
    A g = 0, s = 0;
    auto add = [&](A G) { g += G, s += G * G; };
    constexpr bool kWithin = kShare == Share::kPositions || kShare == Share::kWarps;
    const int64_t b_first = j.b0 + (kWithin ? 0 : sharer), b_step = kWithin ? 1 : kSharers;
    for (int64_t b = b_first; b < j.b1; b += b_step) {
      const int64_t t_first = j.t0 + (kWithin ? sharer : 0), t_step = kWithin ? kSharers : 1;
      const T* from = first + b * b_stride;
      // Four sums at a time: more loads in flight, and a smaller error.
      A sums[4] = {};
      int64_t t = t_first;
      for (; t + 3 * t_step < j.t1; t += 4 * t_step) {
#pragma unroll
        for (int q = 0; q < 4; ++q) sums[q] += widen(from[(t + q * t_step) * t_stride]);
      }
      for (; t < j.t1; t += t_step) sums[0] += widen(from[t * t_stride]);
      A G = (sums[0] + sums[1]) + (sums[2] + sums[3]);
      if constexpr (kShare == Share::kWarps) {
        add(add_in_warp(G));
      } else if constexpr (kShare == Share::kPositions) {
        __syncthreads();
        part[0][sharer][mine] = G;
        __syncthreads();
        if (sharer == 0) {
          for (int q = 1; q < kSharers; ++q) G += part[0][q][mine];
          add(G);
        }
      } else {
        add(G);
      }
    }
    if constexpr (kShare == Share::kExamples) {
      __syncthreads();
      part[0][sharer][mine] = g, part[1][sharer][mine] = s;
      __syncthreads();
      if (sharer == 0) {
        for (int q = 1; q < kSharers; ++q) g += part[0][q][mine], s += part[1][q][mine];
      }
    }
    if (sharer == 0) put_bias<kColumns>(j, mine, g, s, slots, columns, out);
  }
}

template <class T, Share kShare>
void launch_columns(const Bias& a, const Moments& out, const Device& device) {
  constexpr int kColumns = kColumnsOf<kShare>;
  constexpr bool kCut = kShare == Share::kPositions || kShare == Share::kWarps;
  // Several CTAs a multiprocessor keep enough loads in flight.
  Plan p = plan(1, a.O, 1, kColumns, 1, a.B, a.T, kCut ? 64 : a.T, 8 * device.multiprocessors);
  void* slots = nullptr;
  if (p.slots() > 0) {
    slots = device.allocate(device.ctx,
                            p.slots() * 2 * kColumns * static_cast<int64_t>(sizeof(Wide<T>)));
  }
  launch(column_moments<T, kShare>, {p.ctas, kThreads}, device.stream, static_cast<const T*>(a.dy),
         a.dy_stride[0], a.dy_stride[1], a.dy_stride[2], a.O, p, out, static_cast<Wide<T>*>(slots));
  launch_add_bias_slots<kColumns>(static_cast<const Wide<T>*>(slots), p, a.O, out, device);
}

}  // namespace

void bias_moments(const Bias& a, const Device& device) {
  const Moments out{a.db, a.db_sq, a.grad_dtype};
  if (a.B == 0 || a.T == 0 || a.O == 0) return zero(out, a.O, a.dtype, device.stream);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    if (a.T > 1 && a.dy_stride[1] == 1 && a.dy_stride[2] != 1) {
      launch_columns<T, Share::kWarps>(a, out, device);
    } else if (a.T >= 8) {
      launch_columns<T, Share::kPositions>(a, out, device);
    } else if (a.O < int64_t{kThreads} * device.multiprocessors && a.B >= 8) {
      launch_columns<T, Share::kExamples>(a, out, device);
    } else {
      launch_columns<T, Share::kColumns>(a, out, device);
    }
  });
}

void reduce_moments(const Reduce& a, const Device& device) {
  bias_moments(
      {a.B, 1, a.N, a.dtype, a.g, {a.g_stride[0], 0, a.g_stride[1]}, a.grad_dtype, a.sum, a.sum_sq},
      device);
}

}  // namespace perexample::cuda
