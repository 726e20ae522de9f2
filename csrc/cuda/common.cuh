// What kernels of several ops share: dtypes, operands of any layout, outputs, partial sums.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "plan.h"
#include "ptx.cuh"

namespace perexample::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The type in which numbers of type T are added up.
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;

// Host: calls f with a value of the C++ type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float{});
    case DType::f64:
      return f(double{});
    case DType::bf16:
      return f(bf16{});
    case DType::f16:
      return f(f16{});
  }
}

inline int64_t bytes_of(DType dtype) {
  return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
}

// Device: element `index` of an array whose dtype is known at run time only.
template <class A>
PX_DEVICE void store(void* data, DType dtype, int64_t index, A value) {
  if (dtype == DType::f32) {
    static_cast<float*>(data)[index] = static_cast<float>(value);
  } else if (dtype == DType::f64) {
    static_cast<double*>(data)[index] = static_cast<double>(value);
  } else if (dtype == DType::bf16) {
    static_cast<bf16*>(data)[index] = to_bf16(static_cast<float>(value));
  } else {
    static_cast<f16*>(data)[index] = to_f16(static_cast<float>(value));
  }
}

// Divides numbers below 2^31 by a number from 1 on that the host knows: one multiplication.
struct Divisor {
  uint32_t divisor, factor, shift;

  Divisor() = default;
  explicit Divisor(int64_t d) : divisor(static_cast<uint32_t>(d)), factor(0), shift(0) {
    while (int64_t{1} << shift < d) ++shift;
    // 2^(31 + shift) / d, rounded up: too large by less than 2^shift / 2^31 of itself. Below 2^32,
    // for d > 2^(shift - 1).
    factor = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + divisor - 1) / divisor);
  }
  PX_DEVICE void divide(uint32_t n, uint32_t& quotient, uint32_t& remainder) const {
    quotient = static_cast<uint32_t>(static_cast<uint64_t>(n) * factor >> (31 + shift));
    remainder = n - quotient * divisor;
  }
};

// The sum over a warp, to all of its threads.
template <class A>
PX_DEVICE A add_in_warp(A x) {
#pragma unroll
  for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
  return x;
}

// A gradient and its second moment; null where not wanted.
struct Moments {
  void* sum;
  void* sum_sq;  // Wide
  DType sum_dtype;

  template <class A>
  PX_DEVICE void put(int64_t index, A g, A s) const {
    store(sum, sum_dtype, index, g);
    static_cast<A*>(sum_sq)[index] = s;
  }
  // The same without a branch.
  PX_DEVICE void put_if(bool wanted, int64_t index, float g, float s) const {
    const bool f32 = sum_dtype == DType::f32, f64 = sum_dtype == DType::f64;
    const uint16_t half = sum_dtype == DType::bf16 ? to_bf16(g).bits : to_f16(g).bits;
    store_if(wanted && f32, static_cast<float*>(sum) + index, g);
    store_if(wanted && f64, static_cast<double*>(sum) + index, static_cast<double>(g));
    store_if(wanted && !f32 && !f64, static_cast<uint16_t*>(sum) + index, half);
    store_if(wanted, static_cast<float*>(sum_sq) + index, s);
  }
};

inline void zero(const Moments& m, int64_t count, DType inputs, void* stream) {
  fill_zero(m.sum, count * bytes_of(m.sum_dtype), stream);
  fill_zero(m.sum_sq, count * (inputs == DType::f64 ? 8 : 4), stream);
}

// Element (group, b, t, c) of an operand of any strides.
struct Strided {
  const char* data;
  int64_t group_stride, b_stride, t_stride, c_stride;  // in bytes
  int64_t columns;
  bool along_positions;  // neighbours in memory are neighbours in t, not in c

  PX_DEVICE const char* at(int64_t group, int64_t b, int64_t t, int64_t c) const {
    return data + group * group_stride + b * b_stride + t * t_stride + c * c_stride;
  }
  // How many of the 16 bytes from column c on belong to the row.
  PX_DEVICE int vector_bytes(int64_t c, int element) const {
    int64_t bytes = (columns - c) * element;
    return bytes < 0 ? 0 : bytes > 16 ? 16 : static_cast<int>(bytes);
  }
  // Where column c stands in a row of the result.
  PX_DEVICE int64_t result(int64_t c) const { return c; }
};

