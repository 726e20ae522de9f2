// embedding_moments: MATHS (6). The positions come sorted by row of the table, and those of a row
// in the order of examples: what a row gathers in one example is added, squared, and added to the
// rest.
//
// A CTA takes a chunk of the sorted positions. A row's run that ends where it began is written at
// once; of a run that goes over several chunks each leaves its piece in a slot, and a second kernel
// puts the pieces together, in their order.
#include "common.cuh"

namespace perexample::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMostChunk = 64;  // positions
constexpr int kAhead = 8;       // loads on their way
constexpr int kPieces = 64;     // that are looked up together

// One column of a piece: the sum of its first example, which the piece before may have begun; the
// sums over the examples between; the sum of its last example, which the next piece may go on with.
// A slot holds four rows of D of them; a chunk has a slot for the run that came from the chunk
// before, and one for the run that it begins and does not end.
template <class A>
struct Piece {
  A first = 0, g = 0, s = 0, last = 0;

  PX_DEVICE void write(A* slot, int64_t width) const {
    slot[0] = first, slot[width] = g, slot[2 * width] = s, slot[3 * width] = last;
  }
  PX_DEVICE void read(const A* slot, int64_t width) {
    first = slot[0], g = slot[width], s = slot[2 * width], last = slot[3 * width];
  }
};

// CTA (chunk, columns).
template <class T>
__global__ void __launch_bounds__(kThreads, sizeof(T) == 8 ? 4 : 8)
    embedding_chunks(const Embedding a, const int64_t* rows, const int64_t* order,
                     const int64_t chunk, const int64_t across, const Moments out, Wide<T>* slots) {
  using A = Wide<T>;
  __shared__ int64_t row[kMostChunk], example[kMostChunk], offset[kMostChunk];
  const int64_t count = a.B * a.T, index = blockIdx.x / across, begin = index * chunk;
  const int size = static_cast<int>(count - begin < chunk ? count - begin : chunk);
  for (int i = static_cast<int>(threadIdx.x); i < size; i += kThreads) {
    const int64_t from = order[begin + i];
    row[i] = rows[begin + i], example[i] = from / a.T;
    offset[i] = example[i] * a.dy_stride[0] + from % a.T * a.dy_stride[1];
    if (row[i] < 0 || row[i] >= a.V) trap();  // the lookup itself would have failed
  }
  __syncthreads();
  const int64_t d = blockIdx.x % across * kThreads + threadIdx.x;
  if (d >= a.D) return;
  const T* dy = static_cast<const T*>(a.dy) + d * a.dy_stride[2];
  bool from_before = begin > 0 && rows[begin - 1] == row[0];
  const bool goes_on = begin + size < count && rows[begin + size] == row[size - 1];
  Piece<A> piece;
  A G = 0;               // of the example under way
  bool several = false;  // examples in this piece
  auto close = [&](int64_t of, bool unfinished) {
    if (of == a.padding_idx) return;
    if (from_before || unfinished) {
      if (several) {
        piece.last = G;
      } else {
        piece.first = G;
      }
      piece.write(slots + (2 * index + (from_before ? 0 : 1)) * 4 * a.D + d, a.D);
    } else {
      if (several) piece.g += piece.first, piece.s += piece.first * piece.first;
      out.put(of * a.D + d, piece.g + G, piece.s + G * G);
    }
  };
  for (int ahead = 0; ahead < size; ahead += kAhead) {
    A value[kAhead];
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int i = ahead + q;
      value[q] = i < size && row[i] != a.padding_idx ? static_cast<A>(widen(dy[offset[i]])) : A{0};
    }
#pragma unroll
    for (int q = 0; q < kAhead; ++q) {
      const int i = ahead + q;
      if (i >= size) break;
      if (i > 0 && row[i] != row[i - 1]) {
        close(row[i - 1], false);
        piece = {}, G = 0, several = from_before = false;
      } else if (i > 0 && example[i] != example[i - 1]) {
        if (several) {
          piece.g += G, piece.s += G * G;
        } else {
          piece.first = G, several = true;
        }
        G = 0;
      }
      G += value[q];
    }
  }
  close(row[size - 1], goes_on);
}

