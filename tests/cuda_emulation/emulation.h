// CUDA on the CPU, for tests: every name of csrc/cuda/ptx.cuh, as meant by its comments there.
//
// Each CUDA thread is a fiber, and the fibers of one cluster take turns in an order that a seed
// chooses: warps and CTAs are frozen at random for a while. What the hardware may do at any time
// happens at the worst time. A copy_async poisons its target when it is issued and lands when it is
// waited for; TMA lands when it is issued; wgmma multiplies when it is waited for. Shared memory
// starts as NaN. What would be undefined on the device fails: threads of a warp at different
// instructions, misaligned addresses, a barrier with too many arrivals, a deadlock.
//
// It does not show what the hardware makes of descriptors beyond the layouts written down here, nor
// memory fences, nor speed.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __shared__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define PX_DEVICE inline
#define PX_SHARED_MEMORY(name) unsigned char* name = emulation::memory().data()

struct float4 {  // faults where it is not aligned, as on a GPU
  float x, y, z, w;
  float4(float x_, float y_, float z_, float w_) : x(x_), y(y_), z(z_), w(w_) {}
  float4(const float4& o) : x(o.x), y(o.y), z(o.z), w(o.w) { check(&o); }
  float4& operator=(const float4& o) {
    check(this), check(&o);
    x = o.x, y = o.y, z = o.z, w = o.w;
    return *this;
  }
  static void check(const float4* at) {
    if (reinterpret_cast<uintptr_t>(at) % 16 != 0 && !on_stack(at)) std::abort();
  }
  static bool on_stack(const void* at) {
    const char here = 0;
    const intptr_t distance = static_cast<const char*>(at) - &here;
    return -65536 < distance && distance < 65536;
  }
};
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
struct Index {
  unsigned x = 0;
};
inline Index threadIdx, blockIdx, gridDim, blockDim;