// Whether rows of the operand can be read 16 bytes at a time.
inline bool vectors(const Strided& s, int64_t element) {
  auto aligned = [](int64_t bytes) { return bytes % 16 == 0; };
  return s.c_stride == element && aligned(s.t_stride) && aligned(s.b_stride) &&
         aligned(s.group_stride) &&
         aligned(static_cast<int64_t>(reinterpret_cast<uintptr_t>(s.data)));
}

// The (outputs, inputs) matrices of all groups, one below the other.
struct Matrix {
  Moments moments;
  int64_t outputs, inputs;  // of one group

  // Columns c and c + 1 of a row, where they exist. `paired`: see below. Without branches: the
  // kernels do this for every register, and compilers take minutes over hundreds of branches.
  template <bool kPaired, class X>
  PX_DEVICE void put_pair(const X& x, int64_t group, int64_t row, int64_t c, const float* g,
                          const float* s) const {
    const bool exists = row < outputs && c < inputs;
    const int64_t first = (group * outputs + row) * inputs;
    if constexpr (kPaired) {
      store_if(exists, static_cast<float*>(moments.sum) + first + c, g[0], g[1]);
      store_if(exists, static_cast<float*>(moments.sum_sq) + first + c, s[0], s[1]);
    } else {
      moments.put_if(exists, first + x.result(c), g[0], s[0]);
      moments.put_if(exists && c + 1 < inputs, first + x.result(c + 1), g[1], s[1]);
    }
  }
  // Whether neighbours in a row can be written as one vector of float32.
  template <class X>
  PX_DEVICE bool paired() const {
    return std::is_same_v<X, Strided> && moments.sum_dtype == DType::f32 && inputs % 2 == 0;
  }

  // kCount registers of a thread, from `first_register` on, of the tile that begins at (row,
  // column).
  template <class Layout, int kCount, class X>
  PX_DEVICE void put(const X& x, int64_t group, int64_t row, int64_t column, int thread,
                     int first_register, const float* g, const float* s) const {
    auto put_all = [&](auto paired) {
#pragma unroll
      for (int r = 0; r < kCount; r += 2) {
        int r_row, r_column;
        Layout::position(thread, first_register + r, r_row, r_column);
        put_pair<decltype(paired)::value>(x, group, row + r_row, column + r_column, g + r, s + r);
      }
    };
    if (paired<X>()) {
      put_all(std::true_type{});
    } else {
      put_all(std::false_type{});
    }
  }
};

// ---- Partial sums -------------------------------------------------------------------------------
// A slot holds the sums g of a tile, then the sums of squares s, each as float4s in the order
// [register / 4][thread]: what one thread holds goes out and comes back in coalesced vectors.
// Layout: kThreads, kRegisters (of g, a thread), and position(thread, register, row, column).

template <class Layout>
PX_HOST_DEVICE constexpr int64_t slot_vectors() {
  return int64_t{Layout::kThreads} * Layout::kRegisters / 2;
}

template <class Layout>
PX_DEVICE void write_slot(float4* slot, int thread, const float* g, const float* s,
                          bool with_squares) {
#pragma unroll
  for (int r = 0; r < Layout::kRegisters; r += 4) {
    slot[r / 4 * Layout::kThreads + thread] = make_float4(g[r], g[r + 1], g[r + 2], g[r + 3]);
  }
  if (!with_squares) return;
  slot += slot_vectors<Layout>() / 2;
#pragma unroll
  for (int r = 0; r < Layout::kRegisters; r += 4) {
    slot[r / 4 * Layout::kThreads + thread] = make_float4(s[r], s[r + 1], s[r + 2], s[r + 3]);
  }
}

constexpr int kAddThreads = 256;

