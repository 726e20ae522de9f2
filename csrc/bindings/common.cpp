#include "common.h"

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <atomic>
#include <exception>
#include <mutex>

namespace perexample {
namespace {

// Workers take the next task as soon as they are free. An exception of a task leaves the parallel
// region by hand: torch's own propagation covers only some of its backends.
void run_tasks(int64_t tasks, void (*body)(void* ctx, int64_t task), void* ctx) {
  int64_t threads = std::min<int64_t>(tasks, torch::stable::get_num_threads());
  if (threads <= 1) {
    for (int64_t task = 0; task < tasks; ++task) body(ctx, task);
    return;
  }
  std::atomic<int64_t> next{0};
  std::exception_ptr error;
  std::mutex error_mutex;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    try {
      for (int64_t task; (task = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) {
        body(ctx, task);
      }
    } catch (...) {
      next.store(tasks, std::memory_order_relaxed);
      std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
  });
  if (error) std::rethrow_exception(error);
}

// torch's numbers of the four dtypes, in the order of DType.
int32_t code(DType dtype) {
  static const int32_t codes[] = {aoti_torch_dtype_float32(), aoti_torch_dtype_float64(),
                                  aoti_torch_dtype_bfloat16(), aoti_torch_dtype_float16()};
  return codes[static_cast<int>(dtype)];
}

// Gradients and second moments of large parameters are new memory in every step, and what a write
// to new memory costs is the page faults: ask for huge pages, where the system grants them on
// request.
void want_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t huge = uintptr_t{1} << 21;
  if (bytes < static_cast<int64_t>(2 * huge)) return;
  uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + huge - 1) / huge * huge;
  uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / huge * huge;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);  // advice: may fail
#endif
}

}  // namespace

cpu::Parallel parallel() { return {torch::stable::get_num_threads(), run_tasks}; }

DType dtype_of(const char* op, const char* name, AtenTensorHandle tensor) {
  int32_t found;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(tensor, &found));
  for (DType dtype : {DType::f32, DType::f64, DType::bf16, DType::f16}) {
    if (found == code(dtype)) return dtype;
  }
  STD_TORCH_CHECK(false, op, ": ", name, " must be float64, float32, bfloat16 or float16");
}

DType dtype_of(const char* op, const char* name, const Tensor& tensor) {
  return dtype_of(op, name, tensor.get());
}

DType gradient_dtype(const char* op, std::optional<ScalarType> wanted, DType inputs) {
  if (!wanted) return inputs;
  switch (*wanted) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::Double:
      return DType::f64;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, op, ": dtype must be float64, float32, bfloat16 or float16");
  }
}

DType accumulate_dtype(DType dtype) { return dtype == DType::f64 ? DType::f64 : DType::f32; }

Shape shape_of(const Tensor& tensor) {
  auto sizes = tensor.sizes();
  return Shape(sizes.begin(), sizes.end());
}

Shape contiguous_strides(const Shape& shape) {
  Shape strides(shape.size());
  int64_t stride = 1;
  for (size_t d = shape.size(); d-- > 0;) {
    strides[d] = stride;
    stride *= std::max<int64_t>(shape[d], 1);
  }
  return strides;
}

Where::Where() : type(aoti_torch_device_type_cpu()) {}

Where::Where(AtenTensorHandle tensor) {
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(tensor, &type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(tensor, &index));
  index = std::max(index, 0);
}

bool Where::on_cuda() const { return type == aoti_torch_device_type_cuda(); }

Tensor empty_strided(const Shape& shape, const Shape& strides, int32_t dtype, Where where) {
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                  strides.data(), dtype, where.type, where.index,
                                                  &handle));
  return Tensor(handle);
}

Tensor empty(const Shape& shape, DType dtype, Where where) {
  Tensor tensor = empty_strided(shape, contiguous_strides(shape), code(dtype), where);
  if (where.on_cuda()) return tensor;
  int64_t bytes = dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2;
  for (int64_t size : shape) bytes *= size;
  want_huge_pages(tensor.mutable_data_ptr(), bytes);
  return tensor;
}

void copy_strides(const Tensor& tensor, int64_t* out) {
  auto strides = tensor.strides();
  std::copy(strides.begin(), strides.end(), out);
}

const void* data_or_null(const Optional& tensor) {
  return tensor ? tensor->const_data_ptr() : nullptr;
}

Tensor contiguous_tensor(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

Optional contiguous(const Optional& tensor) {
  return tensor ? Optional(contiguous_tensor(*tensor)) : std::nullopt;
}

}  // namespace perexample
