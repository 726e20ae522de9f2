// Host side of plan.h. Plain C++: built, and tested, with or without CUDA.
#include "plan.h"

#include <algorithm>

namespace perexample::cuda {
namespace {

// What a split costs, in units of the time of one position of one tile: a job writes its partial
// sums, and they are read once more to be added.
constexpr int64_t kWrite = 128, kRead = 16;
constexpr int64_t kMostParts = 64;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

Plan plan(int64_t groups, int64_t outputs, int64_t inputs, int64_t tile_rows, int64_t tile_columns,
          int64_t batch, int64_t positions, int64_t position_block, int64_t ctas) {
  Plan p{};
  p.groups = groups;
  p.rows = ceil_div(outputs, tile_rows), p.columns = ceil_div(inputs, tile_columns);
  p.batch = batch, p.positions = positions, p.position_block = position_block;
  p.parts = p.chunks = 1;
  ctas = std::max<int64_t>(ctas, 1);  // half of one multiprocessor, where two make a cluster
  int64_t tiles = p.tiles();
  p.whole = tiles / ctas * ctas;
  int64_t rest = tiles - p.whole, work = batch * positions;
  if (rest > 0) {
    auto cost = [&](int64_t parts) {
      int64_t waves = ceil_div(rest * parts, ctas);
      return parts == 1 ? waves * work : waves * (ceil_div(work, parts) + kWrite) + kRead * parts;
    };
    int64_t best = 1, most = std::min(batch, kMostParts);
    for (int64_t parts = 2; parts <= most; ++parts) {
      if (cost(parts) < cost(best)) best = parts;
    }
    p.parts = best;
    // Too few examples: cut them, too. The sums of squares then wait for the sums over positions.
    int64_t blocks = ceil_div(positions, position_block);
    for (int64_t chunks = 2; batch <= kMostParts && chunks <= std::min(blocks, kMostParts);
         ++chunks) {
      if (batch * chunks > kMostParts) break;
      if (cost(batch * chunks) < cost(best)) {
        best = batch * chunks;
        p.parts = batch, p.chunks = chunks;
      }
    }
    if (best == 1) p.whole = tiles;
  }
  p.jobs = p.whole + p.slots();
  p.ctas = std::min(p.jobs, ctas);
  return p;
}

}  // namespace perexample::cuda
