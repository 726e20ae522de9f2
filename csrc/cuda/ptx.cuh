// What the kernels need of CUDA: qualifiers, launches, and one function for each PTX instruction.
// The tests give every name in this file a meaning on the CPU (tests/cuda_emulation/emulation.h)
// and run the same kernels there.
#pragma once

#ifdef PEREXAMPLE_EMULATION
#include "emulation.h"
#else

#include <cuda.h>
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#define PX_SHARED_MEMORY(name) extern __shared__ __align__(1024) unsigned char name[]

namespace perexample::cuda {

// ---- Host: launches -----------------------------------------------------------------------------

inline void check(cudaError_t error, const char* what) {
  if (error != cudaSuccess) {
    throw std::runtime_error(std::string("perexample: ") + what + ": " + cudaGetErrorString(error));
  }
}

struct Grid {
  int64_t ctas;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

// What a kernel declares as shared memory of its own comes on top of Grid::shared_bytes; none
// declares more than this (tests/test_cuda_build.py). More than 48 KB in all has to be asked for.
constexpr int64_t kMostDeclared = 8 * 1024;

// Runs `kernel` in stream order; every argument is passed by value.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void* stream,
            const Arguments&... arguments) {
  if (grid.ctas == 0) return;
  if (grid.ctas >= int64_t{1} << 31) {
    throw std::runtime_error("perexample: too large for one launch: " + std::to_string(grid.ctas) +
                             " CTAs");
  }
  if (grid.shared_bytes > 48 * 1024 - kMostDeclared) {
    check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                               cudaFuncAttributeMaxDynamicSharedMemorySize,
                               static_cast<int>(grid.shared_bytes)),
          "shared memory");
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.ctas));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.dynamicSmemBytes = static_cast<size_t>(grid.shared_bytes);
  config.stream = static_cast<cudaStream_t>(stream);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(grid.cluster);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  config.attrs = &cluster;
  config.numAttrs = grid.cluster > 1 ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), "launch");
}

inline void fill_zero(void* data, int64_t bytes, void* stream) {
  if (data == nullptr || bytes == 0) return;
  check(cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream)),
        "memset");
}

// A map of a (d2, d1, d0) array of 16-bit numbers whose rows of d0 are dense, for boxes of
// (box2, box1, 64) that lie in shared memory in the 128-byte swizzle. Out of bounds reads as zero.
struct TensorMap3d {
  const void* data;
  int64_t size[3];    // d0, d1, d2
  int64_t stride[3];  // in elements; stride[0] is 1
  int box[3];         // box[0] is 64
};

inline CUtensorMap encode(const TensorMap3d& m) {
  static const auto function = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                           cudaEnableDefault, &result),
          "cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  CUtensorMap map;
  cuuint64_t size[3], stride[2];
  cuuint32_t box[3], element[3] = {1, 1, 1};
  for (int d = 0; d < 3; ++d) {
    size[d] = static_cast<cuuint64_t>(m.size[d]), box[d] = static_cast<cuuint32_t>(m.box[d]);
  }
  for (int d = 0; d < 2; ++d) stride[d] = static_cast<cuuint64_t>(m.stride[d + 1] * 2);
  CUresult result =
      function == nullptr
          ? CUDA_ERROR_NOT_SUPPORTED
          : function(&map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(m.data), size,
                     stride, box, element, CU_TENSOR_MAP_INTERLEAVE_NONE,
                     CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                     CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("perexample: cuTensorMapEncodeTiled failed: error " +
                             std::to_string(static_cast<int>(result)));
  }
  return map;
}

// ---- Device: numbers ----------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

#define PX_DEVICE __device__ __forceinline__

PX_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
PX_DEVICE uint32_t as_bits(float x) { return __float_as_uint(x); }
PX_DEVICE float widen(float x) { return x; }
PX_DEVICE double widen(double x) { return x; }
PX_DEVICE float widen(bf16 x) { return as_float(static_cast<uint32_t>(x.bits) << 16); }
PX_DEVICE float widen(f16 x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
PX_DEVICE bf16 to_bf16(float x) {
  bf16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
PX_DEVICE f16 to_f16(float x) {
  f16 y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
PX_DEVICE uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

// Ends the kernel with an error.
PX_DEVICE void trap() { asm volatile("trap;"); }

// x, but the compiler cannot know: what is computed from it is computed there, not kept in
// registers from the start of the kernel.
PX_DEVICE int opaque(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Store to global memory where `wanted`, without a branch.
PX_DEVICE void store_if(bool wanted, float* to, float x) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\n@wanted st.global.f32 [%0], %1;\n}"
      :
      : "l"(to), "f"(x), "r"(static_cast<int>(wanted))
      : "memory");
}
PX_DEVICE void store_if(bool wanted, double* to, double x) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\n@wanted st.global.f64 [%0], %1;\n}"
      :
      : "l"(to), "d"(x), "r"(static_cast<int>(wanted))
      : "memory");
}
PX_DEVICE void store_if(bool wanted, uint16_t* to, uint16_t x) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %2, 0;\n@wanted st.global.u16 [%0], %1;\n}"
      :
      : "l"(to), "h"(x), "r"(static_cast<int>(wanted))
      : "memory");
}
// Two neighbours, 8 bytes aligned.
PX_DEVICE void store_if(bool wanted, float* to, float x, float y) {
  asm volatile(
      "{\n.reg .pred wanted;\nsetp.ne.s32 wanted, %3, 0;\n@wanted st.global.v2.f32 [%0], {%1, "
      "%2};\n}"
      :
      : "l"(to), "f"(x), "f"(y), "r"(static_cast<int>(wanted))
      : "memory");
}