namespace emulation {

inline uint32_t seed = 1;

inline uint32_t random() {
  seed = seed * 1664525u + 1013904223u;
  return seed >> 8;
}

// A multiplication that wgmma has been asked for: 64×128 from 64×16 by 16×128.
struct Wgmma {
  float* d;
  uint64_t a, b;
  bool add, f16;
};

struct Fiber {
  ucontext_t context;
  unsigned cta, thread;
  bool done;
  // Issued, then committed in groups.
  std::vector<std::function<void()>> copies;
  std::deque<std::vector<std::function<void()>>> copy_groups;
  std::vector<Wgmma> products;
  std::deque<std::vector<Wgmma>> product_groups;
};

struct Barrier {
  int pending = 0, arrivals = 0;
  int64_t bytes = 0;
  uint32_t phase = 0;
};

struct Meeting {
  size_t arrived = 0, generation = 0;
  std::vector<void*> arguments;
};

// The cluster that is running.
inline std::vector<Fiber> fibers;
inline std::vector<std::vector<unsigned char>> shared;  // of each CTA
inline std::vector<std::map<uint32_t, Barrier>> barriers;
inline std::map<unsigned, Meeting> meetings;
inline size_t current;
inline unsigned first_cta, threads_per_cta;
inline ucontext_t scheduler;
inline std::function<void()> body;
inline int64_t progress;
inline std::string error;

constexpr size_t kStack = 128 << 10, kSlack = 2048;
constexpr int64_t kPatience = 3000;  // rounds without progress

inline Fiber& me() { return fibers[current]; }
inline std::vector<unsigned char>& memory() { return shared[me().cta]; }

inline void yield() {
  swapcontext(&me().context, &scheduler);
  threadIdx.x = me().thread, blockIdx.x = first_cta + me().cta;
}

inline void fail(const std::string& what) {
  if (error.empty()) error = what;
  for (;;) yield();
}

inline unsigned char* at(unsigned cta, uint32_t address, size_t bytes) {
  if (address % std::min<size_t>(bytes, 16) != 0) fail("misaligned shared memory address");
  if (address + bytes > shared[cta].size()) fail("shared memory address out of range");
  return shared[cta].data() + address;
}
inline unsigned char* at(uint32_t address, size_t bytes) { return at(me().cta, address, bytes); }

// The `count` threads that use `key` wait for one another; the last runs f on all arguments.
template <class F>
void meet(unsigned key, size_t count, size_t index, void* argument, const F& f) {
  Meeting& meeting = meetings[key];
  meeting.arguments.resize(count);
  meeting.arguments[index] = argument;
  const size_t generation = meeting.generation;
  if (++meeting.arrived == count) {
    f(meeting.arguments);
    meeting.arrived = 0, ++meeting.generation, ++progress;
  } else {
    while (meeting.generation == generation) yield();
  }
}
enum Kind : unsigned { kCluster, kCta, kWarp, kShuffle, kWarpgroup };
inline unsigned key(Kind kind, unsigned part) { return kind << 24 | me().cta << 16 | part; }

inline void run_cluster(unsigned cta, unsigned ctas, unsigned threads, size_t bytes,
                        std::function<void()> kernel) {
  static std::vector<std::vector<char>> stacks;
  body = std::move(kernel);
  first_cta = cta, threads_per_cta = threads, blockDim.x = threads;
  fibers = std::vector<Fiber>(size_t{ctas} * threads);
  shared.assign(ctas, std::vector<unsigned char>(bytes + kSlack, 0xff));
  barriers.assign(ctas, {});
  meetings.clear();
  progress = 0;
  if (stacks.size() < fibers.size()) stacks.resize(fibers.size());
  for (size_t i = 0; i < fibers.size(); ++i) {
    Fiber& fiber = fibers[i];
    fiber.cta = static_cast<unsigned>(i) / threads,
    fiber.thread = static_cast<unsigned>(i) % threads;
    stacks[i].resize(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks[i].data();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = &scheduler;
    makecontext(
        &fiber.context,
        +[] {
          threadIdx.x = me().thread, blockIdx.x = first_cta + me().cta;
          body();
          me().done = true, ++progress;
        },
        0);
  }
  size_t frozen_warp = 0, frozen_cta = 0;
  uint32_t frozen_for = 0;
  int64_t seen = -1, idle = 0;
  for (size_t left = fibers.size(); left > 0;) {
    if (frozen_for-- == 0) {
      frozen_for = random() % 40;
      frozen_warp = random() % ((fibers.size() + 31) / 32 * 2 + 1);  // often none
      frozen_cta = ctas > 1 ? random() % (3 * ctas) : 1;
    }
    left = 0;
    for (current = 0; current < fibers.size(); ++current) {
      if (me().done) continue;
      ++left;
      if (current / 32 == frozen_warp || me().cta == frozen_cta) continue;
      swapcontext(&scheduler, &me().context);
      if (!error.empty()) return;
    }
    idle = progress == seen ? idle + 1 : 0;
    seen = progress;
    if (idle > kPatience) {
      error = "deadlock";
      return;
    }
  }
}

inline float half_to_float(uint16_t bits) {
  _Float16 x;
  std::memcpy(&x, &bits, 2);
  return static_cast<float>(x);
}
inline float bfloat_to_float(uint16_t bits) {
  uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float x;
  std::memcpy(&x, &wide, 4);
  return x;
}

}  // namespace emulation

inline void __syncthreads() {
  using namespace emulation;
  meet(key(kCta, 0), threads_per_cta, me().thread, nullptr, [](auto&) {});
}
inline void __syncwarp() {
  using namespace emulation;
  meet(key(kShuffle, me().thread / 32), 32, me().thread % 32, nullptr, [](auto&) {});
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  using namespace emulation;
  struct Exchange {
    T value, result;
    int mask;
  } mine{value, value, mask};
  meet(key(kShuffle, me().thread / 32), 32, me().thread % 32, &mine, [](auto& all) {
    for (size_t lane = 0; lane < 32; ++lane) {
      auto* to = static_cast<Exchange*>(all[lane]);
      to->result = static_cast<Exchange*>(all[lane ^ static_cast<size_t>(to->mask)])->value;
    }
  });
  return mine.result;
}

// A map of a (d2, d1, d0) array of 16-bit numbers.
struct CUtensorMap {
  const uint16_t* data;
  int64_t size[3], stride[3];
  int box[3];
};

namespace perexample::cuda {

struct Grid {
  int64_t ctas;
  int threads;
  int64_t shared_bytes = 0;
  int cluster = 1;
};

template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), const Grid& grid, void*, const Arguments&... arguments) {
  if (grid.ctas >= int64_t{1} << 31) throw std::runtime_error("too large for one launch");
  gridDim.x = static_cast<unsigned>(grid.ctas);
  const int64_t clusters = grid.ctas / grid.cluster, backwards = emulation::random() % 2;
  for (int64_t i = 0; i < clusters; ++i) {
    int64_t cluster = backwards ? clusters - 1 - i : i;
    emulation::run_cluster(static_cast<unsigned>(cluster * grid.cluster),
                           static_cast<unsigned>(grid.cluster), static_cast<unsigned>(grid.threads),
                           static_cast<size_t>(grid.shared_bytes),
                           [&] { kernel(static_cast<Parameters>(arguments)...); });
    if (!emulation::error.empty()) throw std::runtime_error(emulation::error);
  }
}

