// perexample._info: how this installation was built, which CPU kernels it chose, and how the CUDA
// kernels would share out their work.
//
// Linked against _kernels.so, so that it answers for the very kernels that serve the ops.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "bindings/tf32.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"
#include "cuda/plan.h"

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
  facts["cuda"] = perexample::cuda::built;
  facts["cuda_archs"] = PX_CUDA_ARCHS;
  return facts;
}

// The plan as a dict, with the jobs that the kernel will make of it.
pybind11::dict plan(int64_t groups, int64_t outputs, int64_t inputs, int64_t tile_rows,
                    int64_t tile_columns, int64_t batch, int64_t positions, int64_t position_block,
                    int64_t ctas) {
  namespace cuda = perexample::cuda;
  cuda::Plan p = cuda::plan(groups, outputs, inputs, tile_rows, tile_columns, batch, positions,
                            position_block, ctas);
  pybind11::list jobs;
  for (int64_t i = 0; i < p.jobs; ++i) {
    cuda::Job j = cuda::job(p, i);
    jobs.append(pybind11::make_tuple(j.group, j.row, j.column, j.b0, j.b1, j.t0, j.t1, j.slot));
  }
  pybind11::dict result;
  result["rows"] = p.rows, result["columns"] = p.columns, result["whole"] = p.whole;
  result["parts"] = p.parts, result["chunks"] = p.chunks, result["slots"] = p.slots();
  result["ctas"] = p.ctas, result["jobs"] = jobs;
  return result;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.doc() = "Build facts and CPU capability of the compiled kernels.";
  m.def(
      "capability", [] { return std::string(perexample::cpu::kernels().capability); },
      "The CPU capability whose kernels serve the ops.");
  m.def("capabilities", &capabilities, "What was compiled in and this machine can run, best last.");
  m.def("build", &build, "How the kernels were built.");
  m.def("tf32_allowed", &perexample::tf32_allowed,
        "Whether linear_moments of float32 on CUDA may round products to TF32, as torch is set.");
  m.def("plan", &plan, "How the CUDA kernels would cut a product into jobs.",
        pybind11::arg("groups"), pybind11::arg("outputs"), pybind11::arg("inputs"),
        pybind11::arg("tile_rows"), pybind11::arg("tile_columns"), pybind11::arg("batch"),
        pybind11::arg("positions"), pybind11::arg("position_block"), pybind11::arg("ctas"));
}
