// The norms' backward with the moments of their affine part: MATHS (7).
//
//   G_b = sum_t dy xhat (weight), sum_t dy (bias);   dx = rstd (h - mean(h) - xhat mean(h xhat))
//
// A CTA stays within one example and writes its sums of dy xhat and of dy; the launcher of the bias
// then adds those of an example, squares, and adds over examples.
#include "common.cuh"

namespace perexample::cuda {
namespace {

constexpr int kMostThreads = 256, kWarps = kMostThreads / 32;
constexpr int64_t kMostShared = 96 * 1024;

// The sums of both over the CTA, to every thread.
template <class A>
PX_DEVICE void add_in_cta(A& x, A& y) {
  __shared__ A part[2][kWarps];
  const int warp = static_cast<int>(threadIdx.x) / 32, warps = static_cast<int>(blockDim.x) / 32;
  x = add_in_warp(x), y = add_in_warp(y);
  __syncthreads();  // the sums before have been read
  if (threadIdx.x % 32 == 0) part[0][warp] = x, part[1][warp] = y;
  __syncthreads();
  x = y = 0;
  for (int w = 0; w < warps; ++w) x += part[0][w], y += part[1][w];
}

// Mean and 1 / standard deviation of n numbers, by the CTA.
template <class A, class Read>
PX_DEVICE void statistics(int64_t n, bool centered, A eps, const Read& read, A& mean, A& rstd) {
  A sum = 0, none = 0;
  if (centered) {
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) sum += read(i);
    add_in_cta(sum, none);
  }
  mean = sum / static_cast<A>(n);
  A squares = 0;
  none = 0;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    A d = read(i) - mean;
    squares += d * d;
  }
  add_in_cta(squares, none);
  rstd = A{1} / sqrt(squares / static_cast<A>(n) + eps);
}

template <class T>
PX_DEVICE Wide<T> weight_at(const void* weight, DType dtype, int64_t i) {
  using A = Wide<T>;
  if (weight == nullptr) return 1;
  return dtype == DType::f32    ? static_cast<A>(static_cast<const float*>(weight)[i])
         : dtype == DType::f64  ? static_cast<A>(static_cast<const double*>(weight)[i])
         : dtype == DType::bf16 ? static_cast<A>(widen(static_cast<const bf16*>(weight)[i]))
                                : static_cast<A>(widen(static_cast<const f16*>(weight)[i]));
}

template <class T>
PX_DEVICE void store_as(T* to, Wide<T> x) {
  if constexpr (std::is_same_v<T, bf16>) {
    *to = to_bf16(x);
  } else if constexpr (std::is_same_v<T, f16>) {
    *to = to_f16(x);
  } else {
    *to = x;
  }
}