inline void fill_zero(void* data, int64_t bytes, void*) {
  if (data != nullptr) std::memset(data, 0, static_cast<size_t>(bytes));
}

struct TensorMap3d {
  const void* data;
  int64_t size[3], stride[3];
  int box[3];
};

inline CUtensorMap encode(const TensorMap3d& m) {
  CUtensorMap map{static_cast<const uint16_t*>(m.data), {}, {}, {}};
  for (int d = 0; d < 3; ++d) {
    map.size[d] = m.size[d], map.stride[d] = m.stride[d], map.box[d] = m.box[d];
    bool bad = d > 0 && (m.stride[d] <= 0 || m.stride[d] % 8 != 0);
    if (bad || m.size[d] < 1 || m.box[d] < 1 || m.box[d] > 256) {
      throw std::runtime_error("no such tensor map");
    }
  }
  if (m.box[0] != 64 || m.stride[0] != 1 || reinterpret_cast<uintptr_t>(m.data) % 16 != 0) {
    throw std::runtime_error("no such tensor map");
  }
  return map;
}

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

inline float as_float(uint32_t bits) {
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
inline uint32_t as_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(bf16 x) { return emulation::bfloat_to_float(x.bits); }
inline float widen(f16 x) { return emulation::half_to_float(x.bits); }
inline bf16 to_bf16(float x) {
  uint32_t bits = as_bits(x);
  if (std::isnan(x)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline f16 to_f16(float x) {
  _Float16 half = static_cast<_Float16>(x);
  f16 y;
  std::memcpy(&y.bits, &half, 2);
  return y;
}
inline uint32_t to_tf32(float x) {
  return std::isfinite(x) ? (as_bits(x) + 0x1000) & 0xffffe000u : as_bits(x);
}

inline void trap() { emulation::fail("trap"); }
inline int opaque(int x) { return x; }

template <class T>
void store_if(bool wanted, T* to, T x) {
  if (wanted) *to = x;
}
inline void store_if(bool wanted, float* to, float x, float y) {
  if (!wanted) return;
  if (reinterpret_cast<uintptr_t>(to) % 8 != 0) emulation::fail("misaligned vector");
  to[0] = x, to[1] = y;
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const unsigned char*>(p) - emulation::memory().data());
}

inline void copy_async(uint32_t to, const void* from, int bytes) {
  if (bytes < 0 || bytes > 16) emulation::fail("copy_async: wrong number of bytes");
  if (bytes > 0 && reinterpret_cast<uintptr_t>(from) % 16 != 0) {
    emulation::fail("copy_async: misaligned source");
  }
  unsigned char* target = emulation::at(to, 16);
  std::memset(target, 0xff, 16);
  emulation::me().copies.push_back([=] {
    std::memset(target, 0, 16);
    if (bytes > 0) std::memcpy(target, from, static_cast<size_t>(bytes));
  });
}
inline void copy_commit() {
  auto& fiber = emulation::me();
  fiber.copy_groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int kPending>
void copy_wait() {
  auto& groups = emulation::me().copy_groups;
  while (groups.size() > kPending) {
    for (auto& copy : groups.front()) copy();
    groups.pop_front();
  }
}

inline uint32_t load_shared_32(uint32_t from) {
  uint32_t x;
  std::memcpy(&x, emulation::at(from, 4), 4);
  return x;
}
inline void store_shared_32(uint32_t to, uint32_t x) { std::memcpy(emulation::at(to, 4), &x, 4); }
inline void store_shared_16(uint32_t to, uint16_t x) { std::memcpy(emulation::at(to, 2), &x, 2); }

inline void load_matrices_transposed(uint32_t row, uint32_t (&r)[4]) {
  using namespace emulation;
  struct Load {
    uint32_t row, *r;
  } mine{row, r};
  meet(key(kWarp, me().thread / 32), 32, me().thread % 32, &mine, [](auto& all) {
    for (size_t lane = 0; lane < 32; ++lane) {
      for (size_t matrix = 0; matrix < 4; ++matrix) {
        uint16_t element[2];
        for (size_t e = 0; e < 2; ++e) {
          uint32_t from = static_cast<Load*>(all[matrix * 8 + 2 * (lane % 4) + e])->row;
          std::memcpy(&element[e], at(from, 16) + 2 * (lane / 4), 2);
        }
        static_cast<Load*>(all[lane])->r[matrix] = element[0] | static_cast<uint32_t>(element[1])
                                                                    << 16;
      }
    }
  });
}

// One mma.sync: a is 16×kDepth, b kDepth×8. A register holds 2 neighbours in k, or one TF32.
template <int kDepth, class Number>
void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const float (&c)[4],
         const Number& number) {
  using namespace emulation;
  struct Operands {
    float* d;
    const uint32_t *a, *b;
    const float* c;
  } mine{d, a, b, c};
  meet(key(kWarp, me().thread / 32), 32, me().thread % 32, &mine, [&](auto& all) {
    constexpr int kPacked = kDepth / 8;
    float A[16][kDepth], B[kDepth][8];
    for (int lane = 0; lane < 32; ++lane) {
      auto* x = static_cast<Operands*>(all[static_cast<size_t>(lane)]);
      int group = lane / 4, first = lane % 4 * kPacked;
      for (int e = 0; e < kPacked; ++e) {
        for (int half = 0; half < 2; ++half) {
          int k = first + e + half * kDepth / 2;
          A[group][k] = number(x->a[2 * half], e);
          A[group + 8][k] = number(x->a[2 * half + 1], e);
          B[k][group] = number(x->b[half], e);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      auto* x = static_cast<Operands*>(all[static_cast<size_t>(lane)]);
      for (int e = 0; e < 4; ++e) {
        float sum = x->c[e];
        for (int k = 0; k < kDepth; ++k) {
          sum += A[lane / 4 + e / 2 * 8][k] * B[k][lane % 4 * 2 + e % 2];
        }
        x->d[e] = sum;
      }
    }
  });
}
inline uint16_t packed(uint32_t word, int e) { return static_cast<uint16_t>(word >> (16 * e)); }
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const float (&c)[4]) {
  mma<16>(d, a, b, c, [](uint32_t word, int e) { return widen(bf16{packed(word, e)}); });
}
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                    const float (&c)[4]) {
  mma<16>(d, a, b, c, [](uint32_t word, int e) { return widen(f16{packed(word, e)}); });
}
inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     const float (&c)[4]) {
  mma<8>(d, a, b, c, [](uint32_t word, int) { return as_float(word & 0xffffe000u); });
}

// ---- sm_90a -------------------------------------------------------------------------------------

inline emulation::Barrier& barrier_at(unsigned cta, uint32_t address) {
  if (address % 8 != 0) emulation::fail("misaligned barrier");
  return emulation::barriers[cta][address];
}
inline void complete(emulation::Barrier& barrier) {
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.phase ^= 1, barrier.pending = barrier.arrivals, ++emulation::progress;
  }
}
inline void arrive(emulation::Barrier& barrier) {
  if (--barrier.pending < 0) emulation::fail("barrier: more arrivals than expected");
  complete(barrier);
}
inline void barrier_init(uint32_t barrier, uint32_t arrivals) {
  auto& b = barrier_at(emulation::me().cta, barrier);
  b.pending = b.arrivals = static_cast<int>(arrivals);
}
inline void barrier_init_fence() {}
inline void barrier_expect_bytes(uint32_t barrier, uint32_t bytes) {
  auto& b = barrier_at(emulation::me().cta, barrier);
  b.bytes += bytes;
  arrive(b);
}
inline void barrier_arrive(uint32_t barrier) {
  arrive(barrier_at(emulation::me().cta, barrier));
  emulation::yield();
}
inline void barrier_arrive_in_cluster(uint32_t barrier, uint32_t cta) {
  if (emulation::fibers[size_t{cta} * emulation::threads_per_cta].cta != cta ||
      std::all_of(emulation::fibers.begin(), emulation::fibers.end(),
                  [&](auto& fiber) { return fiber.cta != cta || fiber.done; })) {
    emulation::fail("arrival at a CTA that has ended");
  }
  arrive(barrier_at(cta, barrier));
  emulation::yield();
}
inline void barrier_wait(uint32_t barrier, uint32_t parity) {
  unsigned cta = emulation::me().cta;
  while (barrier_at(cta, barrier).phase == parity) emulation::yield();
}
inline void barrier_wait_cluster(uint32_t barrier, uint32_t parity) {
  barrier_wait(barrier, parity);
}

