// The ops of perexample on the CPU: tensors in, raw pointers to csrc/cpu, tensors out.
//
// The only file that knows torch, and only through the LibTorch stable ABI, so that one library
// serves every torch from TORCH_TARGET_VERSION on and every Python. Schemas, fake kernels and full
// validation are in pysrc/perexample/ops; the checks here keep a direct call of torch.ops from
// reading out of bounds. Each op is registered by itself, so that the dispatcher knows its line.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <algorithm>
#include <atomic>
#include <cfloat>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "cpu/kernels.h"

namespace perexample {
namespace {

using cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// ---- Threads ------------------------------------------------------------------------------------

// Workers take the next task as soon as they are free. An exception of a task leaves the parallel
// region by hand: torch's own propagation covers only some of its backends.
void run_tasks(int64_t tasks, void (*body)(void* ctx, int64_t task), void* ctx) {
  int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(ctx, task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(ctx, task);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

cpu::Parallel parallel() { return {torch::stable::get_num_threads(), run_tasks}; }

// ---- Dtypes, shapes, outputs --------------------------------------------------------------------

// torch's numbers of the four dtypes, in the order of DType.
int32_t code(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                  aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return codes[static_cast<int>(dtype)];
}

DType dtype_of(const char* op, const char* name, AtenTensorHandle tensor) {
  int32_t found;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &found));
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (found == code(dtype)) return dtype;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16");
}

DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  return dtype_of(op, name, tensor.get());
}

// The dtype that the caller wants for the gradient: that of the inputs by default.
DType gradient_dtype(const char* op, std::optional<ScalarType> wanted, DType inputs) {
  if (!wanted) return inputs;
  switch (*wanted) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float64, float32, bfloat16 or float16");
  }
}

// The dtype of second moments and of every accumulation.
DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

Shape shape_of(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  return strides;
}

Tensor empty_strided(const Shape& shape, const Shape& strides, int32_t dtype) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), dtype,
                                                  aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// Gradients and second moments of large parameters are new memory in every step, and what a write
// to new memory costs is the page faults: ask for huge pages, where the system grants them on
// request.
void want_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * huge)) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#endif
}

