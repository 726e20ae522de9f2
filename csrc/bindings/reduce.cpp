#include "cuda.h"

namespace perexample {
namespace {

Two bias_moments(const Tensor dy, std::optional<ScalarType> dtype) {
  constexpr const char* op = "bias_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, T, O)");
  cpu::Bias a{};
  a.B = dy.size(0), a.T = dy.size(1), a.O = dy.size(2);
  a.dtype = dtype_of(op, "dy", dy);
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  const Where where(dy);
  Moments column(true, {a.O}, a.grad_dtype, a.dtype, where);
  a.dy = dy.const_data_ptr();
  copy_strides(dy, a.dy_stride);
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  if (where.on_cuda()) {
    cuda::bias_moments(a, OnCuda(where));
  } else {
    cpu::kernels().bias_moments(a, parallel());
  }
  return {column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("bias_moments", TORCH_BOX(&bias_moments)); }
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("bias_moments", TORCH_BOX(&bias_moments));
}

// The one stride that walks all dimensions but the first in row-major order, if there is one.
std::optional<int64_t> inner_stride(const Tensor& tensor) {
  auto sizes = tensor.sizes(), strides = tensor.strides();
  std::optional<int64_t> unit;
  if (tensor.numel() == 0) return 1;
  int64_t inside = 1;  // elements of the dimensions seen so far
  for (int64_t d = tensor.dim() - 1; d >= 1; --d) {
    if (sizes[d] == 1) continue;
    if (!unit) unit = strides[d];
    if (strides[d] != *unit * inside) return std::nullopt;
    inside *= sizes[d];
  }
  return unit.value_or(1);
}

Two reduce_moments(const Tensor grad, std::optional<ScalarType> dtype) {
  constexpr const char* op = "reduce_moments";
  STD_TORCH_CHECK(grad.dim() >= 1, op, ": grad must be (B, *shape)");
  Tensor g = inner_stride(grad) ? grad : torch::stable::contiguous(grad);
  Shape shape = shape_of(g);
  cpu::Reduce a{};
  a.B = shape[0], a.N = 1;
  shape.erase(shape.begin());
  for (int64_t size : shape) a.N *= size;
  a.dtype = dtype_of(op, "grad", g);
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  const Where where(g);
  Moments moments(true, shape, a.grad_dtype, a.dtype, where);
  a.g = g.const_data_ptr();
  a.g_stride[0] = g.stride(0), a.g_stride[1] = *inner_stride(g);
  a.sum = moments.sum_data(), a.sum_sq = moments.sum_sq_data();
  if (where.on_cuda()) {
    cuda::reduce_moments(a, OnCuda(where));
  } else {
    cpu::kernels().reduce_moments(a, parallel());
  }
  return {moments.sum, moments.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("reduce_moments", TORCH_BOX(&reduce_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("reduce_moments", TORCH_BOX(&reduce_moments));
}

}  // namespace
}  // namespace perexample
