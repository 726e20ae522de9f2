// The Hopper kernel of linear_moments: TMA and wgmma, bfloat16 and float16, sm_90a.
//
//   G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];   g = sum_b G_b;   s = sum_b G_b^2               MATHS (3)
//
// A CTA owns 128×128 of (o, i). Its first warpgroup fetches: one thread issues the copies of 64
// positions of both operands a stage, and two of the idle warps add up the bias from what has
// landed. Each of the two other warpgroups multiplies 64 rows and keeps G, g and s in registers:
// the first product of an example does not add (so that nothing is cleared), its last is waited
// for, and G is drained into g and s. The two take turns at examples of few stages, so that one
// multiplies while the other drains. With kCluster = 2 a pair of CTAs, one above the other, shares
// the operand x: each fetches one half of it for both.
//
// kExample = 0: an example takes any number of stages. 16 or 32: examples of up to so many
// positions, 64 / kExample of them in one stage.
#pragma once

#include "common.cuh"

namespace perexample::cuda {

// Which of a cluster's elements the multiplying threads hold: see `write_slot`.
template <int kCluster>
struct WgmmaLayout {
  static constexpr int kRows = 128 * kCluster, kColumns = 128;
  static constexpr int kThreads = 256 * kCluster, kRegisters = 64;

  PX_HOST_DEVICE static void position(int thread, int r, int& row, int& column) {
    int lane = thread % 32;
    row = thread / 32 * 16 + lane / 4 + r / 2 % 2 * 8;
    column = r / 4 * 8 + lane % 4 * 2 + r % 2;
  }
};

template <bool kF16_, int kCluster_, int kExample_>
struct WgmmaTile : WgmmaLayout<kCluster_> {
  using Layout = WgmmaLayout<kCluster_>;
  static constexpr bool kF16 = kF16_;
  static constexpr int kCluster = kCluster_, kExample = kExample_;
  static constexpr int kCtaRows = 128, kBlock = 64, kStages = 6;
  static constexpr int kHalfBytes = 64 * kBlock * 2;  // 64 columns of an operand
  static constexpr int kStageBytes = 4 * kHalfBytes;  // dy, then x
  static constexpr int kCtaThreads = 384, kFetching = 128;
  // Room to align the stages to the swizzle, two barriers a stage, and two for the turns.
  static constexpr int kSharedBytes = kStages * (kStageBytes + 16) + 16 + 1024;
  static constexpr int kBiasWarps = 2;
};

// Descriptor of an M/N-major operand in the 128-byte swizzle: groups of 64 columns are kHalfBytes
// apart, groups of 8 positions 1024 bytes.
template <class Tile>
PX_DEVICE uint64_t descriptor(uint32_t address) {
  return static_cast<uint64_t>((address & 0x3FFFF) >> 4) |
         static_cast<uint64_t>(Tile::kHalfBytes >> 4) << 16 |
         static_cast<uint64_t>(1024 >> 4) << 32 | static_cast<uint64_t>(1) << 62;
}
constexpr uint64_t kDescriptorStep = 16 * 128 >> 4;  // 16 positions

template <class Tile>
PX_DEVICE void wgmma(float (&d)[64], uint64_t a, uint64_t b, int add) {
  if constexpr (Tile::kF16) {
    wgmma_f16(d, a, b, add);
  } else {
    wgmma_bf16(d, a, b, add);
  }
}

// Walks the ring of stages: `full` says that a stage has landed, `empty` that it has been read.
template <class Tile>
struct Ring {
  uint32_t base;  // of the stages; the barriers lie behind them
  int stage = 0;
  uint32_t phase;

