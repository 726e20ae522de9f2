#include <type_traits>

#include "cuda.h"

namespace perexample {
namespace {

// What the norms take and are asked for; `statistics` is the shape of mean and rstd, `channels` the
// size of the weight.
struct Arguments {
  const char* op;
  const Tensor &dy, &x;
  const Optional &mean, &rstd, &weight;
  const std::vector<bool>& wanted;  // dx, weight, and bias where there is one
  Shape statistics;
  int64_t channels;
};

// The kernel of LayerNorm and RMSNorm takes rows wherever they lie.
Tensor with_contiguous_rows(const Tensor& tensor) {
  bool contiguous = tensor.size(2) <= 1 || tensor.stride(2) == 1;
  return contiguous ? tensor : torch::stable::contiguous(tensor);
}

// All norms differ only in what the three dimensions mean; `a` comes with its sizes.
template <class Norm>
Five norm_moments(Norm a, const Arguments& arguments,
                  void (*kernel)(const Norm&, const cpu::Parallel&),
                  void (*cuda_kernel)(const Norm&, const cuda::Device&)) {
  constexpr bool rows = std::is_same_v<Norm, cpu::LayerNorm>;
  const auto& [op, dy_in, x_in, mean_in, rstd_in, weight_in, wanted, statistics, channels] =
      arguments;
  Shape shape = shape_of(dy_in);
  STD_TORCH_CHECK(shape_of(x_in) == shape, op, ": x must have the shape of dy");
  a.dtype = dtype_of(op, "dy", dy_in);
  STD_TORCH_CHECK(dtype_of(op, "x", x_in) == a.dtype, op, ": x must have the dtype of dy");
  for (const Optional* s : {&mean_in, &rstd_in}) {
    STD_TORCH_CHECK(!*s || (shape_of(**s) == statistics &&
                            dtype_of(op, "mean", **s) == accumulate_dtype(a.dtype)),
                    op, ": mean and rstd must be float32 (float64 for float64), one for each set ",
                    "of values that is normalized together");
  }
  STD_TORCH_CHECK(!weight_in || shape_of(*weight_in) == Shape{channels}, op, ": weight must be (",
                  channels, ",)");
  a.weight_dtype = weight_in ? dtype_of(op, "weight", *weight_in) : a.dtype;

  Tensor dy = rows ? with_contiguous_rows(dy_in) : contiguous_tensor(dy_in);
  Tensor x = rows ? with_contiguous_rows(x_in) : contiguous_tensor(x_in);
  Optional mean = contiguous(mean_in), rstd = contiguous(rstd_in), weight = contiguous(weight_in);
  if constexpr (rows) {
    a.dy_stride[0] = dy.stride(0), a.dy_stride[1] = dy.stride(1);
    a.x_stride[0] = x.stride(0), a.x_stride[1] = x.stride(1);
  }
  const Where where(dy);
  for (const Optional* t : {&mean, &rstd, &weight}) {
    STD_TORCH_CHECK(!*t || Where(**t) == where, op, ": all tensors must be on one device");
  }
  STD_TORCH_CHECK(Where(x) == where, op, ": x must be on the device of dy");
  Tensor dx = empty(wanted[0] ? shape : Shape{0}, a.dtype, where);
  Moments scale(wanted[1], {channels}, a.weight_dtype, a.dtype, where);
  Moments shift(wanted.size() > 2 && wanted[2], {channels}, a.weight_dtype, a.dtype, where);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  a.mean = data_or_null(mean), a.rstd = data_or_null(rstd), a.weight = data_or_null(weight);
  a.dx = dx.mutable_data_ptr();
  a.dw = scale.sum_data(), a.dw_sq = scale.sum_sq_data();
  a.db = shift.sum_data(), a.db_sq = shift.sum_sq_data();
  // Without elements the pointers may be anything; the launchers know what is wanted by null.
  auto null_unless = [](bool is_wanted, void*& data) { data = is_wanted ? data : nullptr; };
  null_unless(wanted[0], a.dx);
  for (void** data : {&a.dw, &a.dw_sq}) null_unless(wanted[1], *data);
  for (void** data : {&a.db, &a.db_sq}) null_unless(wanted.size() > 2 && wanted[2], *data);
  if (where.on_cuda()) {
    cuda_kernel(a, OnCuda(where));
  } else {
    kernel(a, parallel());
  }
  return {dx, scale.sum, scale.sum_sq, shift.sum, shift.sum_sq};
}

void check_mask(const char* op, const std::vector<bool>& mask, size_t size) {
  STD_TORCH_CHECK(mask.size() == size, op, ": output_mask must have ", size, " elements");
}

void check_both(const char* op, const Optional& mean, const Optional& rstd) {
  STD_TORCH_CHECK(mean.has_value() == rstd.has_value(), op,
                  ": mean and rstd must be given both or neither");
}

Five layer_norm_moments(const Tensor dy, const Tensor x, const Optional mean, const Optional rstd,
                        const Optional weight, double eps, const std::vector<bool> output_mask) {
  constexpr const char* op = "layer_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, T, D)");
  check_mask(op, output_mask, 3);
  check_both(op, mean, rstd);
  cpu::LayerNorm a{};
  a.B = dy.size(0), a.T = dy.size(1), a.D = dy.size(2), a.eps = eps, a.centered = true;
  return norm_moments(a, {op, dy, x, mean, rstd, weight, output_mask, {a.B, a.T}, a.D},
                      cpu::kernels().layer_norm_moments, cuda::layer_norm_moments);
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("layer_norm_moments", TORCH_BOX(&layer_norm_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("layer_norm_moments", TORCH_BOX(&layer_norm_moments));
}

Three rms_norm_moments(const Tensor dy, const Tensor x, const Optional rstd, const Optional weight,
                       double eps, const std::vector<bool> output_mask) {
  constexpr const char* op = "rms_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, T, D)");
  check_mask(op, output_mask, 2);
  cpu::LayerNorm a{};
  a.B = dy.size(0), a.T = dy.size(1), a.D = dy.size(2), a.eps = eps, a.centered = false;
  Five results =
      norm_moments(a, {op, dy, x, std::nullopt, rstd, weight, output_mask, {a.B, a.T}, a.D},
                   cpu::kernels().layer_norm_moments, cuda::layer_norm_moments);
  return {std::get<0>(results), std::get<1>(results), std::get<2>(results)};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("rms_norm_moments", TORCH_BOX(&rms_norm_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("rms_norm_moments", TORCH_BOX(&rms_norm_moments));
}

Five group_norm_moments(const Tensor dy, const Tensor x, const Optional mean, const Optional rstd,
                        const Optional weight, int64_t groups, double eps,
                        const std::vector<bool> output_mask) {
  constexpr const char* op = "group_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, C, S)");
  STD_TORCH_CHECK(groups >= 1 && dy.size(1) % groups == 0, op, ": groups must divide C");
  check_mask(op, output_mask, 3);
  check_both(op, mean, rstd);
  cpu::GroupNorm a{};
  a.B = dy.size(0), a.C = dy.size(1), a.S = dy.size(2), a.groups = groups, a.eps = eps;
  return norm_moments(a, {op, dy, x, mean, rstd, weight, output_mask, {a.B, groups}, a.C},
                      cpu::kernels().group_norm_moments, cuda::group_norm_moments);
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("group_norm_moments", TORCH_BOX(&group_norm_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("group_norm_moments", TORCH_BOX(&group_norm_moments));
}

Five batch_norm_moments(const Tensor dy, const Tensor x, const Tensor mean, const Tensor rstd,
                        const Optional weight, const std::vector<bool> output_mask) {
  constexpr const char* op = "batch_norm_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, C, S)");
  check_mask(op, output_mask, 3);
  cpu::GroupNorm a{};
  a.B = dy.size(0), a.C = a.groups = dy.size(1), a.S = dy.size(2), a.constant = true;
  return norm_moments(a, {op, dy, x, mean, rstd, weight, output_mask, {a.C}, a.C},
                      cpu::kernels().group_norm_moments, cuda::group_norm_moments);
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("batch_norm_moments", TORCH_BOX(&batch_norm_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("batch_norm_moments", TORCH_BOX(&batch_norm_moments));
}

}  // namespace
}  // namespace perexample