// ---- Device: shared memory and the mma.sync kernels ---------------------------------------------

PX_DEVICE uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies `bytes` (0 to 16) and fills up with zeros to 16; lands before copy_wait says so.
PX_DEVICE void copy_async(uint32_t to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :
               : "r"(to), "l"(from), "r"(bytes)
               : "memory");
}
PX_DEVICE void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kPending>
PX_DEVICE void copy_wait() {
  asm volatile("cp.async.wait_group %0;" : : "n"(kPending) : "memory");
}

PX_DEVICE uint32_t load_shared_32(uint32_t from) {
  uint32_t x;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x) : "r"(from) : "memory");
  return x;
}
PX_DEVICE void store_shared_32(uint32_t to, uint32_t x) {
  asm volatile("st.shared.u32 [%0], %1;" : : "r"(to), "r"(x) : "memory");
}
PX_DEVICE void store_shared_16(uint32_t to, uint16_t x) {
  asm volatile("st.shared.u16 [%0], %1;" : : "r"(to), "h"(x) : "memory");
}

// Four transposed 8×8 matrices of 16-bit numbers; lane l gives the address of row l % 8 of matrix
// l / 8.
PX_DEVICE void load_matrices_transposed(uint32_t row, uint32_t (&r)[4]) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(row)
               : "memory");
}

// d = a b + c (16×8 from 16×16 by 16×8, or by 8 for TF32).
PX_DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
PX_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                       const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}
PX_DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                        const float (&c)[4]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%10, %11, %12, %13};"
      : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]),
        "f"(c[2]), "f"(c[3]));
}

// ---- Device: barriers, TMA and wgmma (sm_90a) ---------------------------------------------------
// Barriers live in shared memory and go by their addresses.

PX_DEVICE void barrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" : : "r"(barrier), "r"(arrivals));
}
PX_DEVICE void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and makes the phase wait for so many bytes of TMA.
PX_DEVICE void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
               :
               : "r"(barrier), "r"(bytes)
               : "memory");
}
PX_DEVICE void barrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" : : "r"(barrier) : "memory");
}
PX_DEVICE void barrier_arrive_in_cluster(uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n.reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [remote];\n}"
      :
      : "r"(barrier), "r"(cta)
      : "memory");
}
// Returns once the phase of this parity is complete.
PX_DEVICE void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}
// The same where CTAs of the cluster arrive.
PX_DEVICE void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "WAIT:\n"
      "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1;\n"
      "@done bra DONE;\n"
      "bra WAIT;\n"
      "DONE:\n}"
      :
      : "r"(barrier), "r"(parity)
      : "memory");
}

PX_DEVICE void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                        int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, "
      "{%3, %4, %5}], [%2];"
      :
      : "r"(to), "l"(map), "r"(barrier), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}
// To the same place, and barrier, of every CTA in `ctas`.
PX_DEVICE void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier,
                                  uint16_t ctas, int c0, int c1, int c2) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::"
      "cluster [%0], [%1, {%4, %5, %6}], [%2], %3;"
      :
      : "r"(to), "l"(map), "r"(barrier), "h"(ctas), "r"(c0), "r"(c1), "r"(c2)
      : "memory");
}

PX_DEVICE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
PX_DEVICE void cluster_sync() {
  asm volatile(
      "barrier.cluster.arrive.release.aligned;\n"
      "barrier.cluster.wait.acquire.aligned;" ::
          : "memory");
}
template <int kRegisters>
PX_DEVICE void more_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" : : "n"(kRegisters));
}
template <int kRegisters>
PX_DEVICE void fewer_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" : : "n"(kRegisters));
}

PX_DEVICE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PX_DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
PX_DEVICE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" : : "n"(kPending) : "memory");
}

#define PX_8(d, i)                                                                            \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define PX_WGMMA(type)                                                                           \
  asm volatile(                                                                                  \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %66, 0;\n"                                           \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                               \
      " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, "  \
      "%19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, "    \
      "%36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, "    \
      "%53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, %64, %65, add, 1, 1, 1, 1;\n}"    \
      : PX_8(d, 0), PX_8(d, 8), PX_8(d, 16), PX_8(d, 24), PX_8(d, 32), PX_8(d, 40), PX_8(d, 48), \
        PX_8(d, 56)                                                                              \
      : "l"(a), "l"(b), "r"(add))

// d = a b + (add ? d : 0), 64×128 from 64×16 by 16×128, both operands M/N-major in shared memory.
PX_DEVICE void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b, int add) { PX_WGMMA("bf16"); }
PX_DEVICE void wgmma_f16(float (&d)[64], uint64_t a, uint64_t b, int add) { PX_WGMMA("f16"); }
#undef PX_WGMMA
#undef PX_8

}  // namespace perexample::cuda

#endif