// Where the 128-byte swizzle puts an address.
inline uint32_t swizzled(uint32_t address) { return address ^ ((address >> 7 & 7) << 4); }

inline void tma_land(unsigned cta, uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0,
                     int c1, int c2) {
  if (to % 1024 != 0) emulation::fail("tma: misaligned target");
  if (std::all_of(emulation::fibers.begin(), emulation::fibers.end(),
                  [&](auto& fiber) { return fiber.cta != cta || fiber.done; })) {
    emulation::fail("tma: to a CTA that has ended");
  }
  uint32_t offset = 0;
  for (int64_t z = c2; z < c2 + map->box[2]; ++z) {
    for (int64_t y = c1; y < c1 + map->box[1]; ++y) {
      for (int64_t x = c0; x < c0 + map->box[0]; ++x, offset += 2) {
        bool inside = x < map->size[0] && y < map->size[1] && z < map->size[2];
        uint16_t value =
            inside ? map->data[x * map->stride[0] + y * map->stride[1] + z * map->stride[2]]
                   : uint16_t{0};
        std::memcpy(emulation::at(cta, swizzled(to + offset), 2), &value, 2);
      }
    }
  }
  auto& b = barrier_at(cta, barrier);
  b.bytes -= offset;
  complete(b);
}
inline void tma_load(uint32_t to, const CUtensorMap* map, uint32_t barrier, int c0, int c1,
                     int c2) {
  tma_land(emulation::me().cta, to, map, barrier, c0, c1, c2);
}
inline void tma_load_multicast(uint32_t to, const CUtensorMap* map, uint32_t barrier, uint16_t ctas,
                               int c0, int c1, int c2) {
  for (unsigned cta = 0; cta < 16; ++cta) {
    if (ctas >> cta & 1) tma_land(cta, to, map, barrier, c0, c1, c2);
  }
}

