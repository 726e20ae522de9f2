#include <array>

#include "cuda.h"

namespace perexample {
namespace {

// The B T indices in ascending order, and where each comes from; equal ones keep their order.
Two sorted(const Tensor& indices) {
  Tensor flat = torch::stable::reshape(indices, {indices.numel()});
  std::array<StableIValue, 4> stack{
      torch::stable::detail::from(flat), torch::stable::detail::from(std::optional<bool>(true)),
      torch::stable::detail::from(int64_t{0}), torch::stable::detail::from(false)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::sort", "stable", stack.data(), TORCH_ABI_VERSION));
  return {torch::stable::detail::to<Tensor>(stack[0]), torch::stable::detail::to<Tensor>(stack[1])};
}

Two embedding_moments(const Tensor dy, const Tensor indices, int64_t num_embeddings,
                      int64_t padding_idx, std::optional<ScalarType> dtype) {
  constexpr const char* op = "embedding_moments";
  STD_TORCH_CHECK(dy.dim() == 3 && indices.dim() == 2 && indices.size(0) == dy.size(0) &&
                      indices.size(1) == dy.size(1),
                  op, ": dy must be (B, T, D) and indices (B, T)");
  ScalarType index_type = indices.scalar_type();
  STD_TORCH_CHECK(index_type == ScalarType::Long || index_type == ScalarType::Int, op,
                  ": indices must be int32 or int64");
  STD_TORCH_CHECK(num_embeddings >= 0, op, ": num_embeddings must be >= 0");
  Tensor rows =
      index_type == ScalarType::Long ? indices : torch::stable::to(indices, ScalarType::Long);
  cpu::Embedding a{};
  a.B = dy.size(0), a.T = dy.size(1), a.D = dy.size(2), a.V = num_embeddings;
  a.padding_idx = std::max<int64_t>(padding_idx, -1);
  a.dtype = dtype_of(op, "dy", dy);
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  a.dy = dy.const_data_ptr();
  a.indices = static_cast<const int64_t*>(rows.const_data_ptr());
  copy_strides(dy, a.dy_stride);
  copy_strides(rows, a.index_stride);
  const Where where(dy);
  STD_TORCH_CHECK(Where(rows) == where, op, ": indices must be on the device of dy");
  if (!where.on_cuda()) {
    for (int64_t b = 0; b < a.B; ++b) {
      for (int64_t t = 0; t < a.T; ++t) {
        int64_t row = a.indices[b * a.index_stride[0] + t * a.index_stride[1]];
        STD_TORCH_CHECK(row >= 0 && row < a.V, op, ": index out of range: indices must be in [0, ",
                        a.V, "), got ", row);
      }
    }
  }
  Moments weight(true, {a.V, a.D}, a.grad_dtype, a.dtype, where);
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  if (where.on_cuda()) {
    auto [found, order] = sorted(rows);
    cuda::embedding_moments(a, static_cast<const int64_t*>(found.const_data_ptr()),
                            static_cast<const int64_t*>(order.const_data_ptr()), OnCuda(where));
  } else {
    cpu::kernels().embedding_moments(a, parallel());
  }
  return {weight.sum, weight.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("embedding_moments", TORCH_BOX(&embedding_moments));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("embedding_moments", TORCH_BOX(&embedding_moments));
}

}  // namespace
}  // namespace perexample
