// The kernels of one capability, as a table. Compiled once per capability like its kernels.
#include "kernels.h"
#include "vec.h"

#define PX_STRING2(x) #x
#define PX_STRING(x) PX_STRING2(x)

namespace perexample::cpu::PX_CAPABILITY {

void linear_moments(const Linear&, const Parallel&);
void conv_moments(const Conv&, const Parallel&);
void bias_moments(const Bias&, const Parallel&);
void reduce_moments(const Reduce&, const Parallel&);
void embedding_moments(const Embedding&, const Parallel&);
void layer_norm_moments(const LayerNorm&, const Parallel&);
void group_norm_moments(const GroupNorm&, const Parallel&);
void lstm_forward(const Lstm&, const Parallel&);
void lstm_backward(const LstmBackward&, const Parallel&);
void gru_cell_backward(const GruCellBackward&, const Parallel&);
void optimizer_step(const Optimizer&, const Parallel&);

extern const Kernels table;
const Kernels table = {
    PX_STRING(PX_CAPABILITY), linear_moments,     conv_moments,       bias_moments, reduce_moments,
    embedding_moments,        layer_norm_moments, group_norm_moments, lstm_forward, lstm_backward,
    gru_cell_backward,        optimizer_step,
};

}  // namespace perexample::cpu::PX_CAPABILITY
