#include "cuda.h"
#include "tf32.h"

namespace perexample {
namespace {

Four linear_moments(const Tensor dy, const Tensor x, bool bias, std::optional<ScalarType> dtype) {
  constexpr const char* op = "linear_moments";
  STD_TORCH_CHECK(
      dy.dim() == 3 && x.dim() == 3 && dy.size(0) == x.size(0) && dy.size(1) == x.size(1), op,
      ": dy must be (B, T, O) and x (B, T, I)");
  cpu::Linear a{};
  a.B = dy.size(0), a.T = dy.size(1), a.O = dy.size(2), a.I = x.size(2);
  a.dtype = dtype_of(op, "dy", dy);
  STD_TORCH_CHECK(dtype_of(op, "x", x) == a.dtype, op, ": x must have the dtype of dy");
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  const Where where(dy);
  STD_TORCH_CHECK(Where(x) == where, op, ": x must be on the device of dy");
  Moments weight(true, {a.O, a.I}, a.grad_dtype, a.dtype, where);
  Moments column(bias, {a.O}, a.grad_dtype, a.dtype, where);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  copy_strides(dy, a.dy_stride);
  copy_strides(x, a.x_stride);
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  if (where.on_cuda()) {
    cuda::linear_moments(a, tf32_allowed(), OnCuda(where));
  } else {
    cpu::kernels().linear_moments(a, parallel());
  }
  return {weight.sum, weight.sum_sq, column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("linear_moments", TORCH_BOX(&linear_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("linear_moments", TORCH_BOX(&linear_moments));
}

}  // namespace
}  // namespace perexample
