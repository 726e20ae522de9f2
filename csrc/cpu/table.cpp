// The kernels of one capability, as a table. Compiled once per capability like its kernels.
#include "kernels.h"
#include "vec.h"

#define PX_STRING2(x) #x
#define PX_STRING(x) PX_STRING2(x)

// AVX-512-BF16 adds products for linear layers only: the build compiles for it what those call, and
// no other kernel.
#if defined(__AVX512BF16__)
#define PX_OTHERS avx512
#else
#define PX_OTHERS PX_CAPABILITY
#endif

namespace perexample::cpu {
namespace PX_OTHERS {

void conv_moments(const Conv&, const Parallel&);
void embedding_moments(const Embedding&, const Parallel&);
void layer_norm_moments(const LayerNorm&, const Parallel&);
void group_norm_moments(const GroupNorm&, const Parallel&);
void lstm_forward(const Lstm&, const Parallel&);
void lstm_backward(const LstmBackward&, const Parallel&);
void gru_cell_backward(const GruCellBackward&, const Parallel&);
void optimizer_step(const Optimizer&, const Parallel&);

}  // namespace PX_OTHERS

namespace PX_CAPABILITY {

void linear_moments(const Linear&, const Parallel&);
void bias_moments(const Bias&, const Parallel&);
void reduce_moments(const Reduce&, const Parallel&);

extern const Kernels table;
const Kernels table = {
    PX_STRING(PX_CAPABILITY),
    linear_moments,
    PX_OTHERS::conv_moments,
    bias_moments,
    reduce_moments,
    PX_OTHERS::embedding_moments,
    PX_OTHERS::layer_norm_moments,
    PX_OTHERS::group_norm_moments,
    PX_OTHERS::lstm_forward,
    PX_OTHERS::lstm_backward,
    PX_OTHERS::gru_cell_backward,
    PX_OTHERS::optimizer_step,
};

}  // namespace PX_CAPABILITY
}  // namespace perexample::cpu
