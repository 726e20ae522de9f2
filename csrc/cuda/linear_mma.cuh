// The portable kernel of linear_moments and conv_moments: tensor cores through mma.sync, sm_80 on.
//
//   G_b[o,i] = sum_t dy[b,t,o] x[b,t,i];   g = sum_b G_b;   s = sum_b G_b^2           MATHS (3),
//   (5)
//
// A CTA owns a tile of (o, i) and walks the positions of its examples in blocks, several of which
// are on their way to shared memory at any time. Three accumulators of the tile stay in registers:
// where an example begins, G is drained into g and s, and the first product of the new one starts
// from zero, so that no register is ever cleared.
//
// kSquares is T = 1: s = sum_b dy[b,o]^2 x[b,i]^2 is a second product over the same loads (MATHS
// 4). Squares of the inputs are cut into pieces which the tensor cores multiply exactly: two
// bfloat16 pieces hold the 16 bits of a squared bfloat16, three the 22 bits of a squared float16.
// float32 uses three TF32 products for one, which keeps 21 bits; kTf32 one.
//
// CTAs of the first column of tiles add up the bias from what has landed. Its sums are in shared
// memory, since no registers are left.
#pragma once

#include "common.cuh"

namespace perexample::cuda {

enum class Math { kBf16, kF16, kTf32, kTf32x3 };

// Which of a tile's elements thread and register hold: see `write_slot`.
template <int kM, int kN, int kWarpM, int kWarpN>
struct MmaLayout {
  static constexpr int kRows = kM, kColumns = kN;
  static constexpr int kWarpsM = kM / kWarpM, kWarpsN = kN / kWarpN;
  static constexpr int kFragmentsM = kWarpM / 16, kFragmentsN = kWarpN / 8;
  static constexpr int kThreads = kWarpsM * kWarpsN * 32;
  static constexpr int kRegisters = kFragmentsM * kFragmentsN * 4;

  PX_HOST_DEVICE static void position(int thread, int r, int& row, int& column) {
    int lane = thread % 32, warp = thread / 32, fragment = r / 4, e = r % 4;
    row = warp % kWarpsM * kWarpM + fragment / kFragmentsN * 16 + lane / 4 + e / 2 * 8;
    column = warp / kWarpsM * kWarpN + fragment % kFragmentsN * 8 + lane % 4 * 2 + e % 2;
  }
};

// kVectors: both operands can be read 16 bytes at a time (`vectors`).
template <Math kMath_, int kM, int kN, int kWarpM, int kWarpN, int kBlock_, bool kVectors_,
          bool kSquares_>
struct MmaTile : MmaLayout<kM, kN, kWarpM, kWarpN> {
  using Layout = MmaLayout<kM, kN, kWarpM, kWarpN>;
  static constexpr Math kMath = kMath_;
  static constexpr bool kHalf = kMath == Math::kBf16 || kMath == Math::kF16;
  static constexpr bool kVectors = kVectors_, kSquares = kSquares_;
  static constexpr int kBlock = kBlock_, kStages = 4;
  static constexpr int kElement = kHalf ? 2 : 4;  // bytes
  static constexpr int kVector = 16 / kElement;   // elements
  static constexpr int kStep = kHalf ? 16 : 8;    // positions of one instruction
  static constexpr int kWarpRows = kWarpM, kWarpColumns = kWarpN;
  // Rows of shared memory hold the columns of one position. 16-bit numbers are swizzled, in
  // vectors; 32-bit ones padded.
  static constexpr int kPitchDy = kHalf ? kM : kM + 8, kPitchX = kHalf ? kN : kN + 8;
  static constexpr int kBytesDy = kBlock * kPitchDy * kElement;
  static constexpr int kStageBytes = kBytesDy + kBlock * kPitchX * kElement;
  static constexpr int kBiasBytes = 3 * kM * 4;  // see `BiasSums`
  static constexpr int kSharedBytes = kStages * kStageBytes + kBiasBytes;
};

// Byte offset of element (position k, column c) in a stage's half.
template <class Tile, int kPitch>
PX_DEVICE uint32_t offset(int k, int c) {
  if (Tile::kHalf) return (k * kPitch + ((c / 8) ^ (k & 7)) * 8 + c % 8) * 2;
  return (k * kPitch + c) * 4;
}

// Brings the block of positions from t on into shared memory, zeros where there are none.
template <class Tile, int kPitch, int kColumns, class Operand>
PX_DEVICE void load_block(uint32_t to, const Operand& from, int64_t group, int64_t b, int t, int t1,
                          int64_t column) {
  if constexpr (Tile::kVectors) {
    constexpr int kAcross = kColumns / Tile::kVector;
#pragma unroll
    for (int q = 0; q < kAcross * Tile::kBlock / Tile::kThreads; ++q) {
      int e = static_cast<int>(threadIdx.x) + q * Tile::kThreads;
      int k = e / kAcross, c = e % kAcross * Tile::kVector;
      int bytes = t + k < t1 ? from.vector_bytes(column + c, Tile::kElement) : 0;
      const char* source = bytes > 0 ? from.at(group, b, t + k, column + c) : nullptr;
      copy_async(to + offset<Tile, kPitch>(k, c), source == nullptr ? from.data : source,
                 source == nullptr ? 0 : bytes);
    }
  } else {
#pragma unroll 4
    for (int q = 0; q < kColumns * Tile::kBlock / Tile::kThreads; ++q) {
      int e = static_cast<int>(threadIdx.x) + q * Tile::kThreads;
      int k = from.along_positions ? e % Tile::kBlock : e / kColumns;
      int c = from.along_positions ? e / Tile::kBlock : e % kColumns;
      const char* source =
          t + k < t1 && column + c < from.columns ? from.at(group, b, t + k, column + c) : nullptr;
      uint32_t at = to + offset<Tile, kPitch>(k, c);
      if constexpr (Tile::kHalf) {
        store_shared_16(
            at, source == nullptr ? uint16_t{0} : *reinterpret_cast<const uint16_t*>(source));
      } else {
        store_shared_32(at, source == nullptr ? 0u : *reinterpret_cast<const uint32_t*>(source));
      }
    }
  }
}

// One register of a fragment as a sum of kPieces registers.
template <int kPieces>
struct Pieces {
  uint32_t piece[kPieces];
};

// A float32 as TF32 pieces, the largest first.
template <int kPieces>
PX_DEVICE Pieces<kPieces> split_tf32(float x) {
  Pieces<kPieces> p;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    p.piece[i] = to_tf32(x);
    x -= as_float(p.piece[i]);
  }
  return p;
}