Tensor empty(const Shape& shape, DType dtype) {
  Tensor tensor = empty_strided(shape, contiguous_strides(shape), code(dtype));
  int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  for (int64_t size : shape) bytes *= size;
  want_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

// A gradient and its second moment; without elements, and null to the kernels, if not wanted.
struct Moments {
  Tensor sum, sum_sq;

  Moments(bool wanted, const Shape& shape, DType gradient, DType inputs)
      : sum(empty(wanted ? shape : Shape{0}, gradient)),
        sum_sq(empty(wanted ? shape : Shape{0}, accumulate_dtype(inputs))) {}
  void* sum_data() const { return sum.mutable_data_ptr(); }
  void* sum_sq_data() const { return sum_sq.mutable_data_ptr(); }
};

void copy_strides(const Tensor& tensor, int64_t* out) {
  auto strides = tensor.strides();
  std::copy(strides.begin(), strides.end(), out);
}

const void* data_or_null(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

// ---- Linear, bias, reduce -----------------------------------------------------------------------

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
  Moments weight(true, {a.O, a.I}, a.grad_dtype, a.dtype);
  Moments column(bias, {a.O}, a.grad_dtype, a.dtype);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  copy_strides(dy, a.dy_stride);
  copy_strides(x, a.x_stride);
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  cpu::kernels().linear_moments(a, parallel());
  return {weight.sum, weight.sum_sq, column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("linear_moments", TORCH_BOX(&linear_moments));
}

Two bias_moments(const Tensor dy, std::optional<ScalarType> dtype) {
  constexpr const char* op = "bias_moments";
  STD_TORCH_CHECK(dy.dim() == 3, op, ": dy must be (B, T, O)");
  cpu::Bias a{};
  a.B = dy.size(0), a.T = dy.size(1), a.O = dy.size(2);
  a.dtype = dtype_of(op, "dy", dy);
  a.grad_dtype = gradient_dtype(op, dtype, a.dtype);
  Moments column(true, {a.O}, a.grad_dtype, a.dtype);
  a.dy = dy.const_data_ptr();
  copy_strides(dy, a.dy_stride);
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  cpu::kernels().bias_moments(a, parallel());
  return {column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("bias_moments", TORCH_BOX(&bias_moments)); }

// The one stride that walks all dimensions but the first in row-major order, if there is one.
std::optional<int64_t> inner_stride(const Tensor& tensor) {
  auto sizes = tensor.sizes(), strides = tensor.strides();
  std::optional<int64_t> unit;
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
  Moments moments(true, shape, a.grad_dtype, a.dtype);
  a.g = g.const_data_ptr();
  a.g_stride[0] = g.stride(0), a.g_stride[1] = *inner_stride(g);
  a.sum = moments.sum_data(), a.sum_sq = moments.sum_sq_data();
  cpu::kernels().reduce_moments(a, parallel());
  return {moments.sum, moments.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("reduce_moments", TORCH_BOX(&reduce_moments));
}

// ---- Convolution --------------------------------------------------------------------------------

Four conv_moments(const Tensor dy, const Tensor x, const Ints kernel_size, const Ints stride,
                  const Ints padding, const Ints dilation, int64_t groups, bool bias,
                  std::optional<ScalarType> dtype) {
  constexpr const char* op = "conv_moments";
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
  Moments weight(true, shape, a.grad_dtype, a.dtype);
  Moments column(bias, {a.O}, a.grad_dtype, a.dtype);
  a.dy = dy.const_data_ptr(), a.x = x.const_data_ptr();
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  a.db = column.sum_data(), a.db_sq = column.sum_sq_data();
  cpu::kernels().conv_moments(a, parallel());
  return {weight.sum, weight.sum_sq, column.sum, column.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("conv_moments", TORCH_BOX(&conv_moments)); }

// ---- Embedding ----------------------------------------------------------------------------------

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
  for (int64_t b = 0; b < a.B; ++b) {
    for (int64_t t = 0; t < a.T; ++t) {
      int64_t row = a.indices[b * a.index_stride[0] + t * a.index_stride[1]];
      STD_TORCH_CHECK(row >= 0 && row < a.V, op, ": index out of range: indices must be in [0, ",
                      a.V, "), got ", row);
    }
  }
  Moments weight(true, {a.V, a.D}, a.grad_dtype, a.dtype);
  a.dw = weight.sum_data(), a.dw_sq = weight.sum_sq_data();
  cpu::kernels().embedding_moments(a, parallel());
  return {weight.sum, weight.sum_sq};
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("embedding_moments", TORCH_BOX(&embedding_moments));
}

// ---- Norms --------------------------------------------------------------------------------------

Optional contiguous(const Optional& tensor) {
  return tensor ? Optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

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

// ---- Adam ---------------------------------------------------------------------------------------

// A Tensor[] argument, as the owner of bare handles: a stable::Tensor would cost an allocation for
// each of what may be thousands of tensors.
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      handles_[i] = torch::stable::detail::to<AtenTensorHandle>(element);
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(TensorList&& other) noexcept = default;
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) aoti_torch_delete_tensor_object(handle);
  }
  size_t size() const { return handles_.size(); }
  AtenTensorHandle operator[](size_t i) const { return handles_[i]; }

 private:
  std::vector<AtenTensorHandle> handles_;
};

}  // namespace
}  // namespace perexample

// Lets TORCH_BOX hand a TensorList to an op.
HIDDEN_NAMESPACE_BEGIN(torch, stable, detail)
template <>
struct ToImpl<perexample::TensorList> {
  static perexample::TensorList call(StableIValue value, uint64_t, bool) {
    return perexample::TensorList(to<StableListHandle>(value));
  }
};
HIDDEN_NAMESPACE_END(torch, stable, detail)

namespace perexample {
namespace {

int64_t numel(AtenTensorHandle tensor) {
  int64_t n;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_numel(tensor, &n));
  return n;
}

bool is_contiguous(AtenTensorHandle tensor) {
  bool contiguous;
  TORCH_ERROR_CODE_CHECK(aoti_torch_is_contiguous(tensor, &contiguous));
  return contiguous;
}

void* data(AtenTensorHandle tensor) {
  void* pointer;
  TORCH_ERROR_CODE_CHECK(torch_get_mutable_data_ptr(tensor, &pointer));
  return pointer;
}

const void* const_data(AtenTensorHandle tensor) {
  const void* pointer;
  TORCH_ERROR_CODE_CHECK(torch_get_const_data_ptr(tensor, &pointer));
  return pointer;
}

struct Layout {
  Shape sizes, strides;