inline uint32_t cluster_rank() { return emulation::me().cta; }
inline void cluster_sync() {
  using namespace emulation;
  meet(kCluster << 24, fibers.size(), current, nullptr, [](auto&) {});
}
template <int kRegisters>
void more_registers() {}
template <int kRegisters>
void fewer_registers() {}

inline void wgmma_fence() {}
inline void wgmma_bf16(float (&d)[64], uint64_t a, uint64_t b, int add) {
  emulation::me().products.push_back({d, a, b, add != 0, false});
}
inline void wgmma_f16(float (&d)[64], uint64_t a, uint64_t b, int add) {
  emulation::me().products.push_back({d, a, b, add != 0, true});
}
inline void wgmma_commit() {
  auto& fiber = emulation::me();
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
}

// Element (column, k) of an M/N-major operand in the 128-byte swizzle.
inline float operand(unsigned cta, uint64_t descriptor, uint32_t column, uint32_t k, bool half) {
  auto field = [&](int shift) { return static_cast<uint32_t>(descriptor >> shift & 0x3fff) << 4; };
  if (descriptor >> 62 != 1) emulation::fail("wgmma: not the 128-byte swizzle");
  uint32_t address =
      field(0) + column / 64 * field(16) + k / 8 * field(32) + k % 8 * 128 + column % 64 * 2;
  uint16_t bits;
  std::memcpy(&bits, emulation::at(cta, swizzled(address), 2), 2);
  return half ? widen(f16{bits}) : widen(bf16{bits});
}

