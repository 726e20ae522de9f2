// perexample._info: how this installation was built and which CPU kernels it chose.
//
// Linked against _kernels.so, so that it answers for the very kernels that serve the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace {

std::vector<std::string> capabilities() {
  int count = 0;
  const auto* tables = perexample::cpu::available_kernels(&count);
  std::vector<std::string> names;
  for (int i = 0; i < count; ++i) names.emplace_back(tables[i]->capability);
  return names;
}

pybind11::dict build() {
  pybind11::dict facts;
#if defined(__clang__)
  facts["compiler"] = __VERSION__;
#else
  facts["compiler"] = "GCC " __VERSION__;
#endif
  facts["flags"] = PX_FLAGS;
  facts["compiled_capabilities"] = PX_COMPILED_CAPABILITIES;
  facts["torch"] = PX_TORCH_VERSION;
  facts["cuda"] = PX_HAS_CUDA != 0;
  return facts;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build facts and CPU capability of the compiled kernels.";
  m.def(
      "capability", [] { return std::string(perexample::cpu::kernels().capability); },
      "The CPU capability whose kernels serve the ops.");
  m.def("capabilities", &capabilities, "What was compiled in and this machine can run, best last.");
  m.def("build", &build, "How the kernels were built.");
}