  PX_DEVICE Ring(uint32_t base, uint32_t phase) : base(base), phase(phase) {}
  PX_DEVICE uint32_t data() const { return base + stage * Tile::kStageBytes; }
  PX_DEVICE uint32_t full(int of) const {
    return base + Tile::kStages * Tile::kStageBytes + 16 * of;
  }
  PX_DEVICE uint32_t full() const { return full(stage); }
  PX_DEVICE uint32_t empty(int of) const { return full(of) + 8; }
  PX_DEVICE uint32_t empty() const { return empty(stage); }
  // The turn of a multiplying warpgroup to begin an example.
  PX_DEVICE uint32_t turn(int group) const { return full(Tile::kStages) + 8 * group; }
  PX_DEVICE void advance() {
    if (++stage == Tile::kStages) stage = 0, phase ^= 1;
  }
};

template <class Tile>
PX_DEVICE void fetch(const CUtensorMap* dy, const CUtensorMap* x, const Plan& plan, uint32_t rank,
                     uint32_t base) {
  Ring<Tile> ring(base, 1);  // every stage starts empty
  auto stage = [&](const Job& j, int t, int b) {
    const int row = static_cast<int>(j.row) * Tile::kRows + static_cast<int>(rank) * Tile::kCtaRows;
    const int column = static_cast<int>(j.column) * Tile::kColumns;
    const uint32_t to = ring.data(), to_x = to + 2 * Tile::kHalfBytes;
    barrier_wait_cluster(ring.empty(), ring.phase);
    barrier_expect_bytes(ring.full(), Tile::kStageBytes);
    tma_load(to, dy, ring.full(), row, t, b);
    tma_load(to + Tile::kHalfBytes, dy, ring.full(), row + 64, t, b);
    if constexpr (Tile::kCluster == 1) {
      tma_load(to_x, x, ring.full(), column, t, b);
      tma_load(to_x + Tile::kHalfBytes, x, ring.full(), column + 64, t, b);
    } else {
      tma_load_multicast(to_x + rank * Tile::kHalfBytes, x, ring.full(), uint16_t{3},
                         column + 64 * static_cast<int>(rank), t, b);
    }
    ring.advance();
  };
#pragma unroll 1
  for (int64_t index = blockIdx.x / Tile::kCluster; index < plan.jobs;
       index += gridDim.x / Tile::kCluster) {
    const Job j = job(plan, index);
    if constexpr (Tile::kExample > 0) {
#pragma unroll 1
      for (int64_t b = j.b0; b < j.b1; b += Tile::kBlock / Tile::kExample) {
        stage(j, 0, static_cast<int>(b));
      }
    } else {
#pragma unroll 1
      for (int64_t b = j.b0; b < j.b1; ++b) {
#pragma unroll 1
        for (int64_t t = j.t0; t < j.t1; t += Tile::kBlock) {
          stage(j, static_cast<int>(t), static_cast<int>(b));
        }
      }
    }
  }
  // The other CTA may still write to this one, and arrive at its barriers: see all stages empty.
  if constexpr (Tile::kCluster > 1) {
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_wait_cluster(ring.empty(), ring.phase);
      ring.advance();
    }
  }
}

// Sums of two columns of dy, one thread each pair.
template <class Tile>
PX_DEVICE void add_bias(const Plan& plan, uint32_t rank, uint32_t base, const Matrix& out,
                        const Moments& bias, float* slots) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int column =
      2 * (static_cast<int>(threadIdx.x) - 32);  // of the CTA's 128 rows of the result
  const uint32_t at = column / 64 * Tile::kHalfBytes + column % 64 * 2;
  Ring<Tile> ring(base, 0);
  auto add_rows = [&](float (&G)[2], int first, int count) {
#pragma unroll 4
    for (int k = first; k < first + count; ++k) {
      uint32_t both = load_shared_32(ring.data() + ((at + k * 128) ^ (k % 8 * 16)));
      uint16_t low = static_cast<uint16_t>(both), high = static_cast<uint16_t>(both >> 16);
      G[0] += Tile::kF16 ? widen(f16{low}) : widen(bf16{low});
      G[1] += Tile::kF16 ? widen(f16{high}) : widen(bf16{high});
    }
  };
#pragma unroll 1
  for (int64_t index = blockIdx.x / Tile::kCluster; index < plan.jobs;
       index += gridDim.x / Tile::kCluster) {
    const Job j = job(plan, index);
    const bool wanted = j.column == 0;
    float g[2] = {}, s[2] = {}, G[2] = {};
    auto drain = [&] {
#pragma unroll
      for (int e = 0; e < 2; ++e) g[e] += G[e], s[e] = fmaf(G[e], G[e], s[e]), G[e] = 0;
    };
    auto release = [&] {
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty());
      ring.advance();
    };
