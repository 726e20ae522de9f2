#include "cuda.h"

namespace perexample {
namespace {

Four conv_moments(const Tensor dy_in, const Tensor x, const Ints kernel_size, const Ints stride,
                  const Ints padding, const Ints dilation, int64_t groups, bool bias,
                  std::optional<ScalarType> dtype) {
  constexpr const char* op = "conv_moments";
  Tensor dy = dy_in;
  STD_TORCH_CHECK(dy.dim() >= 3 && dy.dim() <= 5 && x.dim() == dy.dim() && dy.size(0) == x.size(0),
                  op, ": dy must be (B, O, *out) and x (B, C, *in), 3 to 5 dimensions");
  size_t spatial = static_cast<size_t>(dy.dim() - 2), missing = 3 - spatial;
  for (const Ints* list : {&kernel_size, &stride, &padding, &dilation}) {
    STD_TORCH_CHECK(list->size() == spatial, op, ": one integer per spatial dimension needed");
  }
  cpu::Conv a{};
  a.B = dy.size(0), a.O = dy.size(1), a.C = x.size(1), a.groups = groups;
  STD_TORCH_CHECK(groups >= 1 && a.C % groups == 0 && a.O % groups == 0, op,
                  ": groups must divide C and O");
  auto dy_strides = dy.strides(), x_strides = x.strides();
  a.dy_stride[0] = dy_strides[0], a.dy_stride[1] = dy_strides[1];
  a.x_stride[0] = x_strides[0], a.x_stride[1] = x_strides[1];
  for (size_t d = 0; d < 3; ++d) {
    if (d < missing) {
      a.in[d] = a.out[d] = a.kernel[d] = a.stride[d] = a.dilation[d] = 1;
      continue;
    }
    size_t s = d - missing;
    a.in[d] = x.size(static_cast<int64_t>(s) + 2);
    a.out[d] = dy.size(static_cast<int64_t>(s) + 2);
    a.kernel[d] = kernel_size[s], a.stride[d] = stride[s];
    a.padding[d] = padding[s], a.dilation[d] = dilation[s];
    a.x_stride[d + 2] = x_strides[s + 2], a.dy_stride[d + 2] = dy_strides[s + 2];
    STD_TORCH_CHECK(a.kernel[d] >= 1 && a.stride[d] >= 1 && a.padding[d] >= 0 && a.dilation[d] >= 1,
                    op, ": kernel_size, stride and dilation must be >= 1, padding >= 0");
    int64_t reach = a.in[d] + 2 * a.padding[d] - a.dilation[d] * (a.kernel[d] - 1) - 1;
    int64_t expected = reach < 0 ? 0 : reach / a.stride[d] + 1;
    STD_TORCH_CHECK(a.out[d] == expected, op, ": spatial dimension ", s, " of dy must be ",
                    expected, ", got ", a.out[d]);
  }
  a.dtype = dtype_of(op, "dy", dy);
  STD_TORCH_CHECK(dtype_of(op, "x", x) == a.dtype, op, ": x must have the dtype of dy");
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  Shape shape{a.O, a.C / groups};
  shape.insert(shape.end(), kernel_size.begin(), kernel_size.end());
  const Where where(dy);
  STD_TORCH_CHECK(Where(x) == where, op, ": x must be on the device of dy");
  Moments weight(true, shape, a.grad_dtype, a.dtype, where);
  Moments column(bias, {a.O}, a.grad_dtype, a.dtype, where);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  if (where.on_cuda()) {
    if (cuda::positions_stride(a) < 0) {
      dy = torch::stable::contiguous(dy);
      a.dy = dy.const_data_ptr(), a.dy_stride[0] = dy.stride(0), a.dy_stride[1] = dy.stride(1);
      for (size_t d = missing; d < 3; ++d) {
        a.dy_stride[d + 2] = dy.stride(static_cast<int64_t>(d - missing) + 2);
      }
    }
    cuda::conv_moments(a, OnCuda(where));
  } else {
    cpu::kernels().conv_moments(a, parallel());
  }
  return {weight.sum, weight.sum_sq, column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("conv_moments", TORCH_BOX(&conv_moments)); }
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("conv_moments", TORCH_BOX(&conv_moments));
}

}  // namespace
}  // namespace perexample