// The squares of two packed 16-bit numbers as packed bfloat16 pieces.
template <Math kMath, int kPieces>
PX_DEVICE Pieces<kPieces> split_squares(uint32_t packed) {
  uint16_t low = static_cast<uint16_t>(packed), high = static_cast<uint16_t>(packed >> 16);
  float x = kMath == Math::kBf16 ? widen(bf16{low}) : widen(f16{low});
  float y = kMath == Math::kBf16 ? widen(bf16{high}) : widen(f16{high});
  x *= x, y *= y;
  Pieces<kPieces> p;
#pragma unroll
  for (int i = 0; i < kPieces; ++i) {
    bf16 a = to_bf16(x), b = to_bf16(y);
    p.piece[i] = a.bits | static_cast<uint32_t>(b.bits) << 16;
    x -= widen(a), y -= widen(b);
  }
  return p;
}

template <int kPieces, int kRegisters>
PX_DEVICE void select_piece(uint32_t (&out)[kRegisters], const Pieces<kPieces> (&in)[kRegisters],
                            int piece) {
#pragma unroll
  for (int e = 0; e < kRegisters; ++e) out[e] = in[e].piece[piece];
}

// d (+)= the sum of the products of pieces, small ones first; those below the last bit are left out
// (kAll: none is).
template <bool kTf32, bool kAll, int kPieces>
PX_DEVICE void multiply_pieces(float (&d)[4], const Pieces<kPieces> (&a)[4],
                               const Pieces<kPieces> (&b)[2], bool from_zero) {
  constexpr int kMost = kAll ? 2 * (kPieces - 1) : kPieces - 1;
#pragma unroll
  for (int order = kMost; order >= 0; --order) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      int j = order - i;
      if (j < 0 || j >= kPieces) continue;
      uint32_t pa[4], pb[2];
      select_piece(pa, a, i), select_piece(pb, b, j);
      bool zero = from_zero && order == kMost && (i == 0 || order - i == kPieces - 1);
      const float c[4] = {zero ? 0.f : d[0], zero ? 0.f : d[1], zero ? 0.f : d[2],
                          zero ? 0.f : d[3]};
      if constexpr (kTf32) {
        mma_tf32(d, pa, pb, c);
      } else {
        mma_bf16(d, pa, pb, c);
      }
    }
  }
}

template <class Tile>
struct Accumulators {
  static constexpr int kM = Tile::kFragmentsM, kN = Tile::kFragmentsN;
  float G[kM][kN][4];                       // of the example under way; kSquares: g
  float g[kM][kN][Tile::kSquares ? 1 : 4];  // unused with kSquares
  float s[kM][kN][4];

