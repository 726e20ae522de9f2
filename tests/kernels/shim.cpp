// Runs the kernels of one capability on flat argument lists, for tests/kernels/flat.py: without
// torch, with scratch memory that is poisoned on every request and guarded at its end, and with
// tasks in any order or on threads that know nothing of one another.
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#include "kernels.h"

namespace perexample::cpu {

namespace PX_CAPABILITY {
extern const Kernels table;
}

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN in every floating dtype
constexpr unsigned char kGuard = 0x5a;
constexpr int64_t kGuardBytes = 256;

std::atomic<int64_t> overruns{0}, tasks_run{0};

struct Slot {
  unsigned char* data = nullptr;
  int64_t bytes = 0;

  void release() {
    if (data == nullptr) return;
    for (int64_t i = bytes; i < bytes + kGuardBytes; ++i) overruns += data[i] != kGuard;
    std::free(data);
    data = nullptr;
  }
  ~Slot() { release(); }
};

thread_local Slot slots[4];

enum Order { kForward, kBackward, kThreads };
int order;

void run(int64_t tasks, void (*body)(void* ctx, int64_t task), void* ctx) {
  tasks_run += tasks;
  if (order == kThreads) {
    std::vector<std::thread> threads;
    for (int64_t first = 0; first < 2; ++first) {
      threads.emplace_back([=] {
        for (int64_t task = first; task < tasks; task += 2) body(ctx, task);
      });
    }
    for (auto& thread : threads) thread.join();
  } else {
    for (int64_t i = 0; i < tasks; ++i) body(ctx, order == kForward ? i : tasks - 1 - i);
  }
}

}  // namespace

void* scratch(int64_t bytes, int slot) {
  Slot& s = slots[slot];
  s.release();
  s.bytes = bytes;
  s.data = static_cast<unsigned char*>(
      std::aligned_alloc(64, static_cast<size_t>((bytes + kGuardBytes + 63) / 64 * 64)));
  std::memset(s.data, kPoison, static_cast<size_t>(bytes));
  std::memset(s.data + bytes, kGuard, kGuardBytes);
  return s.data;
}

}  // namespace perexample::cpu

// Integers, pointers and reals are those of the op's struct in kernels.h, in the order of its
// fields. Returns the number of tasks, or minus the number of bytes written behind scratch memory.
extern "C" PX_EXPORT int64_t px_call(const char* op, const int64_t* integers, void* const* pointers,
                                     const double* reals, int64_t threads, int task_order) {
  using namespace perexample::cpu;
  auto n = [&] { return *integers++; };
  auto p = [&] { return *pointers++; };
  auto r = [&] { return *reals++; };
  auto type = [&] { return static_cast<DType>(n()); };
  const Kernels& kernels = PX_CAPABILITY::table;
  const Parallel parallel{threads, run};
  order = task_order;
  tasks_run = overruns = 0;
  auto is = [&](const char* name) { return std::strcmp(op, name) == 0; };
  if (is("linear_moments")) {
    Linear a{n(),    n(), n(), n(), type(), p(), {n(), n(), n()}, p(), {n(), n(), n()},
             type(), p(), p(), p(), p()};
    kernels.linear_moments(a, parallel);
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
    kernels.conv_moments(a, parallel);
  } else if (is("bias_moments")) {
    Bias a{n(), n(), n(), type(), p(), {n(), n(), n()}, type(), p(), p()};
    kernels.bias_moments(a, parallel);
  } else if (is("reduce_moments")) {
    Reduce a{n(), n(), type(), p(), {n(), n()}, type(), p(), p()};
    kernels.reduce_moments(a, parallel);
  } else if (is("embedding_moments")) {
    Embedding a{n(),
                n(),
                n(),
                n(),
                type(),
                p(),
                {n(), n(), n()},
                static_cast<const int64_t*>(p()),
                {n(), n()},
                n(),
                type(),
                p(),
                p()};
    kernels.embedding_moments(a, parallel);
  } else if (is("layer_norm_moments")) {
    LayerNorm a{n(), n(),        n(),        n() != 0, r(), type(), type(), p(), p(), p(),
                p(), {n(), n()}, {n(), n()}, p(),      p(), p(),    p(),    p(), p()};
    kernels.layer_norm_moments(a, parallel);
  } else if (is("group_norm_moments")) {
    GroupNorm a{n(), n(), n(), n(), n() != 0, r(), type(), type(), p(),
                p(), p(), p(), p(), p(),      p(), p(),    p(),    p()};
    kernels.group_norm_moments(a, parallel);
  } else if (is("lstm_forward_") || is("lstm_backward_")) {
    Lstm a{};
    a.T = n(), a.B = n(), a.H = n(), a.P = n(), a.dtype = type(), a.reverse = n() != 0;
    LstmBackward back{};
    back.dy_stride[0] = n(), back.dy_stride[1] = n();
    a.active = static_cast<const int64_t*>(p());
    a.weight_hh = p(), a.weight_hr = p();
    a.gates = p(), a.states = p(), a.cells = p();
    back.dy = p(), back.dgates = p(), back.dstates = p(), back.dh = p(), back.dc = p();
    const int64_t size = a.workspace_size();
    // Slot 3 of this thread is not the kernel's.
    a.workspace = scratch(size * (a.dtype == DType::f64 ? 8 : 4), 3);
    if (is("lstm_forward_")) {
      kernels.lstm_forward(a, parallel);
    } else {
      back.forward = a;
      kernels.lstm_backward(back, parallel);
    }
  } else if (is("gru_cell_backward_")) {
    GruCellBackward a{n(), n(), type(), p(), p(), p(), p(), p(), p(), n(), n(), n(), n(), n(), n()};
    kernels.gru_cell_backward(a, parallel);
  } else if (is("optimizer_step_")) {
    std::vector<OptimizerTensor> tensors(static_cast<size_t>(n()));
    for (OptimizerTensor& t : tensors) {
      t.n = n(), t.param_dtype = type(), t.grad_dtype = type(), t.sum_dtype = type();
      t.seed = static_cast<uint32_t>(n());
      t.param = p(), t.grad = p(), t.sum_grad_squared = p(), t.exp_avg = p(), t.exp_avg_sq = p();
      t.kappa_g = r(), t.kappa_s = r(), t.guard_slack = r(), t.guard_absolute = r();
      t.violation = static_cast<int32_t*>(p());
    }
    Optimizer a{};
    a.count = static_cast<int64_t>(tensors.size()), a.tensors = tensors.data();
    a.state_dtype = type(), a.centered = n() != 0, a.squared_denominator = n() != 0;
    a.batch_size = r(), a.grad_scale = r(), a.square_scale = r();
    a.step_size = r(), a.decay = r(), a.eps = r();
    kernels.optimizer_step(a, parallel);
  } else {
    std::abort();
  }
  for (Slot& slot : slots) slot.release();
  return overruns > 0 ? -overruns : tasks_run.load();
}
