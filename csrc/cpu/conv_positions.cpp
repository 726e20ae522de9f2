#include "conv_common.h"
namespace perexample::cpu::PX_CAPABILITY {
bool prefers_positions(const Conv&) { return false; }
void conv_moments_by_positions(const Conv&, const Parallel&) {}
}  // namespace perexample::cpu::PX_CAPABILITY