// CTA (chunk, columns): puts together the run that begins in this chunk and does not end there.
template <class A>
__global__ void __launch_bounds__(kThreads)
    embedding_join(const Embedding a, const int64_t* rows, const int64_t* order,
                   const int64_t chunk, const int64_t across, const Moments out, const A* slots) {
  __shared__ int64_t first_example[kPieces], last_example[kPieces];
  __shared__ bool ends[kPieces];
  const int64_t count = a.B * a.T, index = blockIdx.x / across, begin = index * chunk;
  if (begin + chunk >= count) return;
  const int64_t row = rows[begin + chunk - 1];
  if (rows[begin + chunk] != row || row == a.padding_idx) return;
  if (begin > 0 && rows[begin - 1] == row) return;  // it began before
  const int64_t d = blockIdx.x % across * kThreads + threadIdx.x;
  A g = 0, s = 0, G = 0;
  int64_t example = -1;  // whose sum G is
  auto add = [&](const Piece<A>& piece, int64_t first, int64_t last) {
    if (first != example) g += G, s += G * G, G = 0;
    G += piece.first;
    if (first != last) {
      g += G + piece.g, s += G * G + piece.s;
      G = piece.last;
    }
    example = last;
  };
  for (int64_t from = index;; from += kPieces) {
    __syncthreads();  // the pieces before have been added
    const int64_t mine = from + threadIdx.x;
    if (threadIdx.x < kPieces && mine * chunk < count && rows[mine * chunk] <= row) {
      int64_t t0 = mine * chunk, t1 = t0 + chunk < count ? t0 + chunk : count;
      const bool whole = t1 < count && rows[t1] == row;
      if (mine == index) {
        while (rows[t0] != row) ++t0;
      }
      while (t1 > t0 && rows[t1 - 1] != row) --t1;
      if (t1 > t0) first_example[threadIdx.x] = order[t0] / a.T;
      if (t1 > t0) last_example[threadIdx.x] = order[t1 - 1] / a.T;
      ends[threadIdx.x] = !whole;
    }
    __syncthreads();
    int pieces = 1;
    while (pieces < kPieces && !ends[pieces - 1]) ++pieces;
#pragma unroll 4
    for (int i = 0; i < pieces; ++i) {
      Piece<A> piece;
      if (d < a.D) piece.read(slots + (2 * (from + i) + (from + i == index)) * 4 * a.D + d, a.D);
      add(piece, first_example[i], last_example[i]);
    }
    if (ends[pieces - 1]) break;
  }
  if (d < a.D) out.put(row * a.D + d, g + G, s + G * G);
}

}  // namespace

void embedding_moments(const Embedding& a, const int64_t* rows, const int64_t* order,
                       const Device& device) {
  const Moments out{a.dw, a.dw_sq, a.grad_dtype};
  zero(out, a.V * a.D, a.dtype, device.stream);  // rows that were not looked up
  if (a.B == 0 || a.T == 0 || a.D == 0) return;
  const int64_t count = a.B * a.T, across = ceil_div(a.D, kThreads);
  // Short chunks where there are few positions: enough CTAs to occupy the device.
  int64_t chunk = ceil_div(count * across, int64_t{16} * device.multiprocessors);
  chunk = chunk < 8 ? 8 : chunk > kMostChunk ? kMostChunk : chunk;
  const int64_t chunks = ceil_div(count, chunk);
  with_type(a.dtype, [&](auto type) {
    using T = decltype(type);
    using A = Wide<T>;
    A* slots = nullptr;
    if (chunks > 1) {
      slots = static_cast<A*>(
          device.allocate(device.ctx, 8 * chunks * a.D * static_cast<int64_t>(sizeof(A))));
    }
    launch(embedding_chunks<T>, {chunks * across, kThreads}, device.stream, a, rows, order, chunk,
           across, out, slots);
    if (chunks == 1) return;
    launch(embedding_join<A>, {chunks * across, kThreads}, device.stream, a, rows, order, chunk,
           across, out, static_cast<const A*>(slots));
  });
}

}  // namespace perexample::cuda