  explicit Layout(AtenTensorHandle tensor) {
    int64_t dim, *first_size, *first_stride;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dim(tensor, &dim));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_sizes(tensor, &first_size));
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_strides(tensor, &first_stride));
    sizes.assign(first_size, first_size + dim);
    strides.assign(first_stride, first_stride + dim);
  }

  // Whether the elements fill one block of memory, each once, in whatever order.
  bool dense() const {
    std::vector<std::pair<int64_t, int64_t>> order;  // stride, size
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1) order.emplace_back(strides[d], sizes[d]);
    }
    std::sort(order.begin(), order.end());
    int64_t expected = 1;
    for (auto [stride, size] : order) {
      if (stride != expected) return false;
      expected *= size;
    }
    return true;
  }

  // Strides of dimensions of one element mean nothing.
  bool same_order(const Layout& other) const {
    for (size_t d = 0; d < sizes.size(); ++d) {
      if (sizes[d] != 1 && strides[d] != other.strides[d]) return false;
    }
    return true;
  }
};

// The arrays of one parameter that do not lie in memory alike. They are walked in the order of the
// parameter if it is dense, else row-major; what lies otherwise is replaced by a copy, and `finish`
// takes back what the step has written.
class Staging {
 public:
  explicit Staging(AtenTensorHandle param) : common_(param) {
    if (!common_.dense()) common_.strides = contiguous_strides(common_.sizes);
  }

  AtenTensorHandle stage(AtenTensorHandle tensor, bool written) {
    Layout own(tensor);
    STD_TORCH_CHECK(own.sizes == common_.sizes,
                    "adam_step_: all tensors of a parameter must have its shape");
    if (own.same_order(common_)) return tensor;
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    copies_.push_back({tensor, empty_strided(common_.sizes, common_.strides, dtype), written});
    AtenTensorHandle copy = copies_.back().tensor.get();
    TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy, tensor, 0));
    return copy;
  }

  void finish() const {
    for (const Copy& copy : copies_) {
      if (copy.written) {
        TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(copy.original, copy.tensor.get(), 0));
      }
    }
  }

 private:
  struct Copy {
    AtenTensorHandle original;
    Tensor tensor;
    bool written;
  };
  Layout common_;
  std::vector<Copy> copies_;
};

// The copies of `Staging` are no business of autograd.
class NoGrad {
 public:
  NoGrad() : before_(aoti_torch_grad_mode_is_enabled()) { aoti_torch_grad_mode_set_enabled(false); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(before_); }

 private:
  bool before_;
};

double scalar(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1, "adam_step_: ", name, " must have one element");
  Tensor value = torch::stable::to(tensor, ScalarType::Double);
  return *static_cast<const double*>(value.const_data_ptr());
}

// MATHS (11), `seen` counting this step; 0 where nothing was seen yet.
double weight_of_new(double batch, double seen, double horizon) {
  return std::min(1.0, batch / std::max(std::min(seen, horizon), DBL_MIN));
}

double epsilon(DType dtype) {
  constexpr double epsilons[] = {FLT_EPSILON, DBL_EPSILON, 0x1p-7, 0x1p-10};
  return epsilons[static_cast<int>(dtype)];
}

// How far rounding alone can carry |grad| beyond sqrt(B sum_grad_squared), relatively: a sum over B
// examples, and one rounding to the gradient's dtype in every backward pass.
double guard_slack(DType grad, double batch, int64_t rounds) {
  return (batch + 16) * epsilon(accumulate_dtype(grad)) +
         static_cast<double>(2 + rounds) * epsilon(grad);
}

// The same where the gradient is subnormal: half of the smallest number for every rounding.
double guard_absolute(DType grad, int64_t rounds) {
  constexpr double smallest[] = {0x1p-149, 0x0.0000000000001p-1022, 0x1p-133, 0x1p-24};
  return static_cast<double>(1 + rounds) * smallest[static_cast<int>(grad)] / 2;
}

