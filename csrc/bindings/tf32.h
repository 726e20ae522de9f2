// Free of torch, for csrc/module.cpp too.
#pragma once

#include "../cpu/kernels.h"

namespace perexample {

// Whether torch may round float32 products of matrices to TF32 on CUDA, as its user chose by
// torch.backends.cuda.matmul.fp32_precision or by one of its older names.
PX_EXPORT bool tf32_allowed();

}  // namespace perexample