// Adds the slots of every cut tile: over parts, and where examples are cut first over the chunks of
// one example, whose sum is then squared.
template <class Layout, class X>
__global__ void __launch_bounds__(kAddThreads, 4)
    add_slots(const float4* workspace, const Plan plan, const Matrix out, const X x) {
  constexpr int64_t kHalf = slot_vectors<Layout>() / 2;
  constexpr int64_t kCtas = (kHalf + kAddThreads - 1) / kAddThreads;  // of a tile
  int64_t cut = blockIdx.x / kCtas;
  int64_t vector = blockIdx.x % kCtas * kAddThreads + threadIdx.x;
  if (vector >= kHalf) return;
  int64_t per_tile = plan.parts * plan.chunks;
  const float4* slot = workspace + cut * per_tile * 2 * kHalf + vector;
  float g[4] = {}, s[4] = {};
  for (int64_t part = 0; part < plan.parts; ++part) {
    float4 sum = *slot;
    if (plan.chunks == 1) {
      float4 squares = slot[kHalf];
      s[0] += squares.x, s[1] += squares.y, s[2] += squares.z, s[3] += squares.w;
    }
    slot += 2 * kHalf;
    for (int64_t chunk = 1; chunk < plan.chunks; ++chunk, slot += 2 * kHalf) {
      float4 more = *slot;
      sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    g[0] += sum.x, g[1] += sum.y, g[2] += sum.z, g[3] += sum.w;
    if (plan.chunks > 1) {
      s[0] += sum.x * sum.x, s[1] += sum.y * sum.y, s[2] += sum.z * sum.z, s[3] += sum.w * sum.w;
    }
  }
  Job j = job(plan, plan.whole + cut * per_tile);
  int thread = static_cast<int>(vector % Layout::kThreads);
  int first = static_cast<int>(vector / Layout::kThreads) * 4;
  out.put<Layout, 4>(x, j.group, j.row * Layout::kRows, j.column * Layout::kColumns, thread, first,
                     g, s);
}

// Where the slots of the bias begin: behind the others, g and then s of a tile's rows, of all jobs.
template <class Layout>
PX_DEVICE float* bias_slots(float4* workspace, const Plan& plan) {
  return reinterpret_cast<float*>(workspace + plan.slots() * slot_vectors<Layout>());
}

// What a job has of the bias of its tile's row number `in_tile`.
template <int kRows, class A>
PX_DEVICE void put_bias(const Job& j, int in_tile, A g, A s, A* slots, int64_t outputs,
                        const Moments& bias) {
  const int64_t row = j.row * kRows + in_tile;
  if (j.slot >= 0) {
    A* slot = slots + j.slot * 2 * kRows + in_tile;
    slot[0] = g, slot[kRows] = s;
  } else if (row < outputs) {
    bias.put(j.group * outputs + row, g, s);
  }
}

// Adds the bias' slots of the tiles of column 0, like `add_slots`.
template <int kRows, class A>
__global__ void __launch_bounds__(kRows)
    add_bias_slots(const A* slots, const Plan plan, const int64_t outputs, const Moments bias) {
  const int64_t per_tile = plan.parts * plan.chunks;
  const Job j = job(plan, plan.whole + blockIdx.x * per_tile);
  const int64_t row = j.row * kRows + threadIdx.x;
  if (j.column != 0 || row >= outputs) return;
  const A* slot = slots + blockIdx.x * per_tile * 2 * kRows + threadIdx.x;
  A g = 0, s = 0;
  for (int64_t part = 0; part < plan.parts; ++part) {
    A G = 0;
    for (int64_t chunk = 0; chunk < plan.chunks; ++chunk, slot += 2 * kRows) {
      G += slot[0];
      if (plan.chunks == 1) s += slot[kRows];
    }
    g += G;
    if (plan.chunks > 1) s += G * G;
  }
  bias.put(j.group * outputs + row, g, s);
}

template <int kRows, class A>
void launch_add_bias_slots(const A* slots, const Plan& plan, int64_t outputs, const Moments& bias,
                           const Device& device) {
  launch(add_bias_slots<kRows, A>, {plan.tiles() - plan.whole, kRows}, device.stream, slots, plan,
         outputs, bias);
}

// Device memory for the slots, of the bias too where it is wanted; null where there are none.
template <class Layout>
void* allocate_slots(const Plan& plan, const Moments& bias, const Device& device) {
  if (plan.slots() == 0) return nullptr;
  const int64_t bytes = slot_vectors<Layout>() * 16 + (bias.sum != nullptr ? 8 * Layout::kRows : 0);
  return device.allocate(device.ctx, plan.slots() * bytes);
}

template <class Layout, class X>
void launch_add_slots(const void* workspace, const Plan& plan, const Matrix& out, const X& x,
                      const Moments& bias, const Device& device) {
  int64_t cut = plan.tiles() - plan.whole;
  int64_t ctas = cut * ceil_div(slot_vectors<Layout>() / 2, kAddThreads);
  launch(add_slots<Layout, X>, {ctas, kAddThreads}, device.stream,
         static_cast<const float4*>(workspace), plan, out, x);
  if constexpr (std::is_same_v<X, Strided>) {
    if (bias.sum == nullptr) return;
    const float* slots =
        static_cast<const float*>(workspace) + plan.slots() * slot_vectors<Layout>() * 4;
    launch_add_bias_slots<Layout::kRows>(slots, plan, out.outputs, bias, device);
  }
}

}  // namespace perexample::cuda