  PX_DEVICE void clear() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kN; ++n) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          G[i][n][e] = s[i][n][e] = 0;
          if constexpr (!Tile::kSquares) g[i][n][e] = 0;
        }
      }
    }
  }

  // What MATHS (4) calls the two operations an element and example.
  PX_DEVICE void drain(int i, int n) {
    if constexpr (!Tile::kSquares) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        g[i][n][e] += G[i][n][e];
        s[i][n][e] = fmaf(G[i][n][e], G[i][n][e], s[i][n][e]);
      }
    }
  }
  PX_DEVICE void drain() {
#pragma unroll
    for (int i = 0; i < kM; ++i) {
#pragma unroll
      for (int n = 0; n < kN; ++n) drain(i, n);
    }
  }
  PX_DEVICE const float* sums() const { return Tile::kSquares ? &G[0][0][0] : &g[0][0][0]; }
};

// The products of kStep positions from `k` on of a 16-bit stage. `first`: an example begins.
template <class Tile>
PX_DEVICE void multiply_half(Accumulators<Tile>& acc, uint32_t dy, uint32_t x, int warp_m,
                             int warp_n, int k, bool first) {
  constexpr int kM = Tile::kFragmentsM, kN = Tile::kFragmentsN;
  constexpr int kPieces = Tile::kMath == Math::kBf16 ? 2 : 3;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t a[kM][4], b[kN][2];
  int ka = k + lane % 8 + lane / 16 * 8;  // (k0, m0), (k0, m8), (k8, m0), (k8, m8)
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    load_matrices_transposed(
        dy + offset<Tile, Tile::kPitchDy>(ka, warp_m + i * 16 + lane / 8 % 2 * 8), a[i]);
  }
  int kb = k + lane % 8 + lane / 8 % 2 * 8;  // (k0, n0), (k8, n0), (k0, n8), (k8, n8)
#pragma unroll
  for (int n = 0; n < kN; n += 2) {
    uint32_t r[4];
    load_matrices_transposed(x + offset<Tile, Tile::kPitchX>(kb, warp_n + n * 8 + lane / 16 * 8),
                             r);
    b[n][0] = r[0], b[n][1] = r[1], b[n + 1][0] = r[2], b[n + 1][1] = r[3];
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      float (&G)[4] = acc.G[i][n];
      if (first) acc.drain(i, n);
      const float c[4] = {first ? 0.f : G[0], first ? 0.f : G[1], first ? 0.f : G[2],
                          first ? 0.f : G[3]};
      if constexpr (Tile::kMath == Math::kBf16) {
        mma_bf16(G, a[i], b[n], c);
      } else {
        mma_f16(G, a[i], b[n], c);
      }
    }
  }
  if constexpr (Tile::kSquares) {
    Pieces<kPieces> bs[kN][2];
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) bs[n][e] = split_squares<Tile::kMath, kPieces>(b[n][e]);
    }
#pragma unroll
    for (int i = 0; i < kM; ++i) {
      Pieces<kPieces> as[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) as[e] = split_squares<Tile::kMath, kPieces>(a[i][e]);
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        multiply_pieces<false, kPieces == 2, kPieces>(acc.s[i][n], as, bs[n], false);
      }
    }
  }
}

// The same of a 32-bit stage.
template <class Tile>
PX_DEVICE void multiply_single(Accumulators<Tile>& acc, uint32_t dy, uint32_t x, int warp_m,
                               int warp_n, int k, bool first) {
  constexpr int kM = Tile::kFragmentsM, kN = Tile::kFragmentsN;
  constexpr int kPieces = Tile::kMath == Math::kTf32 ? 1 : 2;
  const int lane = static_cast<int>(threadIdx.x) % 32, row = lane / 4, column = lane % 4;
  Pieces<kPieces> b[kN][2], bs[kN][2];
#pragma unroll
  for (int n = 0; n < kN; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float v = as_float(load_shared_32(
          x + offset<Tile, Tile::kPitchX>(k + column + e * 4, warp_n + n * 8 + row)));
      b[n][e] = split_tf32<kPieces>(v);
      if constexpr (Tile::kSquares) bs[n][e] = split_tf32<kPieces>(v * v);
    }
  }
