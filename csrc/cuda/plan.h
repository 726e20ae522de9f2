// How a product of matrices is cut into jobs. Arithmetic on small integers only, for the host and
// for the device: a kernel works out its jobs by itself, so that no list has to be copied to it.
#pragma once

#include <cstdint>

#include "../cpu/kernels.h"

#ifdef __CUDACC__
#define PX_HOST_DEVICE __host__ __device__
#else
#define PX_HOST_DEVICE
#endif

namespace perexample::cuda {

// The matrices of `groups` independent groups are cut into tiles, and each tile is summed over the
// examples (and positions) that contribute to it. Whole waves of tiles are one job each and write
// their outputs themselves. The tiles that remain are too few to occupy the device: each is cut
// into `parts` ranges of examples, and where there are too few examples for that, each example into
// `chunks` ranges of positions. Then a job writes its partial sums to a slot of the workspace, and
// another kernel adds the slots of a tile in their order.
struct Plan {
  int64_t groups, rows, columns;  // tiles
  int64_t batch, positions;
  int64_t position_block;  // ranges of positions begin at multiples of this
  int64_t whole;           // tiles that are not cut
  int64_t parts;           // ranges of examples of each other tile
  int64_t chunks;          // ranges of positions of each example; if > 1, parts == batch
  int64_t jobs;
  int64_t ctas;  // that share the jobs: CTA c takes jobs c, c + ctas, ...

  PX_HOST_DEVICE int64_t tiles() const { return groups * rows * columns; }
  PX_HOST_DEVICE int64_t slots() const { return (tiles() - whole) * parts * chunks; }
};

struct Job {
  int64_t group, row, column;  // tile
  int64_t b0, b1;              // examples
  int64_t t0, t1;              // positions of each
  int64_t slot;                // -1: write the outputs
};

// Bands of this many rows of tiles are walked column by column, so that CTAs which run at the same
// time share the operands of few rows and columns in the L2 cache.
constexpr int64_t kBand = 8;

PX_HOST_DEVICE inline Job job(const Plan& p, int64_t index) {
  Job j{};
  int64_t tile = index, part = 0, chunk = 0;
  j.slot = -1;
  if (index >= p.whole) {
    j.slot = index - p.whole;
    tile = p.whole + j.slot / (p.parts * p.chunks);
    part = j.slot / p.chunks % p.parts;
    chunk = j.slot % p.chunks;
  }
  int64_t per_group = p.rows * p.columns;
  j.group = tile / per_group;
  int64_t inside = tile % per_group;
  int64_t band = inside / (kBand * p.columns), first = band * kBand;
  int64_t height = p.rows - first < kBand ? p.rows - first : kBand;
  inside -= first * p.columns;
  j.row = first + inside % height;
  j.column = inside / height;
  j.b0 = p.batch * part / p.parts, j.b1 = p.batch * (part + 1) / p.parts;
  int64_t blocks = (p.positions + p.position_block - 1) / p.position_block;
  j.t0 = blocks * chunk / p.chunks * p.position_block;
  j.t1 = blocks * (chunk + 1) / p.chunks * p.position_block;
  if (j.t1 > p.positions) j.t1 = p.positions;
  if (j.slot < 0) j.b0 = 0, j.b1 = p.batch, j.t0 = 0, j.t1 = p.positions;
  return j;
}

// The plan for matrices of (outputs, inputs), tiles of (tile_rows, tile_columns), and a device that
// runs `ctas` of the kernel at once.
PX_EXPORT Plan plan(int64_t groups, int64_t outputs, int64_t inputs, int64_t tile_rows,
                    int64_t tile_columns, int64_t batch, int64_t positions, int64_t position_block,
                    int64_t ctas);

}  // namespace perexample::cuda