void adam_step_(const TensorList& params, const TensorList& grads,
                const TensorList& sums_grad_squared, const TensorList& exp_avgs,
                const TensorList& exp_avg_sqs, const Tensor examples_seen, const Tensor violations,
                const Tensor batch_size, const Tensor lr, double n_g, double n_s, double eps,
                double weight_decay, bool mean_reduction, bool maximize, int64_t guard_rounds,
                const Optional grad_scale, const Optional found_inf) {
  constexpr const char* op = "adam_step_";
  NoGrad no_grad;
  size_t count = params.size();
  bool per_example = sums_grad_squared.size() != 0;
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count &&
                      exp_avg_sqs.size() == count &&
                      (!per_example || sums_grad_squared.size() == count),
                  op, ": all lists must be of one length");
  for (const Tensor* t : {&examples_seen, &violations}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == static_cast<int64_t>(count), op,
                    ": examples_seen and violations must be (", count, ",)");
  }
  STD_TORCH_CHECK(examples_seen.scalar_type() == ScalarType::Double &&
                      violations.scalar_type() == ScalarType::Int,
                  op, ": examples_seen must be float64 and violations int32");
  if (found_inf && scalar("found_inf", *found_inf) != 0) return;

  double batch = scalar("batch_size", batch_size);
  if (batch <= 0) return;  // a step on no examples is none
  double inverse = grad_scale ? 1.0 / scalar("grad_scale", *grad_scale) : 1.0;
  auto* seen = static_cast<double*>(examples_seen.mutable_data_ptr());
  auto* flags = static_cast<int32_t*>(violations.mutable_data_ptr());
  int64_t seen_stride = examples_seen.stride(0), flag_stride = violations.stride(0);

  std::vector<cpu::AdamTensor> by_dtype[4];  // of the gradient, on which the guard's slack depends
  std::vector<Staging> stagings;
  for (size_t i = 0; i < count; ++i) {
    AtenTensorHandle p = params[i], grad = grads[i], m = exp_avgs[i], v = exp_avg_sqs[i];
    AtenTensorHandle sum = per_example ? sums_grad_squared[i] : nullptr;
    cpu::AdamTensor a{};
    a.n = numel(p);
    a.param_dtype = dtype_of(op, "params", p);
    a.grad_dtype = dtype_of(op, "grads", grad);
    a.state_dtype = accumulate_dtype(a.param_dtype);
    for (AtenTensorHandle t : {m, v, sum}) {
      STD_TORCH_CHECK(t == nullptr || dtype_of(op, "state", t) == a.state_dtype, op,
                      ": exp_avgs, exp_avg_sqs and sums_grad_squared must be float32 (float64 for "
                      "float64 parameters)");
    }
    bool plain = is_contiguous(p);
    for (AtenTensorHandle t : {grad, m, v, sum}) {
      plain = plain && (t == nullptr || (is_contiguous(t) && numel(t) == a.n));
    }
    if (!plain) {
      Staging& staging = stagings.emplace_back(p);
      p = staging.stage(p, true);
      grad = staging.stage(grad, false);
      m = staging.stage(m, true);
      v = staging.stage(v, true);
      if (per_example) sum = staging.stage(sum, false);
    }
    a.param = data(p), a.exp_avg = data(m), a.exp_avg_sq = data(v);
    a.grad = const_data(grad);
    a.sum_grad_squared = per_example ? const_data(sum) : nullptr;
    int64_t index = static_cast<int64_t>(i);
    double now = seen[index * seen_stride] + batch;
    a.kappa_g = weight_of_new(batch, now, n_g);
    a.kappa_s = weight_of_new(batch, now, n_s);
    a.violation = per_example && guard_rounds > 0 ? flags + index * flag_stride : nullptr;
    by_dtype[static_cast<int>(a.grad_dtype)].push_back(a);
  }

  cpu::Adam adam{};
  adam.batch_size = batch;
  adam.grad_scale = (maximize ? -inverse : inverse) / (mean_reduction ? 1.0 : batch);
  adam.square_scale = inverse * inverse * (mean_reduction ? batch : 1.0 / batch);  // MATHS (2)
  adam.step_size = batch * scalar("lr", lr);
  adam.weight_decay = weight_decay;
  adam.eps = eps;
  for (DType grad : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    const auto& tensors = by_dtype[static_cast<int>(grad)];
    if (tensors.empty()) continue;
    adam.count = static_cast<int64_t>(tensors.size());
    adam.tensors = tensors.data();
    adam.guard_slack = guard_slack(grad, batch, guard_rounds);
    adam.guard_absolute = guard_absolute(grad, guard_rounds);
    cpu::kernels().adam_step(adam, parallel());
  }
  for (const Staging& staging : stagings) staging.finish();
  for (int64_t i = 0; i < examples_seen.size(0); ++i) seen[i * seen_stride] += batch;
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("adam_step_", TORCH_BOX(&adam_step_)); }

}  // namespace
}  // namespace perexample