#pragma unroll
  for (int i = 0; i < kM; ++i) {
    Pieces<kPieces> a[4], as[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      float v = as_float(
          load_shared_32(dy + offset<Tile, Tile::kPitchDy>(k + column + e / 2 * 4,
                                                           warp_m + i * 16 + row + e % 2 * 8)));
      a[e] = split_tf32<kPieces>(v);
      if constexpr (Tile::kSquares) as[e] = split_tf32<kPieces>(v * v);
    }
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      if (first) acc.drain(i, n);
      multiply_pieces<true, false, kPieces>(acc.G[i][n], a, b[n], first);
      if constexpr (Tile::kSquares) {
        multiply_pieces<true, false, kPieces>(acc.s[i][n], as, bs[n], false);
      }
    }
  }
}

// Sums of the columns of dy, in shared memory from `at` on: [G, g, s][column], a thread a column.
template <class Tile>
struct BiasSums {
  static constexpr uint32_t kPlane = 4 * Tile::kRows;  // bytes
  uint32_t at;

  PX_DEVICE explicit BiasSums(uint32_t sums) : at(sums + 4 * threadIdx.x) {}
  PX_DEVICE static bool mine() { return threadIdx.x < Tile::kRows; }
  PX_DEVICE float get(int plane) const { return as_float(load_shared_32(at + plane * kPlane)); }
  PX_DEVICE void set(int plane, float x) const { store_shared_32(at + plane * kPlane, as_bits(x)); }
  PX_DEVICE void clear() const {
    for (int plane = 0; plane < 3; ++plane) set(plane, 0);
  }

  // The block of positions in the stage at `dy`, zeros where there are none. `ends`: the last of
  // its example. With kSquares every position is an example.
  PX_DEVICE void add(uint32_t dy, bool ends) const {
    const int column = static_cast<int>(threadIdx.x);
    float G[4] = {}, s = 0;
#pragma unroll 8
    for (int k = 0; k < Tile::kBlock; ++k) {
      float x;
      if constexpr (Tile::kHalf) {
        const uint32_t both = load_shared_32(dy + offset<Tile, Tile::kPitchDy>(k, column & ~1));
        const uint16_t bits = static_cast<uint16_t>(column % 2 != 0 ? both >> 16 : both);
        x = Tile::kMath == Math::kBf16 ? widen(bf16{bits}) : widen(f16{bits});
      } else {
        x = as_float(load_shared_32(dy + offset<Tile, Tile::kPitchDy>(k, column)));
      }
      G[k % 4] += x;
      if constexpr (Tile::kSquares) s = fmaf(x, x, s);
    }
    float sum = (G[0] + G[1]) + (G[2] + G[3]);
    if constexpr (!Tile::kSquares) {
      sum += get(0);
      set(0, ends ? 0.f : sum);
      if (!ends) return;
      s = sum * sum;
    }
    set(1, get(1) + sum), set(2, get(2) + s);
  }
};

