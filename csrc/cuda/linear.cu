// linear_moments: MATHS (3), (4).
#include "linear.cuh"
#include "linear_wgmma.h"

namespace perexample::cuda {
namespace {

Strided operand(const void* data, const int64_t* stride, int64_t columns, int64_t element) {
  return {static_cast<const char*>(data),
          0,
          stride[0] * element,
          stride[1] * element,
          stride[2] * element,
          columns,
          stride[1] == 1 && stride[2] != 1};
}

}  // namespace

void linear_moments(const Linear& a, bool tf32, const Device& device) {
  const Matrix out{{a.dw, a.dw_sq, a.grad_dtype}, a.O, a.I};
  const Moments bias{a.db, a.db_sq, a.grad_dtype};
  bool bias_added = false;
  const bool product = a.B > 0 && a.T > 0 && a.O > 0 && a.I > 0;
  if (product && takes_wgmma(a, device)) return linear_moments_wgmma(a, device);
  if (product) {
    const int64_t element = bytes_of(a.dtype);
    bias_added = launch_portable(operand(a.dy, a.dy_stride, a.O, element),
                                 operand(a.x, a.x_stride, a.I, element), a.dtype, tf32, 1, a.B, a.T,
                                 out, bias, device);
  } else {
    zero(out.moments, a.O * a.I, a.dtype, device.stream);
  }
  if (a.db != nullptr && !bias_added) {
    Bias b{a.B, a.T, a.O, a.dtype, a.dy, {}, a.grad_dtype, a.db, a.db_sq};
    for (int d = 0; d < 3; ++d) b.dy_stride[d] = a.dy_stride[d];
    bias_moments(b, device);
  }
}

}  // namespace perexample::cuda
