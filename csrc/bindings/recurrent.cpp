#include "common.h"

namespace perexample {
namespace {

// A tensor (B, width) whose rows the kernel can walk: itself or a contiguous copy. `finish` takes
// back what the kernel has written to a copy.
class Rows {
 public:
  Rows(const char* op, const char* name, const Tensor& tensor, int64_t batch, int64_t width,
       DType dtype, bool written = false)
      : original_(tensor), rows_(tensor), written_(written) {
    STD_TORCH_CHECK(shape_of(tensor) == (Shape{batch, width}), op, ": ", name, " must be (", batch,
                    ", ", width, ")");
    STD_TORCH_CHECK(dtype_of(op, name, tensor) == dtype, op, ": all tensors must have one dtype");
    if (width > 1 && tensor.stride(1) != 1) {
      // Not contiguous(), which may return the tensor itself.
      rows_ = empty({batch, width}, dtype);
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(rows_.get(), tensor.get(), 0));
      copied_ = true;
    }
  }
  void finish() const {
    if (copied_ && written_) {
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(original_.get(), rows_.get(), 0));
    }
  }
  void* data() const { return rows_.mutable_data_ptr(); }
  const void* const_data() const { return rows_.const_data_ptr(); }
  int64_t stride() const { return rows_.stride(0); }

 private:
  Tensor original_, rows_;
  bool written_, copied_ = false;
};

// A tensor of float32 or float64 without gaps: itself or a copy. Half precision is widened, since a
// recurrence that rounds every state would gain nothing.
class Whole {
 public:
  Whole(const char* op, const char* name, const Tensor& tensor, const Shape& shape, DType dtype)
      : original_(tensor), whole_(tensor) {
    STD_TORCH_CHECK(shape_of(tensor) == shape, op, ": ", name, " has a wrong shape");
    STD_TORCH_CHECK(dtype_of(op, name, tensor) == dtype, op, ": all tensors must have one dtype");
    copied_ = accumulate_dtype(dtype) != dtype || !tensor.is_contiguous();
    if (copied_) {
      whole_ = empty(shape, accumulate_dtype(dtype));
      TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(whole_.get(), tensor.get(), 0));
    }
  }
  void finish() const {
    if (copied_) TORCH_ERROR_CODE_CHECK(aoti_torch_copy_(original_.get(), whole_.get(), 0));
  }
  void* data() const { return whole_.mutable_data_ptr(); }

 private:
  Tensor original_, whole_;
  bool copied_;
};

// What both passes take: gates (T, B, 4 H), cells (T + 1, B, H) and the weights.
class LstmArguments {
 public:
  LstmArguments(const char* op, const Tensor& gates, const Tensor& cells, const Tensor& weight_hh,
                const Optional& weight_hr, const Ints& active, bool reverse)
      : dtype(dtype_of(op, "gates", gates)),
        steps(gates.size(0)),
        batch(gates.size(1)),
        size(cells.size(2)),
        width(weight_hh.size(1)),
        gates(op, "gates", gates, {steps, batch, 4 * size}, dtype),
        cells(op, "cells", cells, {steps + 1, batch, size}, dtype),
        active_(active),
        weight_hh_(op, "weight_hh", weight_hh, {4 * size, width}, dtype),
        workspace_(empty({0}, DType::f32)) {
    if (weight_hr) weight_hr_.emplace(op, "weight_hr", *weight_hr, Shape{width, size}, dtype);
    STD_TORCH_CHECK(weight_hr || width == size, op, ": weight_hh must be (4 H, H)");
    STD_TORCH_CHECK(active.empty() || static_cast<int64_t>(active.size()) == steps, op,
                    ": active must be of T numbers");
    for (int64_t n : active) {
      STD_TORCH_CHECK(n >= 0 && n <= batch, op, ": active must be from 0 to B");
    }
    a.T = steps, a.B = batch, a.H = size, a.P = width, a.reverse = reverse;
    a.dtype = accumulate_dtype(dtype);
    a.active = active_.empty() ? nullptr : active_.data();
    a.weight_hh = weight_hh_.data(), a.weight_hr = weight_hr_ ? weight_hr_->data() : nullptr;
    a.gates = this->gates.data(), a.cells = this->cells.data();
    workspace_ = empty({a.workspace_size()}, a.dtype);
    a.workspace = workspace_.mutable_data_ptr();
  }

  DType dtype;
  int64_t steps, batch, size, width;
  Whole gates, cells;
  cpu::Lstm a{};

 private:
  Ints active_;
  Whole weight_hh_;
  std::optional<Whole> weight_hr_;
  Tensor workspace_;
};