// CTA (b, part): rows of one example. partial: [b][part][dy xhat, dy][D], or null.
// `in_shared`: the sums are kept in shared memory until the end, each thread its own columns.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    layer_norm(const LayerNorm a, const int64_t parts, Wide<T>* partial, const bool in_shared) {
  using A = Wide<T>;
  PX_SHARED_MEMORY(memory);
  const int64_t b = blockIdx.x / parts, part = blockIdx.x % parts;
  const int64_t t0 = a.T * part / parts, t1 = a.T * (part + 1) / parts;
  A* mine = partial == nullptr ? nullptr : partial + blockIdx.x * 2 * a.D;
  A* sums = in_shared ? reinterpret_cast<A*>(memory) : mine;
  if (sums != nullptr) {
    for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) sums[d] = sums[a.D + d] = 0;
  }
  for (int64_t t = t0; t < t1; ++t) {
    const T* dy = static_cast<const T*>(a.dy) + b * a.dy_stride[0] + t * a.dy_stride[1];
    const T* x = static_cast<const T*>(a.x) + b * a.x_stride[0] + t * a.x_stride[1];
    const int64_t row = b * a.T + t;
    A mean = 0, rstd;
    if (a.rstd != nullptr) {
      if (a.centered) mean = static_cast<const A*>(a.mean)[row];
      rstd = static_cast<const A*>(a.rstd)[row];
    } else {
      statistics<A>(
          a.D, a.centered, static_cast<A>(a.eps),
          [&](int64_t i) { return static_cast<A>(widen(x[i])); }, mean, rstd);
    }
    A mean_h = 0, mean_hx = 0;
    if (a.dx != nullptr) {
      for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) {
        A h = widen(dy[d]) * weight_at<T>(a.weight, a.weight_dtype, d);
        mean_h += h, mean_hx += h * ((widen(x[d]) - mean) * rstd);
      }
      add_in_cta(mean_h, mean_hx);
      mean_h = a.centered ? mean_h / static_cast<A>(a.D) : A{0};
      mean_hx /= static_cast<A>(a.D);
    }
    for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) {
      const A g = widen(dy[d]), xhat = (widen(x[d]) - mean) * rstd;
      if (sums != nullptr) sums[d] += g * xhat, sums[a.D + d] += g;
      if (a.dx != nullptr) {
        const A h = g * weight_at<T>(a.weight, a.weight_dtype, d);
        store_as(static_cast<T*>(a.dx) + row * a.D + d, rstd * (h - mean_h - xhat * mean_hx));
      }
    }
  }
  if (in_shared && mine != nullptr) {
    for (int64_t d = threadIdx.x; d < a.D; d += blockDim.x) {
      mine[d] = sums[d], mine[a.D + d] = sums[a.D + d];
    }
  }
}

// A CTA takes one (b, group) after another. sums: [dy xhat, dy][b][C]. Small channels go to warps,
// large ones to all.
template <class T>
__global__ void __launch_bounds__(kMostThreads, 2) group_norm(const GroupNorm a, Wide<T>* sums) {
  using A = Wide<T>;
  const int64_t channels = a.C / a.groups, n = channels * a.S;
  const bool by_warp = a.S < 1024;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t squares = a.B * a.C;  // from the sums of dy xhat to those of dy
  for (int64_t index = blockIdx.x; index < a.B * a.groups; index += gridDim.x) {
    const int64_t b = index / a.groups, group = index % a.groups;
    const int64_t first = (b * a.C + group * channels) * a.S;
    const T* dy = static_cast<const T*>(a.dy) + first;
    const T* x = static_cast<const T*>(a.x) + first;
    A* own = sums + b * a.C + group * channels;
    A mean, rstd;
    if (a.rstd != nullptr) {
      const int64_t at = a.constant ? group : b * a.groups + group;
      mean = static_cast<const A*>(a.mean)[at], rstd = static_cast<const A*>(a.rstd)[at];
    } else {
      statistics<A>(
          n, true, static_cast<A>(a.eps), [&](int64_t i) { return static_cast<A>(widen(x[i])); },
          mean, rstd);
    }
    for (int64_t c = by_warp ? warp : 0; c < channels; c += by_warp ? blockDim.x / 32 : 1) {
      A weight_sum = 0, bias_sum = 0;
      for (int64_t s = by_warp ? lane : threadIdx.x; s < a.S; s += by_warp ? 32 : blockDim.x) {
        const A g = widen(dy[c * a.S + s]);
        weight_sum += g * ((widen(x[c * a.S + s]) - mean) * rstd), bias_sum += g;
      }
      if (by_warp) {
        weight_sum = add_in_warp(weight_sum), bias_sum = add_in_warp(bias_sum);
      } else {
        add_in_cta(weight_sum, bias_sum);
      }
      if (by_warp ? lane == 0 : threadIdx.x == 0) own[c] = weight_sum, own[squares + c] = bias_sum;
    }
    if (a.dx == nullptr) continue;
    __syncthreads();  // the sums of all channels are there
    A mean_h = 0, mean_hx = 0;
    if (!a.constant) {
      for (int64_t c = threadIdx.x; c < channels; c += blockDim.x) {
        const A w = weight_at<T>(a.weight, a.weight_dtype, group * channels + c);
        mean_h += w * own[squares + c], mean_hx += w * own[c];
      }
      add_in_cta(mean_h, mean_hx);
      mean_h /= static_cast<A>(n), mean_hx /= static_cast<A>(n);
    }
    for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
      const A h = widen(dy[i]) * weight_at<T>(a.weight, a.weight_dtype, group * channels + i / a.S);
      const A xhat = (widen(x[i]) - mean) * rstd;
      store_as(static_cast<T*>(a.dx) + first + i, rstd * (h - mean_h - xhat * mean_hx));
    }
  }
}

