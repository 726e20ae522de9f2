// Launches the Hopper kernel of linear_moments.
#include "linear_wgmma.cuh"
#include "linear_wgmma.h"

// Whether this was compiled for sm_90a.
#ifndef PX_SM90A
#define PX_SM90A 1
#endif

namespace perexample::cuda {
namespace {

// TMA's strides: multiples of 16 bytes below 2^40. The stride of a dimension of one element means
// nothing.
bool takes(const void* data, const int64_t* stride, int64_t batch, int64_t positions) {
  constexpr int64_t kMost = int64_t{1} << 39;
  auto aligned = [](int64_t elements) {
    return elements > 0 && elements < kMost && elements % 8 == 0;
  };
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride[2] == 1 && aligned(stride[1]) &&
         aligned(batch == 1 ? positions * stride[1] : stride[0]);
}

}  // namespace

bool takes_wgmma(const Linear& a, const Device& device) {
  // Coordinates of TMA are 32 bits, and reach behind the last element by less than a tile.
  constexpr int64_t kMost = (int64_t{1} << 31) - 512;
  return PX_SM90A && device.capability == 90 && (a.dtype == DType::bf16 || a.dtype == DType::f16) &&
         a.T > 1 && a.B < kMost && a.T < kMost && a.O < kMost && a.I < kMost &&
         takes(a.dy, a.dy_stride, a.B, a.T) && takes(a.x, a.x_stride, a.B, a.T);
}

void linear_moments_wgmma(const Linear& arguments, const Device& device) {
  Linear a = arguments;
  if (a.B == 1) a.dy_stride[0] = a.T * a.dy_stride[1], a.x_stride[0] = a.T * a.x_stride[1];
  const Strided x{nullptr, 0, 0, 0, 0, a.I, false};  // TMA reads; this only says where results go
  const Matrix out{{a.dw, a.dw_sq, a.grad_dtype}, a.O, a.I};
  const Moments bias{a.db, a.db_sq, a.grad_dtype};
  auto choose = [&](auto f16, auto cluster) {
    constexpr bool kF16 = decltype(f16)::value;
    constexpr int kCluster = decltype(cluster)::value;
    if (a.T <= 16) {
      launch_wgmma<WgmmaTile<kF16, kCluster, 16>>(a, x, out, bias, device);
    } else if (a.T <= 32) {
      launch_wgmma<WgmmaTile<kF16, kCluster, 32>>(a, x, out, bias, device);
    } else {
      launch_wgmma<WgmmaTile<kF16, kCluster, 0>>(a, x, out, bias, device);
    }
  };
  auto dtype = [&](auto cluster) {
    if (a.dtype == DType::f16) {
      choose(std::true_type{}, cluster);
    } else {
      choose(std::false_type{}, cluster);
    }
  };
  // A pair of CTAs shares x, but covers 256 rows.
  if (a.O > 128) {
    dtype(std::integral_constant<int, 2>{});
  } else {
    dtype(std::integral_constant<int, 1>{});
  }
}

}  // namespace perexample::cuda