void lstm_forward_(const Tensor gates, const Tensor states, const Tensor cells,
                   const Tensor weight_hh, const Optional weight_hr, const Ints active,
                   bool reverse) {
  constexpr const char* op = "lstm_forward_";
  STD_TORCH_CHECK(gates.dim() == 3 && cells.dim() == 3 && weight_hh.dim() == 2, op,
                  ": gates must be (T, B, 4 H), cells (T + 1, B, H), weight_hh (4 H, P)");
  LstmArguments all(op, gates, cells, weight_hh, weight_hr, active, reverse);
  Whole state_rows(op, "states", states, {all.steps + 1, all.batch, all.width}, all.dtype);
  all.a.states = state_rows.data();
  cpu::kernels().lstm_forward(all.a, parallel());
  for (const Whole* written : {&all.gates, &all.cells, &state_rows}) written->finish();
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("lstm_forward_", TORCH_BOX(&lstm_forward_));
}

void lstm_backward_(const Tensor dgates, const Optional dstates, const Tensor dh, const Tensor dc,
                    const Tensor dy, const Tensor gates, const Tensor cells, const Tensor weight_hh,
                    const Optional weight_hr, const Ints active, bool reverse) {
  constexpr const char* op = "lstm_backward_";
  STD_TORCH_CHECK(gates.dim() == 3 && cells.dim() == 3 && weight_hh.dim() == 2, op,
                  ": gates must be (T, B, 4 H), cells (T + 1, B, H), weight_hh (4 H, P)");
  STD_TORCH_CHECK(dstates.has_value() == weight_hr.has_value(), op,
                  ": dstates must be there where weight_hr is");
  LstmArguments all(op, gates, cells, weight_hh, weight_hr, active, reverse);
  const Shape outputs = {all.steps, all.batch, all.width};
  Whole dgate_rows(op, "dgates", dgates, {all.steps, all.batch, 4 * all.size}, all.dtype);
  Whole dh_rows(op, "dh", dh, {all.batch, all.width}, all.dtype);
  Whole dc_rows(op, "dc", dc, {all.batch, all.size}, all.dtype);
  std::optional<Whole> dstate_rows, dy_rows;
  if (dstates) dstate_rows.emplace(op, "dstates", *dstates, outputs, all.dtype);
  cpu::LstmBackward a{};
  a.forward = all.a;
  if (shape_of(dy) == outputs && dtype_of(op, "dy", dy) == all.a.dtype && dy.stride(2) == 1) {
    a.dy = dy.const_data_ptr(), a.dy_stride[0] = dy.stride(0), a.dy_stride[1] = dy.stride(1);
  } else {
    dy_rows.emplace(op, "dy", dy, outputs, all.dtype);
    a.dy = dy_rows->data(), a.dy_stride[0] = all.batch * all.width, a.dy_stride[1] = all.width;
  }
  a.dgates = dgate_rows.data(), a.dh = dh_rows.data(), a.dc = dc_rows.data();
  a.dstates = dstate_rows ? dstate_rows->data() : nullptr;
  cpu::kernels().lstm_backward(a, parallel());
  for (const Whole* written : {&dgate_rows, &dh_rows, &dc_rows}) written->finish();
  if (dstate_rows) dstate_rows->finish();
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("lstm_backward_", TORCH_BOX(&lstm_backward_));
}

void gru_cell_backward_(const Tensor dgates, const Tensor dhidden, const Tensor dh,
                        const Tensor gates, const Tensor hidden, const Tensor state) {
  constexpr const char* op = "gru_cell_backward_";
  STD_TORCH_CHECK(dh.dim() == 2, op, ": dh must be (B, H)");
  int64_t batch = dh.size(0), width = dh.size(1);
  DType dtype = dtype_of(op, "dh", dh);
  Rows dgate_rows(op, "dgates", dgates, batch, 3 * width, dtype, true);
  Rows dhidden_rows(op, "dhidden", dhidden, batch, 3 * width, dtype, true);
  Rows dh_rows(op, "dh", dh, batch, width, dtype, true);
  Rows gate_rows(op, "gates", gates, batch, 3 * width, dtype);
  Rows hidden_rows(op, "hidden", hidden, batch, width, dtype);
  Rows state_rows(op, "state", state, batch, width, dtype);
  cpu::GruCellBackward a{batch,
                         width,
                         dtype,
                         dgate_rows.data(),
                         dhidden_rows.data(),
                         dh_rows.data(),
                         gate_rows.const_data(),
                         hidden_rows.const_data(),
                         state_rows.const_data(),
                         dgate_rows.stride(),
                         dhidden_rows.stride(),
                         dh_rows.stride(),
                         gate_rows.stride(),
                         hidden_rows.stride(),
                         state_rows.stride()};
  cpu::kernels().gru_cell_backward(a, parallel());
  for (const Rows* rows : {&dgate_rows, &dhidden_rows, &dh_rows}) rows->finish();
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("gru_cell_backward_", TORCH_BOX(&gru_cell_backward_));
}

}  // namespace
}  // namespace perexample
