#include "cuda.h"

#include <dlfcn.h>

namespace perexample {
namespace {

// torch::stable gives a stream's handle from torch 2.13 on; before, this function of libtorch_cuda
// does. It is looked up at run time, for a CPU build of torch does not have it.
void* current_stream(int32_t index) {
  using Function = int32_t (*)(int32_t, void**);
  static const auto function = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return library == nullptr
               ? nullptr
               : reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr && function(index, &stream) == 0,
                  "perexample: this build of torch gives no CUDA stream");
  return stream;
}

}  // namespace

OnCuda::OnCuda(Where where)
    : guard_(where.index), where_(where), device_(cuda::device(where.index)) {
  device_.stream = current_stream(where.index);
  device_.ctx = this;
  device_.allocate = [](void* self, int64_t bytes) {
    auto* on = static_cast<OnCuda*>(self);
    on->workspaces_.push_back(empty({(bytes + 3) / 4}, DType::f32, on->where_));
    return on->workspaces_.back().mutable_data_ptr();
  };
}

}  // namespace perexample
