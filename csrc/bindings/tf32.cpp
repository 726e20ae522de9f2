#include "tf32.h"

#include <dlfcn.h>

namespace perexample {

// The stable ABI does not tell. What torch's own products ask is looked up at run time, by its name
// in the library: at::Context::float32Precision(Float32Backend, Float32Op) const. A torch without
// it gets the exact products.
bool tf32_allowed() {
  using GlobalContext = void* (*)();
  using Float32Precision = int (*)(const void* context, int backend, int op);
  constexpr int kCuda = 1, kMatmul = 3, kTf32 = 2;  // of torch's enums
  static void* const library = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  auto find = [](const char* name) { return library == nullptr ? nullptr : dlsym(library, name); };
  static const auto context = reinterpret_cast<GlobalContext>(find("_ZN2at13globalContextEv"));
  static const auto precision = reinterpret_cast<Float32Precision>(
      find("_ZNK2at7Context16float32PrecisionENS_14Float32BackendENS_9Float32OpE"));
  return context != nullptr && precision != nullptr &&
         precision(context(), kCuda, kMatmul) == kTf32;
}

}  // namespace perexample
