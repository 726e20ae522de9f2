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

void lstm_cell_(const Tensor gates, const Tensor cell, const Tensor state, const Tensor h) {
  constexpr const char* op = "lstm_cell_";
  STD_TORCH_CHECK(cell.dim() == 2, op, ": cell must be (B, H)");
  int64_t batch = cell.size(0), width = cell.size(1);
  DType dtype = dtype_of(op, "cell", cell);
  Rows gate_rows(op, "gates", gates, batch, 4 * width, dtype, true);
  Rows cell_rows(op, "cell", cell, batch, width, dtype);
  Rows state_rows(op, "state", state, batch, width, dtype, true);
  Rows h_rows(op, "h", h, batch, width, dtype, true);
  cpu::LstmCell a{batch,
                  width,
                  dtype,
                  gate_rows.data(),
                  cell_rows.const_data(),
                  state_rows.data(),
                  h_rows.data(),
                  gate_rows.stride(),
                  cell_rows.stride(),
                  state_rows.stride(),
                  h_rows.stride()};
  cpu::kernels().lstm_cell(a, parallel());
  for (const Rows* rows : {&gate_rows, &state_rows, &h_rows}) rows->finish();
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) { m.impl("lstm_cell_", TORCH_BOX(&lstm_cell_)); }

void lstm_cell_backward_(const Tensor dgates, const Tensor dc, const Tensor dh, const Tensor gates,
                         const Tensor state, const Tensor cell) {
  constexpr const char* op = "lstm_cell_backward_";
  STD_TORCH_CHECK(dh.dim() == 2, op, ": dh must be (B, H)");
  int64_t batch = dh.size(0), width = dh.size(1);
  DType dtype = dtype_of(op, "dh", dh);
  Rows dgate_rows(op, "dgates", dgates, batch, 4 * width, dtype, true);
  Rows dc_rows(op, "dc", dc, batch, width, dtype, true);
  Rows dh_rows(op, "dh", dh, batch, width, dtype);
  Rows gate_rows(op, "gates", gates, batch, 4 * width, dtype);
  Rows state_rows(op, "state", state, batch, width, dtype);
  Rows cell_rows(op, "cell", cell, batch, width, dtype);
  cpu::LstmCellBackward a{batch,
                          width,
                          dtype,
                          dgate_rows.data(),
                          dc_rows.data(),
                          dh_rows.const_data(),
                          gate_rows.const_data(),
                          state_rows.const_data(),
                          cell_rows.const_data(),
                          dgate_rows.stride(),
                          dc_rows.stride(),
                          dh_rows.stride(),
                          gate_rows.stride(),
                          state_rows.stride(),
                          cell_rows.stride()};
  cpu::kernels().lstm_cell_backward(a, parallel());
  dgate_rows.finish();
  dc_rows.finish();
}
STABLE_TORCH_LIBRARY_IMPL(perexample, CPU, m) {
  m.impl("lstm_cell_backward_", TORCH_BOX(&lstm_cell_backward_));
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
