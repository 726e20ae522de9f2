// The float64 kernel of linear_moments and conv_moments: plain loops, no tensor cores.
//
//   G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];   g = sum_b G_b;   s = sum_b G_b^2           MATHS (3),
//   (5)
#pragma once

#include "common.cuh"

namespace perexample::cuda {

constexpr int kSimpleTile = 32, kSimpleBlock = 16, kSimpleThreads = 256;

// One CTA a tile of 32×32; a thread has four rows of one column.
template <class X>
__global__ void __launch_bounds__(kSimpleThreads, 2)
    simple_moments(const Strided dy, const X x, const int64_t batch, const int64_t positions,
                   const Matrix out) {
  __shared__ double block_dy[kSimpleBlock][kSimpleTile], block_x[kSimpleBlock][kSimpleTile];
  const int64_t across = (out.inputs + kSimpleTile - 1) / kSimpleTile;
  const int64_t down = (out.outputs + kSimpleTile - 1) / kSimpleTile;
  const int64_t group = blockIdx.x / (across * down), tile = blockIdx.x % (across * down);
  const int64_t row = tile / across * kSimpleTile, column = tile % across * kSimpleTile;
  const int my_column = static_cast<int>(threadIdx.x) % kSimpleTile;
  const int my_row = static_cast<int>(threadIdx.x) / kSimpleTile;  // and + 8, + 16, + 24
  double g[4] = {}, s[4] = {};
  auto load = [&](double (*block)[kSimpleTile], const auto& from, int64_t b, int64_t t, int64_t c) {
    for (int e = static_cast<int>(threadIdx.x); e < kSimpleBlock * kSimpleTile;
         e += kSimpleThreads) {
      int k = e / kSimpleTile, i = e % kSimpleTile;
      const char* source =
          t + k < positions && c + i < from.columns ? from.at(group, b, t + k, c + i) : nullptr;
      block[k][i] = source == nullptr ? 0.0 : *reinterpret_cast<const double*>(source);
    }
  };
  for (int64_t b = 0; b < batch; ++b) {
    double G[4] = {};
    for (int64_t t = 0; t < positions; t += kSimpleBlock) {
      __syncthreads();
      load(block_dy, dy, b, t, row);
      load(block_x, x, b, t, column);
      __syncthreads();
      for (int k = 0; k < kSimpleBlock; ++k) {
        double value = block_x[k][my_column];
#pragma unroll
        for (int r = 0; r < 4; ++r) G[r] = fma(block_dy[k][my_row + 8 * r], value, G[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < 4; ++r) g[r] += G[r], s[r] = fma(G[r], G[r], s[r]);
  }
  if (column + my_column >= out.inputs) return;
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    const int64_t o = row + my_row + 8 * r;
    if (o >= out.outputs) continue;
    const int64_t first = (group * out.outputs + o) * out.inputs;
    out.moments.put(first + x.result(column + my_column), g[r], s[r]);
  }
}

template <class X>
void launch_simple(const Strided& dy, const X& x, int64_t groups, int64_t batch, int64_t positions,
                   const Matrix& out, const Device& device) {
  int64_t ctas = groups * ceil_div(out.outputs, kSimpleTile) * ceil_div(out.inputs, kSimpleTile);
  launch(simple_moments<X>, {ctas, kSimpleThreads}, device.stream, dy, x, batch, positions, out);
}

}  // namespace perexample::cuda