inline void multiply_group(const std::vector<const std::vector<emulation::Wgmma>*>& threads) {
  const unsigned cta = emulation::me().cta;
  const size_t count = threads[0]->size();
  for (auto* products : threads) {
    if (products->size() != count) emulation::fail("wgmma: threads of a warpgroup differ");
  }
  static std::vector<float> a(64 * 16), b(16 * 128), c(64 * 128);
  for (size_t q = 0; q < count; ++q) {
    const emulation::Wgmma& one = (*threads[0])[q];
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t m = 0; m < 64; ++m) a[m * 16 + k] = operand(cta, one.a, m, k, one.f16);
      for (uint32_t n = 0; n < 128; ++n) b[k * 128 + n] = operand(cta, one.b, n, k, one.f16);
    }
    std::fill(c.begin(), c.end(), 0.f);
    for (size_t m = 0; m < 64; ++m) {
      for (size_t k = 0; k < 16; ++k) {
        for (size_t n = 0; n < 128; ++n) c[m * 128 + n] += a[m * 16 + k] * b[k * 128 + n];
      }
    }
    for (size_t thread = 0; thread < 128; ++thread) {
      const emulation::Wgmma& mine = (*threads[thread])[q];
      if (mine.a != one.a || mine.b != one.b || mine.add != one.add || mine.f16 != one.f16) {
        emulation::fail("wgmma: operands of a warpgroup differ");
      }
      for (size_t r = 0; r < 64; ++r) {
        size_t row = thread / 32 * 16 + thread % 32 / 4 + r / 2 % 2 * 8;
        size_t column = r / 4 * 8 + thread % 4 * 2 + r % 2;
        mine.d[r] = (mine.add ? mine.d[r] : 0.f) + c[row * 128 + column];
      }
    }
  }
}

template <int kPending>
void wgmma_wait() {
  using namespace emulation;
  const unsigned thread = me().thread;
  meet(key(kWarpgroup, thread / 128), 128, thread % 128, &me(), [](auto& all) {
    while (static_cast<Fiber*>(all[0])->product_groups.size() > kPending) {
      std::vector<const std::vector<Wgmma>*> groups;
      for (void* fiber : all) {
        auto& pending = static_cast<Fiber*>(fiber)->product_groups;
        if (pending.empty()) fail("wgmma: threads of a warpgroup differ");
        groups.push_back(&pending.front());
      }
      multiply_group(groups);
      for (void* fiber : all) static_cast<Fiber*>(fiber)->product_groups.pop_front();
    }
  });
}

}  // namespace perexample::cuda
