// The Hopper kernel, for linear.cu.
#pragma once

#include "kernels.h"

namespace perexample::cuda {

// Whether the Hopper kernel takes these arguments on this device: 16-bit inputs whose rows TMA can
// read (dense, and 16 bytes aligned), and several positions.
bool takes_wgmma(const Linear&, const Device&);
// The bias is added in the same pass.
void linear_moments_wgmma(const Linear&, const Device&);

}  // namespace perexample::cuda
