// Runs the CUDA launchers of one op under the emulation, on flat argument lists, for
// tests/test_cuda_emulation.py. Workspaces start as NaN and are guarded at their ends.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "emulation.h"
#include "kernels.h"

namespace {

constexpr unsigned char kPoison = 0xff, kGuard = 0x5a;
constexpr size_t kGuardBytes = 4096;

struct Workspaces {
  std::vector<std::pair<unsigned char*, size_t>> blocks;

  ~Workspaces() {
    for (auto& [data, bytes] : blocks) std::free(data);
  }
  void check() const {
    for (auto& [data, bytes] : blocks) {
      for (size_t i = bytes; i < bytes + kGuardBytes; ++i) {
        if (data[i] != kGuard) throw std::runtime_error("wrote behind a workspace");
      }
    }
  }
};

void* allocate(void* ctx, int64_t bytes) {
  const size_t size = static_cast<size_t>(bytes);
  auto* data =
      static_cast<unsigned char*>(std::aligned_alloc(256, (size + kGuardBytes + 255) / 256 * 256));
  std::memset(data, kPoison, size);
  std::memset(data + size, kGuard, kGuardBytes);
  static_cast<Workspaces*>(ctx)->blocks.emplace_back(data, size);
  return data;
}

}  // namespace

// Integers, pointers and reals are those of the op's struct, in the order of its fields. Returns
// null, or what went wrong; `workspace` is the bytes asked for.
extern "C" PX_EXPORT const char* px_call(const char* op, const int64_t* integers,
                                         void* const* pointers,
                                         [[maybe_unused]] const double* reals, int capability,
                                         int multiprocessors, uint32_t seed, int64_t* workspace) {
  using namespace perexample::cuda;
  auto n = [&] { return *integers++; };
  auto p = [&] { return *pointers++; };
  auto type = [&] { return static_cast<DType>(n()); };
  auto is = [&](const char* name) { return std::strcmp(op, name) == 0; };
  static std::string error;
  Workspaces workspaces;
  const Device device{0, capability, multiprocessors, nullptr, allocate, &workspaces};
  emulation::seed = seed;
  emulation::error.clear();
  try {
    if (is("linear_moments")) {
      Linear a{n(),    n(), n(), n(), type(), p(), {n(), n(), n()}, p(), {n(), n(), n()},
               type(), p(), p(), p(), p()};
      linear_moments(a, n() != 0, device);
    } else if (is("bias_moments")) {
      bias_moments({n(), n(), n(), type(), p(), {n(), n(), n()}, type(), p(), p()}, device);
    } else if (is("reduce_moments")) {
      reduce_moments({n(), n(), type(), p(), {n(), n()}, type(), p(), p()}, device);
    } else {
      throw std::runtime_error("no such op");
    }
    workspaces.check();
  } catch (const std::exception& e) {
    error = e.what();
    return error.c_str();
  }
  *workspace = 0;
  for (auto& [data, bytes] : workspaces.blocks) *workspace += static_cast<int64_t>(bytes);
  return nullptr;
}