#pragma unroll 1
    for (int64_t b = j.b0; b < j.b1;) {
      if constexpr (Tile::kExample > 0) {
        barrier_wait(ring.full(), ring.phase);
        for (int e = 0; e < Tile::kBlock / Tile::kExample && b < j.b1; ++e, ++b) {
          if (wanted) add_rows(G, e * Tile::kExample, Tile::kExample);
          drain();
        }
        release();
      } else {
#pragma unroll 1
        for (int64_t t = j.t0; t < j.t1; t += Tile::kBlock) {
          barrier_wait(ring.full(), ring.phase);
          if (wanted) add_rows(G, 0, Tile::kBlock);
          release();
        }
        drain();
        ++b;
      }
    }
    if (!wanted) continue;
    const int in_tile = static_cast<int>(rank) * Tile::kCtaRows + column;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      put_bias<Tile::kRows>(j, in_tile + e, g[e], s[e], slots, out.outputs, bias);
    }
  }
}

template <class Tile>
PX_DEVICE void multiply(const Plan& plan, uint32_t rank, uint32_t base, const Matrix& out,
                        const Strided& x, float4* workspace) {
  const int group = static_cast<int>(threadIdx.x) / 128 - 1;  // upper or lower 64 rows
  const int thread = static_cast<int>(threadIdx.x) % 128;
  float G[64], g[64], s[64];
  Ring<Tile> ring(base, 0);
  uint32_t turn_phase = group == 0 ? 1 : 0;  // the upper rows begin
  auto release = [&](int stage) {
    if constexpr (Tile::kCluster == 1) {
      if (thread == 0) barrier_arrive(ring.empty(stage));
    } else {
      if (thread < Tile::kCluster) {
        barrier_arrive_in_cluster(ring.empty(stage), static_cast<uint32_t>(thread));
      }
    }
  };
  auto drain = [&] {
#pragma unroll
    for (int r = 0; r < 64; ++r) g[r] += G[r], s[r] = fmaf(G[r], G[r], s[r]);
  };
  auto operands = [&](uint64_t& a, uint64_t& b) {
    a = descriptor<Tile>(ring.data() + group * Tile::kHalfBytes);
    b = descriptor<Tile>(ring.data() + 2 * Tile::kHalfBytes);
  };
  for (int64_t index = blockIdx.x / Tile::kCluster; index < plan.jobs;
       index += gridDim.x / Tile::kCluster) {
    const Job j = job(plan, index);
#pragma unroll
    for (int r = 0; r < 64; ++r) g[r] = s[r] = 0;
    if constexpr (Tile::kExample > 0) {
      for (int64_t b = j.b0; b < j.b1;) {
        barrier_wait(ring.full(), ring.phase);
        uint64_t da, db;
        operands(da, db);
#pragma unroll 1
        for (int e = 0; e < Tile::kBlock / Tile::kExample && b < j.b1; ++e, ++b) {
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < Tile::kExample / 16; ++k) {
            wgmma<Tile>(G, da + k * kDescriptorStep, db + k * kDescriptorStep, k != 0);
          }
          wgmma_commit();
          wgmma_wait<0>();
          drain();
          da += Tile::kExample / 16 * kDescriptorStep, db += Tile::kExample / 16 * kDescriptorStep;
        }
        release(ring.stage);
        ring.advance();
      }
    } else {
      const int positions = static_cast<int>(j.t1 - j.t0);
      // Positions behind the last are zero: a tail of four steps is a block like the others.
      const int full_blocks = (positions + 15) / Tile::kBlock;
      const int tail_steps = (positions + 15) % Tile::kBlock / 16;
      // A warpgroup can then be an example ahead of the other within the ring of stages; in a
      // longer one it would wait for stages that the other has to read first.
      const bool in_turns = full_blocks + (tail_steps > 0) < Tile::kStages - 1;
      for (int64_t b = j.b0; b < j.b1; ++b) {
        int before = -1, add = 0;
        if (in_turns) barrier_wait(ring.turn(group), turn_phase), turn_phase ^= 1;
        auto committed = [&] {  // one group of products stays in flight
          if (before >= 0) wgmma_wait<1>(), release(before);
          before = ring.stage;
          ring.advance();
        };
        for (int block = 0; block < full_blocks; ++block) {
          barrier_wait(ring.full(), ring.phase);
          uint64_t da, db;
          operands(da, db);
          wgmma_fence();
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            wgmma<Tile>(G, da + k * kDescriptorStep, db + k * kDescriptorStep, add);
            add = 1;
          }
          wgmma_commit();
          committed();
        }
        if (tail_steps > 0) {
          barrier_wait(ring.full(), ring.phase);
          uint64_t da, db;
          operands(da, db);
          // Straight-line code for each length: a branch between products would serialise them.
          auto tail = [&](auto steps) {
            wgmma_fence();
#pragma unroll
            for (int k = 0; k < decltype(steps)::value; ++k) {
              wgmma<Tile>(G, da + k * kDescriptorStep, db + k * kDescriptorStep, k ? 1 : add);
            }
            wgmma_commit();
          };
          if (tail_steps == 1) {
            tail(std::integral_constant<int, 1>{});
          } else if (tail_steps == 2) {
            tail(std::integral_constant<int, 2>{});
          } else {
            tail(std::integral_constant<int, 3>{});
          }
          committed();
        }
        if (in_turns) {
          // Of every warp: the turn may come back only when all have seen that it was there.
          __syncwarp();
          if (thread % 32 == 0) barrier_arrive(ring.turn(1 - group));
        }
        wgmma_wait<0>();
        release(before);
        drain();
      }
    }
    const int in_cluster = static_cast<int>(rank) * 256 + group * 128 + thread;
    if (j.slot >= 0) {
      write_slot<typename Tile::Layout>(workspace + j.slot * slot_vectors<typename Tile::Layout>(),
                                        in_cluster, g, s, plan.chunks == 1);
    } else {
      out.put<typename Tile::Layout, 64>(x, 0, j.row * Tile::kRows, j.column * Tile::kColumns,
                                         in_cluster, 0, g, s);
    }
  }
}

