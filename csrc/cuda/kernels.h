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
using cpu::DType;
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

// `tf32`: float32 products may be rounded to TF32, as torch.backends.cuda.matmul allows.
void linear_moments(const Linear&, bool tf32, const Device&);
void bias_moments(const Bias&, const Device&);
void reduce_moments(const Reduce&, const Device&);

}  // namespace perexample::cuda
