// conv_moments: MATHS (5), which is (3) with x unfolded on the fly.
//
// 1×1 convolutions whose positions lie evenly are linear layers, Hopper kernel included. Others go
// to the portable kernel, whose loads find x by themselves: 16 bytes at a time where channels are
// dense (channels_last, a multiple of 8 of them in 16 bits), else element by element, in the order
// of the memory; nothing is copied. Convolutions of few channels a group (depthwise) are sums over
// positions without tensor cores.
#include "linear.cuh"

namespace perexample::cuda {
namespace {

// x as a matrix of positions and columns, for the loads of the portable kernel. A column is a tap
// of the kernel and a channel of the group, channels first to change.
struct Unfolded {
  const char* data;
  int64_t group_stride, b_stride, c_stride, s_stride[3];  // in bytes
  int64_t in[3];
  int32_t stride[3], padding[3], dilation[3];
  Divisor out[2], kernel[2];  // the last two dimensions
  Divisor channels;           // of a group
  int64_t columns;
  int32_t taps;
  bool along_positions;

  PX_DEVICE const char* at(int64_t group, int64_t b, int64_t t, int64_t column) const {
    uint32_t tap, channel, xs, ys, zs, kx, ky, kz;
    channels.divide(static_cast<uint32_t>(column), tap, channel);
    out[1].divide(static_cast<uint32_t>(t), ys, xs), out[0].divide(ys, zs, ys);
    kernel[1].divide(tap, ky, kx), kernel[0].divide(ky, kz, ky);
    const int64_t x = int64_t{xs} * stride[2] - padding[2] + int64_t{kx} * dilation[2];
    const int64_t y = int64_t{ys} * stride[1] - padding[1] + int64_t{ky} * dilation[1];
    const int64_t z = int64_t{zs} * stride[0] - padding[0] + int64_t{kz} * dilation[0];
    if (x < 0 || x >= in[2] || y < 0 || y >= in[1] || z < 0 || z >= in[0]) return nullptr;
    return data + group * group_stride + b * b_stride + channel * c_stride + z * s_stride[0] +
           y * s_stride[1] + x * s_stride[2];
  }
  PX_DEVICE int vector_bytes(int64_t column, int) const { return column < columns ? 16 : 0; }
  PX_DEVICE int64_t result(int64_t column) const {
    uint32_t tap, channel;
    channels.divide(static_cast<uint32_t>(column), tap, channel);
    return int64_t{channel} * taps + tap;
  }
};

// Vectors must not reach over the channels of a tap.
bool vectors(const Unfolded& x, int64_t element) {
  bool aligned = x.c_stride == element && x.channels.divisor * element % 16 == 0 &&
                 reinterpret_cast<uintptr_t>(x.data) % 16 == 0;
  for (int64_t stride : {x.group_stride, x.b_stride, x.s_stride[0], x.s_stride[1], x.s_stride[2]}) {
    aligned = aligned && stride % 16 == 0;
  }
  return aligned;
}

constexpr int kThreads = 256;
constexpr int64_t kFewColumns = 64;  // of a group: below, tensor cores would mostly multiply zeros

// Partial sums of every element of the weight over ranges of positions: partial[b][chunk][element],
// elements in the order (input channel of the group, tap, output channel).
template <class T>
__global__ void __launch_bounds__(kThreads, 2)
    few_channels(const Strided dy, const Unfolded x, const int64_t outputs, const int64_t groups,
                 const int64_t positions, const int64_t chunks, Wide<T>* partial) {
  using A = Wide<T>;
  const int64_t elements = groups * outputs * x.columns;
  const int64_t across = (elements + kThreads - 1) / kThreads;
  const int64_t part = blockIdx.x / across, b = part / chunks, chunk = part % chunks;
  const int64_t e = blockIdx.x % across * kThreads + threadIdx.x;
  if (e >= elements) return;
  const int64_t o = e % (groups * outputs), column = e / (groups * outputs);
  const int64_t group = o / outputs;
  A sum = 0;
  const int64_t end = positions * (chunk + 1) / chunks;
  for (int64_t t = positions * chunk / chunks; t < end; ++t) {
    const char* source = x.at(group, b, t, column);
    if (source == nullptr) continue;
    sum += widen(*reinterpret_cast<const T*>(dy.at(group, b, t, o % outputs))) *
           widen(*reinterpret_cast<const T*>(source));
  }
  partial[part * elements + e] = sum;
}

// Element i of a weight of (outputs, columns) from sums in the order of `few_channels`.
template <class A>
__global__ void __launch_bounds__(kThreads)
    reorder(const A* sum, const A* sum_sq, const Unfolded x, const int64_t outputs,
            const int64_t elements, const Moments out) {
  const int64_t e = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (e < elements) {
    out.put(e % outputs * x.columns + x.result(e / outputs), sum[e], sum_sq[e]);
  }
}

template <class T>
void launch_few_channels(const Conv& a, const Strided& dy, const Unfolded& x, int64_t positions,
                         const Device& device) {
  using A = Wide<T>;
  constexpr int64_t kBytes = sizeof(A);
  const int64_t elements = a.O * x.columns, across = ceil_div(elements, kThreads);
  int64_t chunks = ceil_div(int64_t{16} * device.multiprocessors, across * a.B);
  int64_t most = ceil_div(positions, 64);
  chunks = chunks > most ? most : chunks;
  auto* partial =
      static_cast<A*>(device.allocate(device.ctx, (a.B * chunks + 2) * elements * kBytes));
  launch(few_channels<T>, {a.B * chunks * across, kThreads}, device.stream, dy, x, a.O / a.groups,
         a.groups, positions, chunks, partial);
  A *sum = partial + a.B * chunks * elements, *sum_sq = sum + elements;
  const DType wide = std::is_same_v<A, double> ? DType::f64 : DType::f32;
  bias_moments(
      {a.B, chunks, elements, wide, partial, {chunks * elements, elements, 1}, wide, sum, sum_sq},
      device);
  launch(reorder<A>, {across, kThreads}, device.stream, static_cast<const A*>(sum),
         static_cast<const A*>(sum_sq), x, a.O, elements, Moments{a.dw, a.dw_sq, a.grad_dtype});
}

}  // namespace

int64_t positions_stride(const Conv& a) {
  int64_t unit = -1, inside = 1;
  for (int d = 2; d >= 0; --d) {
    if (a.out[d] == 1) continue;
    if (unit < 0) unit = a.dy_stride[d + 2];
    if (a.dy_stride[d + 2] != unit * inside) return -1;
    inside *= a.out[d];
  }
  return unit < 0 ? 1 : unit;
}

void conv_moments(const Conv& a, const Device& device) {
  const int64_t element = bytes_of(a.dtype), positions = a.out[0] * a.out[1] * a.out[2];
  const int64_t taps = a.kernel[0] * a.kernel[1] * a.kernel[2], channels = a.C / a.groups;
  const int64_t step = positions_stride(a);
  const Bias bias{a.B,          positions, a.O,
                  a.dtype,      a.dy,      {a.dy_stride[0], step, a.dy_stride[1]},
                  a.grad_dtype, a.db,      a.db_sq};
  const Matrix out{{a.dw, a.dw_sq, a.grad_dtype}, a.O / a.groups, channels * taps};
  if (a.B == 0 || positions == 0 || a.O == 0 || out.inputs == 0) {
    zero(out.moments, a.O * out.inputs, a.dtype, device.stream);
    if (a.db != nullptr) bias_moments(bias, device);
    return;
  }
  constexpr int64_t kMost = int64_t{1} << 31;
  bool fits = positions < kMost && out.inputs < kMost;
  for (int d = 0; d < 3; ++d) {
    fits = fits && a.stride[d] < kMost && a.padding[d] < kMost && a.dilation[d] < kMost;
  }
  if (!fits) {
    throw std::runtime_error(
        "perexample: too many positions, weights of a channel, or too large a stride, padding or "
        "dilation for one call");
  }
  // A linear layer in disguise: every position sees itself, and they lie evenly in x, too.
  bool linear = taps == 1 && a.groups == 1;
  int64_t x_step = -1, inside = 1;
  for (int d = 2; d >= 0; --d) {
    linear = linear && a.stride[d] == 1 && a.padding[d] == 0;
    if (a.out[d] == 1) continue;
    if (x_step < 0) x_step = a.x_stride[d + 2];
    linear = linear && a.x_stride[d + 2] == x_step * inside;
    inside *= a.out[d];
  }
  if (linear) {
    return linear_moments({a.B,
                           positions,
                           a.O,
                           a.C,
                           a.dtype,
                           a.dy,
                           {a.dy_stride[0], step, a.dy_stride[1]},
                           a.x,
                           {a.x_stride[0], x_step < 0 ? 1 : x_step, a.x_stride[1]},
                           a.grad_dtype,
                           a.dw,
                           a.dw_sq,
                           a.db,
                           a.db_sq},
                          false, device);
  }
  const Strided dy{static_cast<const char*>(a.dy),  a.O / a.groups * a.dy_stride[1] * element,
                   a.dy_stride[0] * element,        step * element,
                   a.dy_stride[1] * element,        a.O / a.groups,
                   step == 1 && a.dy_stride[1] != 1};
  Unfolded x{};
  x.data = static_cast<const char*>(a.x);
  x.group_stride = channels * a.x_stride[1] * element, x.b_stride = a.x_stride[0] * element;
  x.c_stride = a.x_stride[1] * element;
  for (int d = 0; d < 3; ++d) {
    x.s_stride[d] = a.x_stride[d + 2] * element, x.in[d] = a.in[d];
    x.stride[d] = static_cast<int32_t>(a.stride[d]);
    x.padding[d] = static_cast<int32_t>(a.padding[d]);
    x.dilation[d] = static_cast<int32_t>(a.dilation[d]);
  }
  for (int d = 0; d < 2; ++d)
    x.out[d] = Divisor(a.out[d + 1]), x.kernel[d] = Divisor(a.kernel[d + 1]);
  x.columns = out.inputs, x.channels = Divisor(channels);
  x.taps = static_cast<int32_t>(taps);
  x.along_positions = a.x_stride[1] != 1;
  if (a.groups > 1 && out.inputs < kFewColumns && out.outputs <= 8) {
    with_type(a.dtype,
              [&](auto type) { launch_few_channels<decltype(type)>(a, dy, x, positions, device); });
  } else {
    launch_portable(dy, x, a.dtype, false, a.groups, a.B, positions, out, {}, device);
  }
  if (a.db != nullptr) bias_moments(bias, device);
}

}  // namespace perexample::cuda
