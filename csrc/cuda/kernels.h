// The CUDA launchers of perexample: raw pointers and a stream in, free of torch and of CUDA's
// headers.
//
// Arguments, letters and contracts are those of the CPU kernels (csrc/cpu/kernels.h); pointers are
// device memory. Every launcher writes all of its outputs, in stream order, without waiting for the
// device and without copying from the host, so that it can be captured in a CUDA graph. Sums are
// taken in an order that depends on shapes and on the device's number of multiprocessors only:
// nothing adds floating-point numbers atomically.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"

namespace perexample::cuda {

using cpu::Bias;
using cpu::Conv;
using cpu::DType;
using cpu::Embedding;
using cpu::GroupNorm;
using cpu::LayerNorm;
using cpu::Linear;
using cpu::Reduce;

// Whether this library has the launchers; without, they throw.
PX_EXPORT extern const bool built;

// Where a launcher works, and what it may use there.
struct Device {
  int index;
  int capability;       // 10 * major + minor
  int multiprocessors;  // how many CTAs of a large kernel run at once
  void* stream;         // cudaStream_t
  // Device memory, 256-byte aligned, valid until the stream has passed the launcher's last kernel.
  void* (*allocate)(void* ctx, int64_t bytes);
  void* ctx;
};

// What this device is, asked once for each; `stream` and `allocate` are left for the caller.
// Makes the device current for the runtime that the kernels are linked to.
Device device(int index);

// The one stride that walks the output's positions in row-major order; -1: there is none.
int64_t positions_stride(const Conv&);

// `tf32`: float32 products may be rounded to TF32, as torch.backends.cuda.matmul allows.
void linear_moments(const Linear&, bool tf32, const Device&);
// The strides of dy over its spatial dimensions must be those of one dimension
// (`positions_stride`).
void conv_moments(const Conv&, const Device&);
void bias_moments(const Bias&, const Device&);
void reduce_moments(const Reduce&, const Device&);
void layer_norm_moments(const LayerNorm&, const Device&);
void group_norm_moments(const GroupNorm&, const Device&);

// `rows`: the B T indices in ascending order; `order`: where each comes from, b T + t, ascending
// where rows are equal. `indices` of the struct is not read.
void embedding_moments(const Embedding&, const int64_t* rows, const int64_t* order, const Device&);

// A number that is known on the host, or read from the device when the kernel runs.
struct Scalar {
  const double* on_device;  // null: value
  double value;
};

// As cpu::OptimizerTensor and cpu::Optimizer, before the scalars are known.
struct OptimizerTensor {
  int64_t n;
  int64_t start;  // of its part in the flat state
  int32_t index;  // in examples_seen and violations
  DType param_dtype, grad_dtype;
  void* param;
  const void* grad;
  const void* sum_grad_squared;  // null: per batch
};
struct Optimizer {
  int64_t count;
  const OptimizerTensor* tensors;
  DType state_dtype;
  void* exp_avg;     // flat, or null
  void* exp_avg_sq;  // flat, or null
  double* examples_seen;
  int64_t seen_stride;
  int32_t* violations;
  int64_t flag_stride;
  Scalar batch_size, lr, grad_scale, found_inf;
  bool has_grad_scale, has_found_inf;
  double n_g, n_s, log_keep_g, log_keep_s;  // log(1 - 1 / n)
  double eps, weight_decay;
  bool centered, squared_denominator, lr_times_eps, correct_g, correct_s, power, mean_reduction,
      maximize;
  int64_t guard_rounds;
};
void optimizer_step(const Optimizer&, const Device&);

}  // namespace perexample::cuda
