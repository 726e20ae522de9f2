// Takes the place of linear.cuh in the mutants of conv.cu: float32, and one tile for either load.
#pragma once

#include "linear_mma.cuh"

namespace perexample::cuda {

template <class X>
bool launch_portable(Strided dy, X x, DType, bool, int64_t groups, int64_t batch, int64_t positions,
                     const Matrix& out, const Moments& bias, const Device& device) {
  auto with = [&](auto can) {
    launch_mma<MmaTile<Math::kTf32x3, 64, 64, 32, 32, 16, decltype(can)::value, false>>(
        dy, x, groups, batch, positions, out, bias, device);
  };
  if (vectors(dy, 4) && vectors(x, 4)) {
    with(std::true_type{});
  } else {
    with(std::false_type{});
  }
  return true;
}

}  // namespace perexample::cuda
