// linear_moments with the Hopper kernel alone, and few of its tiles: compiled for every mutant.
#include "few.h"
#include "linear_wgmma.cuh"

namespace perexample::cuda {

void linear_moments(const Linear& a, bool, const Device& device) {
  const Strided x{nullptr, 0, 0, 0, 0, a.I, false};
  const Matrix out{{a.dw, a.dw_sq, a.grad_dtype}, a.O, a.I};
  const Moments bias{a.db, a.db_sq, a.grad_dtype};
  if (a.T <= 16) {
    launch_wgmma<WgmmaTile<false, 2, 16>>(a, x, out, bias, device);
  } else {
    launch_wgmma<WgmmaTile<false, 2, 0>>(a, x, out, bias, device);
  }
}

}  // namespace perexample::cuda
