// Runs the CUDA launchers of one op under the emulation, on flat argument lists, for
// tests/test_cuda_emulation.py. Workspaces start as NaN and are guarded at their ends.
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "common.cuh"
#include "emulation.h"

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
                                         void* const* pointers, const double* reals, int capability,
                                         int multiprocessors, uint32_t seed, int64_t* workspace) {
  using namespace perexample::cuda;
  auto n = [&] { return *integers++; };
  auto p = [&] { return *pointers++; };
  auto r = [&] { return *reals++; };
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
    } else if (is("conv_moments")) {
      Conv a{};
      a.B = n(), a.C = n(), a.O = n(), a.groups = n();
      for (int64_t* list : {a.in, a.out, a.kernel, a.stride, a.padding, a.dilation}) {
        for (int i = 0; i < 3; ++i) list[i] = n();
      }
      a.dtype = type(), a.dy = p();
      for (int64_t& stride : a.dy_stride) stride = n();
      a.x = p();
      for (int64_t& stride : a.x_stride) stride = n();
      a.grad_dtype = type(), a.dw = p(), a.dw_sq = p(), a.db = p(), a.db_sq = p();
      conv_moments(a, device);
    } else if (is("layer_norm_moments")) {
      LayerNorm a{};
      a.B = n(), a.T = n(), a.D = n(), a.centered = n(), a.eps = r(), a.dtype = type();
      a.weight_dtype = type();
      a.dy = p(), a.x = p(), a.mean = p(), a.rstd = p(), a.weight = p();
      for (int64_t* stride : {a.dy_stride, a.x_stride}) stride[0] = n(), stride[1] = n();
      a.dx = p(), a.dw = p(), a.dw_sq = p(), a.db = p(), a.db_sq = p();
      layer_norm_moments(a, device);
    } else if (is("group_norm_moments")) {
      GroupNorm a{};
      a.B = n(), a.C = n(), a.S = n(), a.groups = n(), a.constant = n(), a.eps = r();
      a.dtype = type(), a.weight_dtype = type();
      a.dy = p(), a.x = p(), a.mean = p(), a.rstd = p(), a.weight = p();
      a.dx = p(), a.dw = p(), a.dw_sq = p(), a.db = p(), a.db_sq = p();
      group_norm_moments(a, device);
    } else if (is("embedding_moments")) {
      Embedding a{};
      a.B = n(), a.T = n(), a.V = n(), a.D = n(), a.dtype = type(), a.dy = p();
      for (int64_t& stride : a.dy_stride) stride = n();
      a.padding_idx = n(), a.grad_dtype = type(), a.dw = p(), a.dw_sq = p();
      const auto* rows = static_cast<const int64_t*>(p());
      embedding_moments(a, rows, static_cast<const int64_t*>(p()), device);
    } else if (is("optimizer_step_")) {
      std::vector<OptimizerTensor> tensors(static_cast<size_t>(n()));
      for (OptimizerTensor& t : tensors) {
        t = {n(), n(), static_cast<int32_t>(n()), type(), type(), p(), p(), p()};
      }
      Optimizer o{};
      o.count = static_cast<int64_t>(tensors.size()), o.tensors = tensors.data();
      o.state_dtype = type(), o.exp_avg = p(), o.exp_avg_sq = p();
      o.examples_seen = static_cast<double*>(p()), o.violations = static_cast<int32_t*>(p());
      o.seen_stride = o.flag_stride = 1;
      for (Scalar* s : {&o.batch_size, &o.lr, &o.grad_scale, &o.found_inf}) {
        s->on_device = static_cast<const double*>(p());
      }
      o.has_grad_scale = o.grad_scale.on_device, o.has_found_inf = o.found_inf.on_device;
      o.n_g = r(), o.n_s = r(), o.log_keep_g = r(), o.log_keep_s = r(), o.eps = r();
      o.weight_decay = r();
      for (bool* flag : {&o.centered, &o.squared_denominator, &o.lr_times_eps, &o.correct_g,
                         &o.correct_s, &o.power, &o.mean_reduction, &o.maximize}) {
        *flag = n();
      }
      o.guard_rounds = n();
      optimizer_step(o, device);
    } else if (is("divide")) {
      const int64_t count = n();
      const auto *numbers = static_cast<const int64_t*>(p()),
                 *divisors = static_cast<const int64_t*>(p());
      auto *quotient = static_cast<int64_t*>(p()), *remainder = static_cast<int64_t*>(p());
      for (int64_t i = 0; i < count; ++i) {
        uint32_t whole, rest;
        Divisor(divisors[i]).divide(static_cast<uint32_t>(numbers[i]), whole, rest);
        quotient[i] = whole, remainder[i] = rest;
      }
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
