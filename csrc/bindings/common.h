// What the bindings share. Only csrc/bindings knows torch, and only through the LibTorch stable
// ABI, so that one library serves every torch from TORCH_TARGET_VERSION on and every Python.
//
// A binding takes tensors, hands raw pointers to csrc/cpu, and returns tensors. Schemas, fake
// kernels and full validation are in pysrc/perexample/ops; the checks here keep a direct call of
// torch.ops from reading out of bounds. Each op is registered by itself, so that the dispatcher
// knows its line.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdint>
#include <optional>
#include <tuple>
#include <vector>

#include "../cpu/kernels.h"

namespace perexample {

using cpu::DType;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Shape = std::vector<int64_t>;
using Ints = std::vector<int64_t>;
using Optional = std::optional<Tensor>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// torch's threads.
cpu::Parallel parallel();

DType dtype_of(const char* op, const char* name, AtenTensorHandle tensor);
DType dtype_of(const char* op, const char* name, const Tensor& tensor);

// The dtype that the caller wants for the gradient: that of the inputs by default.
DType gradient_dtype(const char* op, std::optional<ScalarType> wanted, DType inputs);

// The dtype of second moments and of every accumulation.
DType accumulate_dtype(DType dtype);

Shape shape_of(const Tensor& tensor);
Shape contiguous_strides(const Shape& shape);

// The device of a tensor; the CPU by default.
struct Where {
  int32_t type, index = 0;

  Where();
  explicit Where(AtenTensorHandle tensor);
  explicit Where(const Tensor& tensor) : Where(tensor.get()) {}
  bool operator==(const Where&) const = default;
  bool on_cuda() const;
};

// Uninitialised tensors.
Tensor empty_strided(const Shape& shape, const Shape& strides, int32_t dtype, Where where = {});
Tensor empty(const Shape& shape, DType dtype, Where where = {});

// A gradient and its second moment; without elements, and null to the kernels, if not wanted.
struct Moments {
  Tensor sum, sum_sq;

  Moments(bool wanted, const Shape& shape, DType gradient, DType inputs, Where where = {})
      : sum(empty(wanted ? shape : Shape{0}, gradient, where)),
        sum_sq(empty(wanted ? shape : Shape{0}, accumulate_dtype(inputs), where)) {}
  void* sum_data() const { return sum.mutable_data_ptr(); }
  void* sum_sq_data() const { return sum_sq.mutable_data_ptr(); }
};

void copy_strides(const Tensor& tensor, int64_t* out);
const void* data_or_null(const Optional& tensor);
// The tensor itself where it is contiguous: the dispatcher would take a microsecond to find that.
Tensor contiguous_tensor(const Tensor& tensor);
Optional contiguous(const Optional& tensor);

}  // namespace perexample