template <class Tile, class X>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    mma_moments(const Strided dy, const X x, const Plan plan, const int64_t positions,
                const Matrix out, const Moments bias, float4* __restrict__ workspace) {
  PX_SHARED_MEMORY(memory);
  const uint32_t base = shared_address(memory);
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int warp_m = warp % Tile::kWarpsM * Tile::kWarpRows;
  const int warp_n = warp / Tile::kWarpsM * Tile::kWarpColumns;
  Accumulators<Tile> acc;

  for (int64_t index = blockIdx.x; index < plan.jobs; index += gridDim.x) {
    Job j = job(plan, index);
    if constexpr (Tile::kSquares) {  // the plan's examples are blocks of the one example's
                                     // positions
      j.t0 = j.b0 * Tile::kBlock;
      j.t1 = j.b1 * Tile::kBlock < positions ? j.b1 * Tile::kBlock : positions;
      j.b0 = 0, j.b1 = 1;
    }
    const int64_t row = j.row * Tile::kRows, column = j.column * Tile::kColumns;
    const int t0 = static_cast<int>(j.t0), t1 = static_cast<int>(j.t1);
    const int blocks = (t1 - t0 + Tile::kBlock - 1) / Tile::kBlock;
    const int total = static_cast<int>(j.b1 - j.b0) * blocks;
    int next_b = static_cast<int>(j.b0), next_t = t0;  // of the next block to load
    auto load = [&](int stage) {
      uint32_t to = base + stage * Tile::kStageBytes;
      load_block<Tile, Tile::kPitchDy, Tile::kRows>(to, dy, j.group, next_b, next_t, t1, row);
      load_block<Tile, Tile::kPitchX, Tile::kColumns>(to + Tile::kBytesDy, x, j.group, next_b,
                                                      next_t, t1, column);
      next_t += Tile::kBlock;
      if (next_t >= t1) next_t = t0, ++next_b;
    };
    acc.clear();
    const BiasSums<Tile> bias_sums(base + Tile::kStages * Tile::kStageBytes);
    // Of a convolution with its many columns the bias is little work, for much to compile.
    constexpr bool kBias = std::is_same_v<X, Strided>;
    const bool adds_bias = kBias && bias.sum != nullptr && j.column == 0 && bias_sums.mine();
    if (adds_bias) bias_sums.clear();
    __syncthreads();  // the stages of the job before have been read
#pragma unroll 1
    for (int stage = 0; stage < Tile::kStages - 1; ++stage) {
      if (stage < total) load(stage);
      copy_commit();
    }
    int block = 0, stage = 0, free_stage = Tile::kStages - 1;
    for (int done = 0; done < total; ++done) {
      copy_wait<Tile::kStages - 2>();
      __syncthreads();
      if (done + Tile::kStages - 1 < total) load(free_stage);
      copy_commit();
      const uint32_t at_dy = base + stage * Tile::kStageBytes, at_x = at_dy + Tile::kBytesDy;
      if (adds_bias) bias_sums.add(at_dy, block + 1 == blocks);
      const int left = t1 - t0 - block * Tile::kBlock;  // positions of this block, and after it
      auto multiply = [&](int k, auto first) {
        if constexpr (Tile::kHalf) {
          multiply_half<Tile>(acc, at_dy, at_x, warp_m, warp_n, k, decltype(first)::value);
        } else {
          multiply_single<Tile>(acc, at_dy, at_x, warp_m, warp_n, k, decltype(first)::value);
        }
      };
      if constexpr (Tile::kSquares) {
#pragma unroll 1
        for (int k = 0; k < left && k < Tile::kBlock; k += Tile::kStep)
          multiply(k, std::false_type{});
      } else {
        if (block == 0) {
          multiply(0, std::true_type{});
        } else {
          multiply(0, std::false_type{});
        }
#pragma unroll
        for (int k = Tile::kStep; k < Tile::kBlock; k += Tile::kStep) {
          if (k < left) multiply(k, std::false_type{});
        }
      }
      if (++block == blocks) block = 0;
      if (++stage == Tile::kStages) stage = 0;
      if (++free_stage == Tile::kStages) free_stage = 0;
    }
    acc.drain();
    if (adds_bias) {
      put_bias<Tile::kRows>(j, static_cast<int>(threadIdx.x), bias_sums.get(1), bias_sums.get(2),
                            bias_slots<typename Tile::Layout>(workspace, plan), out.outputs, bias);
    }
    const int thread = opaque(static_cast<int>(threadIdx.x));
    const float* g = acc.sums();
    const float* s = &acc.s[0][0][0];
    if (j.slot >= 0) {
      write_slot<typename Tile::Layout>(workspace + j.slot * slot_vectors<typename Tile::Layout>(),
                                        thread, g, s, plan.chunks == 1);
    } else {
      out.put<typename Tile::Layout, Tile::kRegisters>(x, j.group, row, column, thread, 0, g, s);
    }
  }
}

// `batch` examples of `positions`; with kSquares one example, whose positions are the batch.
// `bias`: null where not wanted, or x is not Strided.
template <class Tile, class X>
void launch_mma(const Strided& dy, const X& x, int64_t groups, int64_t batch, int64_t positions,
                const Matrix& out, const Moments& bias, const Device& device) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 64;  // what a CTA counts, it counts in 32 bits
  if (batch >= kMost || positions >= kMost || batch * ceil_div(positions, Tile::kBlock) >= kMost) {
    throw std::runtime_error("perexample: too many examples or positions for one call");
  }
  // With T = 1 the sums over ranges of the batch simply add up: ranges of `positions` are examples.
  Plan p = Tile::kSquares ? plan(groups, out.outputs, out.inputs, Tile::kRows, Tile::kColumns,
                                 ceil_div(positions, Tile::kBlock), Tile::kBlock, Tile::kBlock,
                                 device.multiprocessors)
                          : plan(groups, out.outputs, out.inputs, Tile::kRows, Tile::kColumns,
                                 batch, positions, Tile::kBlock, device.multiprocessors);
  void* workspace = allocate_slots<typename Tile::Layout>(p, bias, device);
  launch(mma_moments<Tile, X>, {p.ctas, Tile::kThreads, Tile::kSharedBytes}, device.stream, dy, x,
         p, positions, out, bias, static_cast<float4*>(workspace));
  launch_add_slots<typename Tile::Layout>(workspace, p, out, x, bias, device);
}

}  // namespace perexample::cuda
