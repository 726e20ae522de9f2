// linear_moments with the portable kernel alone, and few of its tiles: compiled for every mutant.
#include "few.h"
#include "linear.cuh"

namespace perexample::cuda {

void linear_moments(const Linear& a, bool, const Device& device) {
  const Matrix out{{a.dw, a.dw_sq, a.grad_dtype}, a.O, a.I};
  const Moments bias{a.db, a.db_sq, a.grad_dtype};
  const int64_t element = bytes_of(a.dtype);
  auto operand = [&](const void* data, const int64_t* stride, int64_t columns) {
    return Strided{static_cast<const char*>(data),
                   0,
                   stride[0] * element,
                   stride[1] * element,
                   element,
                   columns,
                   false};
  };
  Strided dy = operand(a.dy, a.dy_stride, a.O), x = operand(a.x, a.x_stride, a.I);
  if (a.dtype == DType::f32) {
    launch_mma<Tiles<Math::kTf32x3, true, false>::Small>(dy, x, 1, a.B, a.T, out, bias, device);
  } else if (a.T == 1) {
    dy.t_stride = dy.b_stride, x.t_stride = x.b_stride;
    launch_mma<Tiles<Math::kBf16, true, true>::Small>(dy, x, 1, 1, a.B, out, bias, device);
  } else {
    launch_mma<Tiles<Math::kBf16, true, false>::Large>(dy, x, 1, a.B, a.T, out, bias, device);
  }
}

}  // namespace perexample::cuda
