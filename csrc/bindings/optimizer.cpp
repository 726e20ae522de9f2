#include <cfloat>
#include <cmath>
#include <utility>

#include "cuda.h"

namespace perexample {
namespace {

constexpr const char* kOp = "optimizer_step_";

// A Tensor[] or Tensor?[] argument, as the owner of bare handles (null for None): a stable::Tensor
// would cost an allocation for each of what may be thousands of tensors.
template <bool nullable>
class TensorList {
 public:
  explicit TensorList(StableListHandle list) {
    size_t size = 0;
    TORCH_ERROR_CODE_CHECK(torch_list_size(list, &size));
    handles_.resize(size);
    for (size_t i = 0; i < size; ++i) {
      StableIValue element;
      TORCH_ERROR_CODE_CHECK(torch_list_get_item(list, i, &element));
      if constexpr (nullable) {
        using Handle = std::optional<AtenTensorHandle>;
        handles_[i] = torch::stable::detail::to<Handle>(element).value_or(nullptr);
      } else {
        handles_[i] = torch::stable::detail::to<AtenTensorHandle>(element);
      }
    }
    TORCH_ERROR_CODE_CHECK(torch_delete_list(list));
  }
  TensorList(TensorList&& other) noexcept = default;
  TensorList& operator=(TensorList&&) = delete;
  ~TensorList() {
    for (AtenTensorHandle handle : handles_) {
      if (handle != nullptr) aoti_torch_delete_tensor_object(handle);
    }
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
template <bool nullable>
struct ToImpl<perexample::TensorList<nullable>> {
  static perexample::TensorList<nullable> call(StableIValue value, uint64_t, bool) {
    return perexample::TensorList<nullable>(to<StableListHandle>(value));
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
  Staging(AtenTensorHandle param, Where where) : common_(param), where_(where) {
    if (!common_.dense()) common_.strides = contiguous_strides(common_.sizes);
  }

  AtenTensorHandle stage(AtenTensorHandle tensor, bool written) {
    Layout own(tensor);
    STD_TORCH_CHECK(own.sizes == common_.sizes,
                    "optimizer_step_: all tensors of a parameter must have its shape");
    if (own.same_order(common_)) return tensor;
    int32_t dtype;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &dtype));
    copies_.push_back(
        {tensor, empty_strided(common_.sizes, common_.strides, dtype, where_), written});
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
  Where where_;
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

// Elements that the state of n elements takes.
int64_t padded(int64_t n) { return (n + 63) / 64 * 64; }

double scalar(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.numel() == 1, kOp, ": ", name, " must have one element");
  Tensor value = torch::stable::to(tensor, ScalarType::Double);
  return *static_cast<const double*>(value.const_data_ptr());
}

// MATHS (9)-(12), (19): the weight of a new value in a running average, `seen` counting this step.
double weight_of_new(double batch, double seen, double horizon, bool corrected, bool power) {
  double weight = power ? -std::expm1(batch * std::log1p(-1 / horizon)) : batch / horizon;
  if (corrected) weight = std::max(weight, batch / std::max(seen, DBL_MIN));
  return std::min(weight, 1.0);
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

// The state of all parameters, one after another, each rounded up to whole cache lines.
struct State {
  char* data = nullptr;
  int64_t item = 0;  // bytes

  State(const Optional& flat, const char* name, DType dtype, int64_t length) {
    if (!flat) return;
    STD_TORCH_CHECK(flat->dim() == 1 && flat->size(0) == length && flat->is_contiguous(), kOp, ": ",
                    name, " must be (", length, ",) and contiguous");
    STD_TORCH_CHECK(dtype_of(kOp, name, *flat) == dtype, kOp,
                    ": exp_avg and exp_avg_sq must have one dtype");
    data = static_cast<char*>(flat->mutable_data_ptr());
    item = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  }
  void* at(int64_t start) const { return data == nullptr ? nullptr : data + start * item; }
};

// A scalar for the CUDA kernel: one on the device is read there, when the kernel runs.
struct DeviceScalar {
  Optional held;
  cuda::Scalar scalar{nullptr, 0};

  DeviceScalar(const char* name, const Optional& tensor, Where where) {
    if (!tensor) return;
    const Where own(*tensor);
    if (!own.on_cuda()) {
      scalar.value = perexample::scalar(name, *tensor);
      return;
    }
    STD_TORCH_CHECK(own == where, kOp, ": ", name,
                    " must be on the CPU or on the device of examples_seen");
    STD_TORCH_CHECK(tensor->numel() == 1, kOp, ": ", name, " must have one element");
    held = torch::stable::to(*tensor, ScalarType::Double);
    scalar.on_device = static_cast<const double*>(held->const_data_ptr());
  }
};

// The tensors of a step on CUDA; `step` has everything else.
void step_on_cuda(cuda::Optimizer step, const TensorList<false>& params,
                  const TensorList<true>& grads, const TensorList<true>& sums_grad_squared,
                  const Optional& exp_avg, const Optional& exp_avg_sq, Where where) {
  const size_t count = params.size();
  const bool per_example = sums_grad_squared.size() != 0, stateful = exp_avg || exp_avg_sq;
  if (stateful) step.state_dtype = dtype_of(kOp, "state", exp_avg ? *exp_avg : *exp_avg_sq);
  for (const Optional* state : {&exp_avg, &exp_avg_sq}) {
    STD_TORCH_CHECK(!*state || Where(**state) == where, kOp,
                    ": exp_avg and exp_avg_sq must be on the device of examples_seen");
  }
  int64_t length = 0;
  for (size_t i = 0; i < count; ++i) length += padded(numel(params[i]));
  step.exp_avg = State(exp_avg, "exp_avg", step.state_dtype, length).at(0);
  step.exp_avg_sq = State(exp_avg_sq, "exp_avg_sq", step.state_dtype, length).at(0);
  std::vector<cuda::OptimizerTensor> tensors;
  std::vector<Staging> stagings;
  int64_t start = 0;
  for (size_t i = 0; i < count; ++i) {
    AtenTensorHandle p = params[i], grad = grads[i];
    AtenTensorHandle sum = per_example ? sums_grad_squared[i] : nullptr;
    cuda::OptimizerTensor t{};
    t.n = numel(p), t.start = start, t.index = static_cast<int32_t>(i);
    start += padded(t.n);
    if (grad == nullptr) continue;
    t.param_dtype = dtype_of(kOp, "params", p), t.grad_dtype = dtype_of(kOp, "grads", grad);
    const DType wide = accumulate_dtype(t.param_dtype);
    STD_TORCH_CHECK(!per_example || sum != nullptr, kOp,
                    ": sums_grad_squared must be None only where the gradient is");
    STD_TORCH_CHECK(sum == nullptr || dtype_of(kOp, "sums_grad_squared", sum) == wide, kOp,
                    ": sums_grad_squared must be float32 (float64 for float64 parameters)");
    STD_TORCH_CHECK(!stateful || step.state_dtype == wide ||
                        (step.state_dtype == DType::bf16 && wide == DType::f32),
                    kOp,
                    ": exp_avg and exp_avg_sq must be float32 or bfloat16 (float64 for float64 "
                    "parameters)");
    for (AtenTensorHandle tensor : {p, grad, sum}) {
      STD_TORCH_CHECK(tensor == nullptr || Where(tensor) == where, kOp,
                      ": all tensors must be on the device of examples_seen");
    }
    bool plain = is_contiguous(p);
    for (AtenTensorHandle tensor : {grad, sum}) {
      plain = plain && (tensor == nullptr || (is_contiguous(tensor) && numel(tensor) == t.n));
    }
    if (!plain) {
      Staging& staging = stagings.emplace_back(p, where);
      p = staging.stage(p, true);
      grad = staging.stage(grad, false);
      if (sum != nullptr) sum = staging.stage(sum, false);
    }
    t.param = data(p), t.grad = const_data(grad);
    t.sum_grad_squared = sum == nullptr ? nullptr : const_data(sum);
    tensors.push_back(t);
  }
  step.count = static_cast<int64_t>(tensors.size()), step.tensors = tensors.data();
  cuda::optimizer_step(step, OnCuda(where));
  for (const Staging& staging : stagings) staging.finish();
}

// torch calls the one for CUDA where any of the tensors is there.
template <bool on_cuda>
void optimizer_step_(const TensorList<false>& params, const TensorList<true>& grads,
                     const TensorList<true>& sums_grad_squared, const Optional exp_avg,
                     const Optional exp_avg_sq, const Tensor examples_seen, const Tensor violations,
                     const Tensor batch_size, const Tensor lr, double n_g, double n_s, double eps,
                     double weight_decay, bool centered, bool squared_denominator,
                     bool lr_times_eps, bool correct_g, bool correct_s, bool power,
                     bool mean_reduction, bool maximize, int64_t guard_rounds,
                     const Optional grad_scale, const Optional found_inf) {
  NoGrad no_grad;
  size_t count = params.size();
  bool per_example = sums_grad_squared.size() != 0;
  STD_TORCH_CHECK(grads.size() == count && (!per_example || sums_grad_squared.size() == count), kOp,
                  ": all lists must be of one length");
  for (const Tensor* t : {&examples_seen, &violations}) {
    STD_TORCH_CHECK(t->dim() == 1 && t->size(0) == static_cast<int64_t>(count), kOp,
                    ": examples_seen and violations must be (", count, ",)");
  }
  STD_TORCH_CHECK(examples_seen.scalar_type() == ScalarType::Double &&
                      violations.scalar_type() == ScalarType::Int,
                  kOp, ": examples_seen must be float64 and violations int32");
  STD_TORCH_CHECK(!centered || (exp_avg && exp_avg_sq), kOp,
                  ": centered needs exp_avg and exp_avg_sq");
  const Where where(examples_seen);
  STD_TORCH_CHECK(where.on_cuda() == on_cuda && Where(violations) == where, kOp,
                  ": all tensors must be on the device of examples_seen");
  if constexpr (on_cuda) {
    cuda::Optimizer step{};
    step.n_g = n_g, step.n_s = n_s, step.eps = eps, step.weight_decay = weight_decay;
    step.log_keep_g = std::log1p(-1 / n_g), step.log_keep_s = std::log1p(-1 / n_s);
    step.centered = centered, step.squared_denominator = squared_denominator;
    step.lr_times_eps = lr_times_eps, step.correct_g = correct_g, step.correct_s = correct_s;
    step.power = power, step.mean_reduction = mean_reduction, step.maximize = maximize;
    step.guard_rounds = per_example ? guard_rounds : 0;
    step.examples_seen = static_cast<double*>(examples_seen.mutable_data_ptr());
    step.violations = static_cast<int32_t*>(violations.mutable_data_ptr());
    step.seen_stride = examples_seen.stride(0), step.flag_stride = violations.stride(0);
    DeviceScalar b("batch_size", batch_size, where), rate("lr", lr, where);
    DeviceScalar scale("grad_scale", grad_scale, where), inf("found_inf", found_inf, where);
    step.batch_size = b.scalar, step.lr = rate.scalar;
    step.grad_scale = scale.scalar, step.found_inf = inf.scalar;
    step.has_grad_scale = grad_scale.has_value(), step.has_found_inf = found_inf.has_value();
    return step_on_cuda(step, params, grads, sums_grad_squared, exp_avg, exp_avg_sq, where);
  }
  if (found_inf && scalar("found_inf", *found_inf) != 0) return;

  double batch = scalar("batch_size", batch_size), rate = batch * scalar("lr", lr);
  if (!(batch > 0)) return;  // a step on no examples is none
  double inverse = grad_scale ? 1.0 / scalar("grad_scale", *grad_scale) : 1.0;
  auto* seen = static_cast<double*>(examples_seen.mutable_data_ptr());
  auto* flags = static_cast<int32_t*>(violations.mutable_data_ptr());
  int64_t seen_stride = examples_seen.stride(0), flag_stride = violations.stride(0);

  cpu::Optimizer step{};
  bool stateful = exp_avg || exp_avg_sq;
  if (stateful) step.state_dtype = dtype_of(kOp, "state", exp_avg ? *exp_avg : *exp_avg_sq);
  int64_t length = 0;
  for (size_t i = 0; i < count; ++i) length += padded(numel(params[i]));
  State averages(exp_avg, "exp_avg", step.state_dtype, length);
  State squares(exp_avg_sq, "exp_avg_sq", step.state_dtype, length);

  std::vector<cpu::OptimizerTensor> tensors;
  tensors.reserve(count);
  std::vector<Staging> stagings;
  int64_t start = 0;
  for (size_t i = 0; i < count; ++i) {
    AtenTensorHandle p = params[i], grad = grads[i];
    AtenTensorHandle sum = per_example ? sums_grad_squared[i] : nullptr;
    cpu::OptimizerTensor a{};
    a.n = numel(p);
    int64_t own = start;
    start += padded(a.n);
    if (grad == nullptr) continue;
    a.param_dtype = dtype_of(kOp, "params", p);
    a.grad_dtype = dtype_of(kOp, "grads", grad);
    a.sum_dtype = accumulate_dtype(a.param_dtype);
    STD_TORCH_CHECK(!per_example || sum != nullptr, kOp,
                    ": sums_grad_squared must be None only where the gradient is");
    STD_TORCH_CHECK(sum == nullptr || dtype_of(kOp, "sums_grad_squared", sum) == a.sum_dtype, kOp,
                    ": sums_grad_squared must be float32 (float64 for float64 parameters)");
    STD_TORCH_CHECK(!stateful || step.state_dtype == a.sum_dtype ||
                        (step.state_dtype == DType::bf16 && a.sum_dtype == DType::f32),
                    kOp,
                    ": exp_avg and exp_avg_sq must be float32 or bfloat16 (float64 for float64 "
                    "parameters)");
    bool plain = is_contiguous(p);
    for (AtenTensorHandle t : {grad, sum}) {
      plain = plain && (t == nullptr || (is_contiguous(t) && numel(t) == a.n));
    }
    if (!plain) {
      Staging& staging = stagings.emplace_back(p, where);
      p = staging.stage(p, true);
      grad = staging.stage(grad, false);
      if (sum != nullptr) sum = staging.stage(sum, false);
    }
    a.param = data(p);
    a.grad = const_data(grad);
    a.sum_grad_squared = sum == nullptr ? nullptr : const_data(sum);
    a.exp_avg = averages.at(own), a.exp_avg_sq = squares.at(own);
    int64_t index = static_cast<int64_t>(i);
    double now = seen[index * seen_stride] + batch;
    a.seed = static_cast<uint32_t>(static_cast<int64_t>(now));
    a.kappa_g = weight_of_new(batch, now, n_g, correct_g, power);
    a.kappa_s = weight_of_new(batch, now, n_s, correct_s, power);
    if (per_example && guard_rounds > 0) {
      a.violation = flags + index * flag_stride;
      a.guard_slack = guard_slack(a.grad_dtype, batch, guard_rounds);
      a.guard_absolute = guard_absolute(a.grad_dtype, guard_rounds);
    }
    tensors.push_back(a);
  }

  step.count = static_cast<int64_t>(tensors.size());
  step.tensors = tensors.data();
  step.centered = centered, step.squared_denominator = squared_denominator;
  step.batch_size = batch;
  step.grad_scale = (maximize ? -inverse : inverse) / (mean_reduction ? 1.0 : batch);
  step.square_scale = inverse * inverse * (mean_reduction ? batch : 1.0 / batch);  // MATHS (2)
  step.step_size = lr_times_eps ? rate * eps : rate;
  step.decay = rate * weight_decay;
  step.eps = eps;
  cpu::kernels().optimizer_step(step, parallel());
  for (const Staging& staging : stagings) staging.finish();
  for (size_t i = 0; i < count; ++i) {
    if (grads[i] != nullptr) seen[static_cast<int64_t>(i) * seen_stride] += batch;
  }
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("optimizer_step_", TORCH_BOX(&optimizer_step_<false>));
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CUDA, m) {
  if (cuda::built) m.impl("optimizer_step_", TORCH_BOX(&optimizer_step_<true>));
}

}  // namespace
}  // namespace perexample