template <class Tile>
__global__ void __launch_bounds__(Tile::kCtaThreads, 1)
    wgmma_moments(const __grid_constant__ CUtensorMap dy_map,
                  const __grid_constant__ CUtensorMap x_map, const Strided x, const Plan plan,
                  const Matrix out, const Moments bias, float4* __restrict__ workspace) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL) || defined(PEREXAMPLE_EMULATION)
  PX_SHARED_MEMORY(memory);
  const uint32_t base = (shared_address(memory) + 1023u) & ~1023u;
  const uint32_t rank = Tile::kCluster > 1 ? cluster_rank() : 0;
  if (threadIdx.x == 0) {
    Ring<Tile> ring(base, 0);
    for (int i = 0; i < Tile::kStages; ++i) {
      barrier_init(ring.full(i), 1);
      // Both multiplying warpgroups of every CTA that reads what this stage's copies write.
      barrier_init(ring.empty(i),
                   2 * Tile::kCluster + (bias.sum != nullptr ? Tile::kBiasWarps : 0));
    }
    for (int group = 0; group < 2; ++group) barrier_init(ring.turn(group), 4);
    barrier_init_fence();
  }
  if constexpr (Tile::kCluster > 1) {
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (threadIdx.x < Tile::kFetching) {
    fewer_registers<56>();
    if (threadIdx.x == 0) {
      fetch<Tile>(&dy_map, &x_map, plan, rank, base);
    } else if (bias.sum != nullptr && threadIdx.x >= 32 && threadIdx.x < 96) {
      float* slots = bias_slots<typename Tile::Layout>(workspace, plan);
      add_bias<Tile>(plan, rank, base, out, bias, slots);
    }
  } else {
    more_registers<224>();
    multiply<Tile>(plan, rank, base, out, x, workspace);
  }
#endif
}

template <class Tile>
void launch_wgmma(const Linear& a, const Strided& x, const Matrix& out, const Moments& bias,
                  const Device& device) {
  Plan p = plan(1, a.O, a.I, Tile::kRows, Tile::kColumns, a.B, a.T,
                Tile::kExample > 0 ? a.T : Tile::kBlock, device.multiprocessors / Tile::kCluster);
  int box_positions = Tile::kExample > 0 ? Tile::kExample : Tile::kBlock;
  auto map = [&](const void* data, const int64_t* stride, int64_t columns) {
    return encode({data,
                   {columns, a.T, a.B},
                   {1, stride[1], stride[0]},
                   {64, box_positions, Tile::kBlock / box_positions}});
  };
  void* workspace = allocate_slots<typename Tile::Layout>(p, bias, device);
  launch(wgmma_moments<Tile>,
         {p.ctas * Tile::kCluster, Tile::kCtaThreads, Tile::kSharedBytes, Tile::kCluster},
         device.stream, map(a.dy, a.dy_stride, a.O), map(a.x, a.x_stride, a.I), x, p, out, bias,
         static_cast<float4*>(workspace));
  launch_add_slots<typename Tile::Layout>(workspace, p, out, x, bias, device);
}

}  // namespace perexample::cuda
