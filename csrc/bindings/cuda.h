// What the bindings share about CUDA.
#pragma once

#include <torch/csrc/stable/accelerator.h>

#include "../cuda/kernels.h"
#include "common.h"

namespace perexample {

// While it lives: the device of `like` is current, and work goes to torch's current stream there.
// Workspaces come from torch's allocator, which hands memory on in stream order.
class OnCuda {
 public:
  explicit OnCuda(Where where);
  OnCuda(const OnCuda&) = delete;
  OnCuda& operator=(const OnCuda&) = delete;
  operator const cuda::Device&() const { return device_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  Where where_;
  std::vector<Tensor> workspaces_;
  cuda::Device device_;
};

}  // namespace perexample
