// embedding_moments: MATHS (6). The positions come sorted by row of the table, and those of a row
// in the order of examples: what a row gathers in one example is added, squared, and added to the
// rest.
#include "common.cuh"

namespace perexample::cuda {
namespace {

constexpr int kThreads = 128;

// One CTA for every position and kThreads columns; only those at the start of a row's run work.
template <class T>
__global__ void __launch_bounds__(kThreads, 4)
    embedding_runs(const Embedding a, const int64_t* rows, const int64_t* order,
                   const int64_t across, const Moments out) {
  using A = Wide<T>;
  const int64_t count = a.B * a.T, first = blockIdx.x / across;
  const int64_t d = blockIdx.x % across * kThreads + threadIdx.x;
  const int64_t row = rows[first];
  if (row < 0 || row >= a.V) trap();  // the lookup itself would have failed
  if ((first > 0 && rows[first - 1] == row) || row == a.padding_idx || d >= a.D) return;
  const T* dy = static_cast<const T*>(a.dy) + d * a.dy_stride[2];
  A g = 0, s = 0;
  for (int64_t i = first; i < count && rows[i] == row;) {
    const int64_t b = order[i] / a.T;
    A G = 0;
    for (; i < count && rows[i] == row && order[i] / a.T == b; ++i) {
      G += widen(dy[b * a.dy_stride[0] + order[i] % a.T * a.dy_stride[1]]);
    }
    g += G, s += G * G;
  }
  out.put(row * a.D + d, g, s);
}

}  // namespace

void embedding_moments(const Embedding& a, const int64_t* rows, const int64_t* order,
                       const Device& device) {
  const Moments out{a.dw, a.dw_sq, a.grad_dtype};
  zero(out, a.V * a.D, a.dtype, device.stream);  // rows that were not looked up
  const int64_t across = ceil_div(a.D, kThreads);
  if (a.B == 0 || a.T == 0 || a.D == 0) return;
  with_type(a.dtype, [&](auto type) {
    launch(embedding_runs<decltype(type)>, {a.B * a.T * across, kThreads}, device.stream, a, rows,
           order, across, out);
  });
}

}  // namespace perexample::cuda
