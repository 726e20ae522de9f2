// What a device is.
#include <mutex>
#include <vector>

#include "kernels.h"
#include "ptx.cuh"

namespace perexample::cuda {

const bool built = true;

Device device(int index) {
  static std::mutex mutex;
  static std::vector<Device> known;
  check(cudaSetDevice(index), "cudaSetDevice");
  std::lock_guard<std::mutex> lock(mutex);
  if (static_cast<size_t>(index) >= known.size()) known.resize(static_cast<size_t>(index) + 1);
  Device& d = known[static_cast<size_t>(index)];
  if (d.multiprocessors == 0) {
    int major = 0, minor = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index), "capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index), "capability");
    check(cudaDeviceGetAttribute(&d.multiprocessors, cudaDevAttrMultiProcessorCount, index),
          "multiprocessors");
    d.index = index, d.capability = 10 * major + minor;
  }
  return d;
}

}  // namespace perexample::cuda
