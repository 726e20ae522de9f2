// One step of an optimizer over all parameters: MATHS (2), (9)-(19), as written out at `Optimizer`
// in csrc/cpu/kernels.h. The scalars are read on the device, so a captured step follows them.
//
// What is to be known of the tensors travels with the launch, as kernel parameters: one launch for
// each kTensors tensors, and no copy from the host. A last, tiny launch counts the examples, once
// everything has read the count.
#include <cfloat>
#include <cmath>
#include <vector>

#include "common.cuh"

namespace perexample::cuda {
namespace {

constexpr int kTensors = 512, kThreads = 256;
constexpr int64_t kChunk = 8192;  // elements of one CTA

struct Batch {
  void* param[kTensors];
  const void* grad[kTensors];
  const void* sum_grad_squared[kTensors];
  int64_t n[kTensors];
  int64_t start[kTensors];       // of its state
  int32_t index[kTensors];       // in the arrays of counts and flags
  uint32_t first[kTensors + 1];  // chunk
  uint8_t param_dtype[kTensors], grad_dtype[kTensors];
  bool aligned[kTensors];  // arrays can be read 4 elements at a time
  int32_t count;
};
static_assert(sizeof(Batch) < 30000, "kernel parameters");

// The constants of one tensor, in the type of the arithmetic.
template <class A>
struct Constants {
  A keep_g, take_g, keep_s, take_s;  // 1 - kappa and kappa
  A grad_scale, square_scale, keep, step_size, eps;
  A guard, guard_tiny, guard_absolute;
  uint32_t seed;
  int32_t proceed;
};

PX_DEVICE double read(const Scalar& s) { return s.on_device == nullptr ? s.value : *s.on_device; }

// MATHS (9)-(12), (19); `seen` counts this step. log_keep: log(1 - 1/N).
PX_DEVICE double weight_of_new(double batch, double seen, double horizon, double log_keep,
                               bool corrected, bool power) {
  double weight = power ? -expm1(batch * log_keep) : batch / horizon;
  if (corrected) weight = fmax(weight, batch / fmax(seen, DBL_MIN));
  return fmin(weight, 1.0);
}

PX_DEVICE double epsilon(DType dtype) {
  return dtype == DType::f32    ? FLT_EPSILON
         : dtype == DType::f64  ? DBL_EPSILON
         : dtype == DType::bf16 ? 0x1p-7
                                : 0x1p-10;
}
PX_DEVICE double smallest(DType dtype) {
  return dtype == DType::f32    ? 0x1p-149
         : dtype == DType::f64  ? 0x0.0000000000001p-1022
         : dtype == DType::bf16 ? 0x1p-133
                                : 0x1p-24;
}

PX_DEVICE bool proceeds(const Optimizer& o) {
  return read(o.batch_size) > 0 && (!o.has_found_inf || read(o.found_inf) == 0);
}

template <class A>
PX_DEVICE Constants<A> constants(const Optimizer& o, DType param, DType grad, int32_t index) {
  const double batch = read(o.batch_size), rate = batch * read(o.lr);
  const double inverse = o.has_grad_scale ? 1.0 / read(o.grad_scale) : 1.0;
  const double seen = o.examples_seen[index * o.seen_stride] + batch;
  const double kappa_g = weight_of_new(batch, seen, o.n_g, o.log_keep_g, o.correct_g, o.power);
  const double kappa_s = weight_of_new(batch, seen, o.n_s, o.log_keep_s, o.correct_s, o.power);
  const double kappa = o.centered ? kappa_s : kappa_g;
  const double scale = o.mean_reduction ? inverse : inverse / batch;
  // What rounding explains: see csrc/bindings/optimizer.cpp.
  const DType wide = grad == DType::f64 ? DType::f64 : DType::f32;
  const double slack = 1 + (batch + 16) * epsilon(wide) + (2 + o.guard_rounds) * epsilon(grad);
  Constants<A> c;
  c.keep_g = static_cast<A>(1 - kappa), c.take_g = static_cast<A>(kappa);
  c.keep_s = static_cast<A>(1 - kappa_s), c.take_s = static_cast<A>(kappa_s);
  c.grad_scale = static_cast<A>(o.maximize ? -scale : scale);
  c.square_scale = static_cast<A>(inverse * inverse * (o.mean_reduction ? batch : 1.0 / batch));
  c.keep = static_cast<A>(1 - rate * o.weight_decay);
  c.step_size = static_cast<A>(o.lr_times_eps ? rate * o.eps : rate);
  c.eps = static_cast<A>(o.eps);
  c.guard = static_cast<A>(slack * slack * batch);
  c.guard_tiny = static_cast<A>(batch * (param == DType::f64 ? DBL_MIN : FLT_MIN));
  c.guard_absolute = static_cast<A>((1 + o.guard_rounds) * smallest(grad) / 2);
  c.seed = static_cast<uint32_t>(static_cast<int64_t>(seen));
  c.proceed = proceeds(o);
  return c;
}

template <class A>
PX_DEVICE A load(const void* data, DType dtype, int64_t i) {
  return dtype == DType::f32    ? static_cast<A>(static_cast<const float*>(data)[i])
         : dtype == DType::f64  ? static_cast<A>(static_cast<const double*>(data)[i])
         : dtype == DType::bf16 ? static_cast<A>(widen(static_cast<const bf16*>(data)[i]))
                                : static_cast<A>(widen(static_cast<const f16*>(data)[i]));
}

// Whether elements of `array` can be read as vectors of 16 bytes.
PX_HOST_DEVICE inline bool is_aligned(const void* array) {
  return reinterpret_cast<uintptr_t>(array) % 16 == 0;
}

// Elements i to i + 3, or to n; one vector where the array is float32 and aligned.
template <class A>
PX_DEVICE void load_4(A (&x)[4], const void* data, DType dtype, int64_t i, int64_t n, bool vector) {
  if (vector && dtype == DType::f32) {
    const float4 v = *reinterpret_cast<const float4*>(static_cast<const float*>(data) + i);
    x[0] = v.x, x[1] = v.y, x[2] = v.z, x[3] = v.w;
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) x[e] = i + e < n ? load<A>(data, dtype, i + e) : A{0};
}
template <class A>
PX_DEVICE void store_4(const A (&x)[4], void* data, DType dtype, int64_t i, int64_t n,
                       bool vector) {
  if (vector && dtype == DType::f32) {
    *reinterpret_cast<float4*>(static_cast<float*>(data) + i) =
        make_float4(static_cast<float>(x[0]), static_cast<float>(x[1]), static_cast<float>(x[2]),
                    static_cast<float>(x[3]));
    return;
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (i + e < n) store(data, dtype, i + e, x[e]);
  }
}

// 32 bits that look random, a function of the element and of the examples seen.
PX_DEVICE uint32_t hash(uint32_t element, uint32_t seed) {
  uint32_t x = element * 0x9e3779b1u + seed;
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

// State in bfloat16 is rounded up where the bits that are cut off exceed 16 of the hash's.
template <class A>
PX_DEVICE void store_state(const A (&x)[4], void* data, DType dtype, int64_t start, int64_t i,
                           int64_t n, bool vector, uint32_t seed, int shift) {
  if (dtype != DType::bf16) {
    store_4(x, static_cast<char*>(data) + start * (dtype == DType::f64 ? 8 : 4), dtype, i, n,
            vector);
    return;
  }
  bf16* out = static_cast<bf16*>(data) + start;
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (i + e >= n) continue;
    uint32_t bits = as_bits(static_cast<float>(x[e]));
    const uint32_t exponent = bits & 0x7f800000u;
    if (exponent != 0x7f800000u) {
      bits += hash(static_cast<uint32_t>(i + e), seed) >> shift & 0xffffu;
    } else if ((bits & 0x7fffffu) != 0) {
      bits |= 0x400000u;  // a NaN must not become an infinity
    }
    out[i + e] = bf16{static_cast<uint16_t>(bits >> 16)};
  }
}

template <class A>
PX_DEVICE const void* state_at(const void* data, DType dtype, int64_t start) {
  return static_cast<const char*>(data) + start * (dtype == DType::f64   ? 8
                                                   : dtype == DType::f32 ? 4
                                                                         : 2);
}

template <class A>
__global__ void __launch_bounds__(kThreads, 2)
    step_batch(const __grid_constant__ Batch batch, const __grid_constant__ Optimizer o) {
  __shared__ Constants<A> shared_constants;
  int low = 0, high = batch.count;  // the last tensor whose first chunk is not after this one
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (batch.first[middle] <= blockIdx.x) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const DType param_dtype = static_cast<DType>(batch.param_dtype[low]);
  const DType grad_dtype = static_cast<DType>(batch.grad_dtype[low]);
  const DType sum_dtype = param_dtype == DType::f64 ? DType::f64 : DType::f32;
  if (threadIdx.x == 0) {
    shared_constants = constants<A>(o, param_dtype, grad_dtype, batch.index[low]);
  }
  __syncthreads();
  const Constants<A> c = shared_constants;
  if (c.proceed == 0) return;
  const int64_t n = batch.n[low], start = batch.start[low];
  const int64_t begin = static_cast<int64_t>(blockIdx.x - batch.first[low]) * kChunk;
  const int64_t end = begin + kChunk < n ? begin + kChunk : n;
  const void* sums = batch.sum_grad_squared[low];
  bool flagged = false;
  for (int64_t i = begin + 4 * threadIdx.x; i < end; i += 4 * kThreads) {
    const bool vector = batch.aligned[low] && i + 4 <= n;
    const bool whole = i + 4 <= n && is_aligned(o.exp_avg) && is_aligned(o.exp_avg_sq);
    A p[4], g[4], q[4] = {}, m[4] = {}, v[4] = {};
    load_4(p, batch.param[low], param_dtype, i, n, vector);
    load_4(g, batch.grad[low], grad_dtype, i, n, vector);
    if (sums != nullptr) load_4(q, sums, sum_dtype, i, n, vector);
    if (o.exp_avg != nullptr) {
      load_4(m, state_at<A>(o.exp_avg, o.state_dtype, start), o.state_dtype, i, n, whole);
    }
    if (o.exp_avg_sq != nullptr) {
      load_4(v, state_at<A>(o.exp_avg_sq, o.state_dtype, start), o.state_dtype, i, n, whole);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const A mean = c.grad_scale * g[e];
      A square = mean * mean;
      if (sums != nullptr) {
        square = c.square_scale * q[e];
        const A excess = fabs(g[e]) - c.guard_absolute;
        flagged |=
            g[e] - g[e] == 0 && excess > 0 && excess * excess > c.guard * (q[e] + c.guard_tiny);
      }
      A along = mean;
      if (o.exp_avg != nullptr) {
        m[e] = c.keep_g * m[e] + c.take_g * mean;
        if (!o.centered) along = m[e];
      }
      if (o.exp_avg_sq != nullptr) {
        v[e] = c.keep_s * v[e] + c.take_s * square;
        A d = v[e];
        if (o.centered) d -= m[e] * m[e], d = (d + fabs(d)) / 2;  // rounding can make it negative
        along /= (o.squared_denominator ? d : sqrt(d)) + c.eps;
      }
      p[e] = c.keep * p[e] - c.step_size * along;
    }
    store_4(p, batch.param[low], param_dtype, i, n, vector);
    if (o.exp_avg != nullptr) {
      store_state(m, o.exp_avg, o.state_dtype, start, i, n, whole, c.seed, 0);
    }
    if (o.exp_avg_sq != nullptr) {
      store_state(v, o.exp_avg_sq, o.state_dtype, start, i, n, whole, c.seed, 16);
    }
  }
  // All that write it write the same.
  if (flagged && o.guard_rounds > 0) o.violations[batch.index[low] * o.flag_stride] = 1;
}

__global__ void __launch_bounds__(kTensors)
    count_examples(const __grid_constant__ Batch batch, const __grid_constant__ Optimizer o) {
  const int i = static_cast<int>(threadIdx.x);
  if (i < batch.count && proceeds(o)) {
    o.examples_seen[batch.index[i] * o.seen_stride] += read(o.batch_size);
  }
}

template <class A>
void step_all(const std::vector<const OptimizerTensor*>& tensors, const Optimizer& o,
              const Device& device) {
  for (size_t from = 0; from < tensors.size(); from += kTensors) {
    static thread_local Batch batch;
    batch.count =
        static_cast<int32_t>(tensors.size() - from < kTensors ? tensors.size() - from : kTensors);
    batch.first[0] = 0;
    for (int i = 0; i < batch.count; ++i) {
      const OptimizerTensor& t = *tensors[from + static_cast<size_t>(i)];
      batch.param[i] = t.param, batch.grad[i] = t.grad;
      batch.sum_grad_squared[i] = t.sum_grad_squared;
      batch.n[i] = t.n, batch.start[i] = t.start, batch.index[i] = t.index;
      batch.param_dtype[i] = static_cast<uint8_t>(t.param_dtype);
      batch.grad_dtype[i] = static_cast<uint8_t>(t.grad_dtype);
      batch.aligned[i] =
          is_aligned(t.param) && is_aligned(t.grad) && is_aligned(t.sum_grad_squared);
      batch.first[i + 1] = batch.first[i] + static_cast<uint32_t>(ceil_div(t.n, kChunk));
    }
    launch(step_batch<A>, {batch.first[batch.count], kThreads}, device.stream, batch, o);
    launch(count_examples, {1, kTensors}, device.stream, batch, o);
  }
}

}  // namespace

void optimizer_step(const Optimizer& o, const Device& device) {
  std::vector<const OptimizerTensor*> single, wide;
  for (int64_t i = 0; i < o.count; ++i) {
    const OptimizerTensor& t = o.tensors[i];
    bool f64 = t.param_dtype == DType::f64 || t.grad_dtype == DType::f64;
    (f64 ? wide : single).push_back(&t);
  }
  step_all<float>(single, o, device);
  step_all<double>(wide, o, device);
}

}  // namespace perexample::cuda
