#include "common.h"

namespace perexample {
namespace {

// Both norms differ only in what the three dimensions mean: `channels` is the size of the weight,
// `statistics` the number of means per example, and `set_sizes` fills in the kernel's sizes.
template <class Norm, class SetSizes>
Five norm_moments(const char* op, const Tensor& dy_in, const Tensor& x_in, const Optional& mean_in,
                  const Optional& rstd_in, const Optional& weight_in, double eps,
                  const std::vector<bool>& wanted, int64_t channels, int64_t statistics,
                  void (*kernel)(const Norm&, const cpu::Parallel&), SetSizes set_sizes) {
  Shape shape = shape_of(dy_in);
  STD_TORCH_CHECK(shape_of(x_in) == shape, op, ": x must have the shape of dy");
  STD_TORCH_CHECK(wanted.size() == 3, op, ": output_mask must have 3 elements");
  STD_TORCH_CHECK(mean_in.has_value() == rstd_in.has_value(), op,
                  ": mean and rstd must be given both or neither");
  Norm a{};
  set_sizes(a);
  a.eps = eps;
  a.dtype = dtype_of(op, "dy", dy_in);
  STD_TORCH_CHECK(dtype_of(op, "x", x_in) == a.dtype, op, ": x must have the dtype of dy");
  for (const Optional* s : {&mean_in, &rstd_in}) {
    STD_TORCH_CHECK(!*s || (shape_of(**s) == Shape{shape[0], statistics} &&
                            dtype_of(op, "mean", **s) == accumulate_dtype(a.dtype)),
                    op, ": mean and rstd must be float32 (float64 for float64) of (", shape[0],
                    ", ", statistics, ")");
  }
  STD_TORCH_CHECK(!weight_in || shape_of(*weight_in) == Shape{channels}, op, ": weight must be (",
                  channels, ",)");
  a.weight_dtype = weight_in ? dtype_of(op, "weight", *weight_in) : a.dtype;

  Tensor dy = torch::stable::contiguous(dy_in), x = torch::stable::contiguous(x_in);
  Optional mean = contiguous(mean_in), rstd = contiguous(rstd_in), weight = contiguous(weight_in);
  Tensor dx = empty(wanted[0] ? shape : Shape{0}, a.dtype);
  Moments scale(wanted[1], {channels}, a.weight_dtype, a.dtype);
  Moments shift(wanted[2], {channels}, a.weight_dtype, a.dtype);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  a.mean = data_or_null(mean), a.rstd = data_or_null(rstd), a.weight = data_or_null(weight);
  a.dx = dx.mutable_data_ptr();
  a.dw = scale.sum_data(), a.dw_sq = scale.sum_sq_data();
  a.db = shift.sum_data(), a.db_sq = shift.sum_sq_data();
  kernel(a, parallel());
  return {dx, scale.sum, scale.sum_sq, shift.sum, shift.sum_sq};
}

Five layer_norm_moments(const Tensor dy, const Tensor x, const Optional mean, const Optional rstd,
                        const Optional weight, double eps, const std::vector<bool> output_mask) {
  constexpr const char* op = "layer_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, T, D)");
  auto set_sizes = [&](cpu::LayerNorm& a) { a.B = dy.size(0), a.T = dy.size(1), a.D = dy.size(2); };
  return norm_moments<cpu::LayerNorm>(op, dy, x, mean, rstd, weight, eps, output_mask, dy.size(2),
                                      dy.size(1), cpu::kernels().layer_norm_moments, set_sizes);
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("layer_norm_moments", TORCH_BOX(&layer_norm_moments));
}

Five group_norm_moments(const Tensor dy, const Tensor x, const Optional mean, const Optional rstd,
                        const Optional weight, int64_t groups, double eps,
                        const std::vector<bool> output_mask) {
  constexpr const char* op = "group_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, C, S)");
  STD_TORCH_CHECK(groups >= 1 && dy.size(1) % groups == 0, op, ": groups must divide C");
  auto set_sizes = [&](cpu::GroupNorm& a) {
    a.B = dy.size(0), a.C = dy.size(1), a.S = dy.size(2), a.groups = groups;
  };
  return norm_moments<cpu::GroupNorm>(op, dy, x, mean, rstd, weight, eps, output_mask, dy.size(1),
                                      groups, cpu::kernels().group_norm_moments, set_sizes);
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("group_norm_moments", TORCH_BOX(&group_norm_moments));
}

}  // namespace
}  // namespace perexample