// Adds `parts` partial sums of each of B examples, squares, and adds over the examples.
void add_examples(const void* partial, int64_t B, int64_t parts, int64_t C, int64_t b_stride,
                  int64_t part_stride, DType inputs, DType dtype, void* sum, void* sum_sq,
                  const Device& device) {
  if (sum == nullptr) return;
  const DType wide = inputs == DType::f64 ? DType::f64 : DType::f32;
  bias_moments({B, parts, C, wide, partial, {b_stride, part_stride, 1}, dtype, sum, sum_sq},
               device);
}

}  // namespace

void layer_norm_moments(const LayerNorm& a, const Device& device) {
  if (a.B == 0 || a.T == 0 || a.D == 0) {
    zero({a.dw, a.dw_sq, a.weight_dtype}, a.D, a.dtype, device.stream);
    zero({a.db, a.db_sq, a.weight_dtype}, a.D, a.dtype, device.stream);
    return;
  }
  // Enough CTAs to occupy the device, each with several rows.
  int64_t parts = ceil_div(int64_t{8} * device.multiprocessors, a.B);
  parts = parts > a.T ? a.T : parts;
  int threads = static_cast<int>(ceil_div(a.D, 128)) * 32;
  threads = threads > kMostThreads ? kMostThreads : threads;
  const bool affine = a.dw != nullptr || a.db != nullptr;
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    const int64_t row = 2 * a.D * static_cast<int64_t>(sizeof(Wide<T>));
    void* partial = affine ? device.allocate(device.ctx, a.B * parts * row) : nullptr;
    const bool in_shared = affine && row <= kMostShared - 1024;
    launch(layer_norm<T>, {a.B * parts, threads, in_shared ? row : 0}, device.stream, a, parts,
           static_cast<Wide<T>*>(partial), in_shared);
    const auto* sums = static_cast<const Wide<T>*>(partial);
    const int64_t b_stride = parts * 2 * a.D, part_stride = 2 * a.D;
    add_examples(sums, a.B, parts, a.D, b_stride, part_stride, a.dtype, a.weight_dtype, a.dw,
                 a.dw_sq, device);
    add_examples(sums + a.D, a.B, parts, a.D, b_stride, part_stride, a.dtype, a.weight_dtype, a.db,
                 a.db_sq, device);
  });
}

void group_norm_moments(const GroupNorm& a, const Device& device) {
  if (a.B == 0 || a.C == 0 || a.S == 0) {
    zero({a.dw, a.dw_sq, a.weight_dtype}, a.C, a.dtype, device.stream);
    zero({a.db, a.db_sq, a.weight_dtype}, a.C, a.dtype, device.stream);
    return;
  }
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    auto* sums = static_cast<Wide<T>*>(
        device.allocate(device.ctx, 2 * a.B * a.C * static_cast<int64_t>(sizeof(Wide<T>))));
    const int64_t most = int64_t{64} * device.multiprocessors;
    launch(group_norm<T>, {a.B * a.groups < most ? a.B * a.groups : most, kMostThreads},
           device.stream, a, sums);
    add_examples(sums, a.B, 1, a.C, a.C, 0, a.dtype, a.weight_dtype, a.dw, a.dw_sq, device);
    add_examples(sums + a.B * a.C, a.B, 1, a.C, a.C, 0, a.dtype, a.weight_dtype, a.db, a.db_sq,
                 device);
  });
}

}  // namespace perexample::cuda
