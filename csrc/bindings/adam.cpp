#include <cfloat>
#include <utility>

#include "common.h"

namespace perexample {
namespace {

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
