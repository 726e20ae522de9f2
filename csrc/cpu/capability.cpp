// Chooses the kernels at run time, and owns the scratch memory. Compiled once, without any
// instruction-set flag.
#include <cstdlib>
#include <cstring>
#include <new>

#include "kernels.h"

namespace perexample::cpu {

namespace generic {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512_bf16 {
extern const Kernels table;
}
#endif

namespace {

constexpr int kMaxCapabilities = 4;
constexpr int kSlots = 4;

struct Available {
  const Kernels* tables[kMaxCapabilities];
  int count = 0;

  Available() {
    tables[count++] = &generic::table;
#if defined(__x86_64__)
    __builtin_cpu_init();
    bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                __builtin_cpu_supports("f16c");
    bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                  __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (avx2) tables[count++] = &avx2::table;
    if (avx512) tables[count++] = &avx512::table;
    if (avx512 && __builtin_cpu_supports("avx512bf16")) tables[count++] = &avx512_bf16::table;
#endif
  }
};

const Available& available() {
  static const Available all;
  return all;
}

struct Buffers {
  void* data[kSlots] = {};
  int64_t size[kSlots] = {};
  ~Buffers() {
    for (void* p : data) std::free(p);
  }
};

thread_local Buffers buffers;

}  // namespace

const Kernels* const* available_kernels(int* count) {
  *count = available().count;
  return available().tables;
}

const Kernels& kernels() {
  static const Kernels* const chosen = [] {
    const Available& all = available();
    if (const char* name = std::getenv("PEREXAMPLE_CPU_CAPABILITY")) {
      for (int i = 0; i < all.count; ++i)
        if (std::strcmp(all.tables[i]->capability, name) == 0) return all.tables[i];
    }
    return all.tables[all.count - 1];
  }();
  return *chosen;
}

void* scratch(int64_t bytes, int slot) {
  void*& data = buffers.data[slot];
  int64_t& size = buffers.size[slot];
  if (bytes > size) {
    std::free(data);
    size = (bytes + bytes / 4 + 4095) / 4096 * 4096;
    data = std::aligned_alloc(4096, static_cast<size_t>(size));
    if (data == nullptr) {
      size = 0;
      throw std::bad_alloc();
    }
  }
  return data;
}

}  // namespace perexample::cpu
